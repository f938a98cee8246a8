"""What can be asked for beside the paper's comparison: likelihood, training objectives, known densities."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nrcg.config.basics import Count, Fraction, Input, Name, Positive, Section, Seed, Target, Weighting
from nrcg.config.explaining import KINDS, Attack, DistanceName, ExplainSettings, Pulling, Search, settings_of
from nrcg.config.models import ObjectiveConfig, OptimizerConfig, ScheduleConfig

NEAREST = "nearest"
"""A baseline beside the kinds: the nearest training image of the class aimed at."""
DensityName = Literal["eight_gaussians", "checkerboard", "two_moons"]


class LikelihoodConfig(Section):
    """Bits per dimension of validation images under the diffusion model; docs/evaluation.md."""

    num_images: Positive = Field(description="Validation images, the first ones.")
    num_steps: Positive | None = Field(
        description="Terms of the bound per image between t = 2 and T, a stratified choice; null: all."
    )
    num_traces: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Random signs per image for the divergence of the probability-flow ODE; 0: the bound alone.",
    )
    shard_size: Positive = Field(default=1024, description="Images per job.")
    batch_size: Count = Field(default="auto", description="Images at once on the device. auto: as many as fit.")
    seed: Seed = Field(default=0, description="Noise and steps of image i depend on (seed, i) alone.")

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.shard_size)


class ObjectiveGrid(Section):
    """Training objectives: each of `predicts` with each of `weightings`."""

    predicts: Annotated[list[Target], Field(min_length=1)] = Field(description="What the networks predict.")
    weightings: Annotated[list[Weighting], Field(min_length=1)] = Field(
        description="Weightings of the loss; each goes with each of `predicts`, where that is not a training twice."
    )

    @model_validator(mode="after")
    def _once(self) -> ObjectiveGrid:
        for key in ("predicts", "weightings"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: an entry is listed twice")
        return self

    @property
    def cells(self) -> dict[str, ObjectiveConfig]:
        """The objectives by name, which becomes a folder; those that are the same training are listed once.

        Every weighting but `simple` is said of x_0's error, whatever is predicted: then score is the U-Net of epsilon,
        and mean that of sample. Weighted by the SNR, the error of x_0 is that of the noise.
        """
        cells = {}
        for predicts in self.predicts:
            for weighting in self.weightings:
                same = {"score": "epsilon", "mean": "sample"}.get(predicts)
                if weighting != "simple" and same in self.predicts:
                    continue
                if (predicts, weighting) == ("epsilon", "snr") and "simple" in self.weightings:
                    continue
                cells[f"{predicts}-{weighting}"] = ObjectiveConfig(predicts=predicts, weighting=weighting)
        return cells


class ObjectivesConfig(ObjectiveGrid):
    """A grid of training objectives, trained at equal cost and compared; docs/objectives.md."""

    num_samples: Annotated[int, Field(ge=2)] = Field(
        description="Samples per objective without guidance, and at each scale with it."
    )
    method: str = Field(description="What guides them; a key of methods.")
    scales: Annotated[list[float], Field(min_length=1)] = Field(
        description="Guidance scales; an objective is judged by that of its lowest class-conditional distance."
    )

    @model_validator(mode="after")
    def _check(self) -> ObjectivesConfig:
        if len(set(self.scales)) != len(self.scales):
            raise ValueError("scales: an entry is listed twice")
        for scale in self.scales:
            if scale < 0:
                raise ValueError(f"scales: {scale} is no guidance scale; a finite number >= 0 is allowed")
        return self


class DensitiesConfig(ObjectiveGrid):
    """Points of the plane whose density is known, learned by a small network for each objective; docs/objectives.md."""

    names: Annotated[list[DensityName], Field(min_length=1)] = Field(description="The distributions.")
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    num_train: Positive = Field(description="Points trained on.")
    num_test: Annotated[int, Field(ge=2)] = Field(description="Points whose likelihood is measured.")
    num_drawn: Positive = Field(description="Points drawn for the picture.")
    num_steps: Positive = Field(description="Steps of the training.")
    batch_size: Positive = Field(description="Points per step.")
    width: Positive = Field(description="Of the network's hidden layers.")
    num_blocks: Positive = Field(description="Its residual blocks.")
    ema_decay: Fraction = Field(description="Largest decay of the average of its weights.")
    seed: Seed = Field(description="Seed of points, network and training.")


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class ExplainMethodConfig(Section):
    """A way to explain: a guide and a kind with its settings; those left out are the kind's; docs/explanations.md."""

    kind: Literal[*KINDS, NEAREST] = Field(
        description="counterfactual, affirmative, semifactual, adversarial, prototype; nearest: the nearest training "
        "image of the class aimed at, a baseline."
    )
    classifier: Literal["non_robust", "robust"] = Field(
        default="non_robust", description="The guide, whose decisions are explained."
    )
    cone: bool = Field(default=False, description="Project its gradient on the cone around the robust classifier's.")
    tau: Fraction | None = Field(default=None, description="Share of the steps that the image is noised by.")
    scale: Annotated[float, Field(ge=0)] | None = Field(default=None, description="s of the classifier's gradient.")
    weight: float | None = Field(default=None, description="lambda of the distance; negative drives away.")
    distance: DistanceName | None = Field(default=None, description="d(x0hat, x*).")
    pull: Pulling | None = Field(default=None, description="The distance as an implicit step, or by its gradient.")
    normalize: bool | None = Field(default=None, description="Gradients at norm one (DVCE).")
    stabilizer: str | None = Field(default=None, description="As of nrcg sample --stabilizer; betas at 400 steps.")
    joint: bool | None = Field(default=None, description="One stabilizer for the sum of both gradients.")
    cone_angle: Annotated[float, Field(ge=0, le=90)] | None = Field(default=None, description="Half-angle, degrees.")
    input: Input | None = Field(default=None, description="What the classifier sees.")
    num_inference_steps: Positive | None = Field(default=None, description="Steps of a whole trajectory.")
    search: Search | None = Field(
        default=None, description="For each image the smallest tau, or the largest weight, that still succeeds."
    )
    confidence: Fraction | None = Field(default=None, description="What a search wants p(class) to be at least.")
    attack: Attack | None = Field(default=None, description="adversarial: sign or gradient steps.")
    budget: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="adversarial: largest change, as a share of the range of pixel values."
    )

    @model_validator(mode="after")
    def _check(self) -> ExplainMethodConfig:
        self.settings()
        if self.cone and self.classifier == "robust":
            raise ValueError("cone: the robust classifier guides already")
        return self

    def settings(self, seed: int = 0) -> ExplainSettings | None:
        """Of the engine; None for the baseline. Raises ValueError for settings that exclude each other."""
        if self.kind == NEAREST:
            return None
        given = self.model_dump(exclude={"kind", "classifier", "cone"})
        return settings_of(self.kind, **given, seed=seed)


class ExplainConfig(Section):
    """Explanations of the classifiers' decisions about validation images; docs/explanations.md."""

    methods: Annotated[dict[Name, ExplainMethodConfig], Field(min_length=1)] = Field(description="By name.")
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = Field(
        default=None,
        description="[class of the images, class aimed at]; null: images of every other class, aimed at the target.",
    )
    num_images: Annotated[int, Field(ge=2)] = Field(description="Validation images of each pair, the first ones.")
    num_seeds: Positive = Field(default=1, description="Explanations of each image, for what differs between seeds.")
    noise: Fraction = Field(
        default=0.0,
        description="Standard deviation, as a share of the range of pixel values, of the noise that each image is "
        "explained with once more, for the stability; 0: it is not.",
    )
    identities: list[str] = Field(
        default_factory=list,
        description="Protocols or SPECs of networks whose features say whose picture it is, such as a face network's.",
    )
    identity_threshold: Fraction = Field(default=0.5, description="Cosine above which two pictures show the same.")
    shard_size: Positive = Field(default=256, description="Images per job.")
    batch_size: Count = Field(default="auto", description="Images at once on the device. auto: as many as fit.")
    bits: bool = Field(default=False, description="Also bits per dimension of the explanations.")
    seed: Seed = Field(default=0, description="With an image's number gives all of its noise.")

    @model_validator(mode="after")
    def _names(self) -> ExplainConfig:
        if "explanations" in self.methods:
            raise ValueError("methods: explanations is the name of the table of all; choose another")
        return self

    @property
    def num_runs(self) -> int:
        """Explanations of each image: the seeds, and with noise one more."""
        return self.num_seeds + (self.noise > 0)

    @property
    def total_images(self) -> int:
        """Of all pairs."""
        return self.num_images * len(self.pairs or [None])

    @property
    def num_shards(self) -> int:
        return math.ceil(self.total_images / self.shard_size)
