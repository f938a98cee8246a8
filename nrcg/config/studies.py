"""What can be asked for beside the paper's comparison: likelihood, training objectives, known densities."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nrcg.config.basics import Count, Fraction, Positive, Section, Seed, Target, Weighting
from nrcg.config.models import ObjectiveConfig, OptimizerConfig, ScheduleConfig

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
