"""An experiment: `defaults` with its own keys laid over it; and the whole file."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from nrcg.config.basics import (
    ROLES,
    BestBy,
    Compile,
    Count,
    ForwardNoise,
    Name,
    Positive,
    Precision,
    Section,
    Seed,
    Start,
    WeightsType,
    checked_device,
)
from nrcg.config.data import DatasetConfig
from nrcg.config.methods import MethodConfig, StabilizerConfig, stabilizer_name
from nrcg.config.models import ClassifiersConfig, DDPMConfig
from nrcg.config.studies import DensitiesConfig, ExplainConfig, LikelihoodConfig, ObjectivesConfig
from nrcg.errors import ConfigError

RULES = (
    "all",
    "dataset",
    "train_ddpm",
    "train_classifier",
    "forward",
    "sample",
    "reference",
    "evaluate",
    "collect",
    "figures",
    "report",
    "likelihood",
    "likelihood_table",
    "train_objective",
    "objective",
    "objectives_table",
    "explain",
    "evaluate_explanations",
    "explanations_table",
    "density",
    "densities_table",
    "densities",
)
"""Rules of the workflow. An experiment is a rule too, so it cannot have one of these names."""


class ForwardConfig(Section):
    """The forward analysis (figs. 1 to 4)."""

    num_images: Positive = Field(description="Validation images.")
    noise: ForwardNoise = Field(
        description="per_image: one noise for an image, whose x_t are one trajectory, as in sampling. per_step: a new "
        "noise for each t and a stabilizer each for the gradients at t and t - 1, as in the released code."
    )
    batch_size: Count = Field(description="Images at once on the device; changes no result. auto: as many as fit.")
    stabilizers: Annotated[list[StabilizerConfig], Field(min_length=1)] = Field(
        description="Stabilizers measured on non_robust_x0 (fig. 4)."
    )
    seed: Seed = Field(description="Seed of the noise.")

    @model_validator(mode="after")
    def _check(self) -> ForwardConfig:
        names = [stabilizer_name(entry) for entry in self.stabilizers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stabilizers: {name} is listed twice; forward.csv has one line for each name")
        return self


class SamplingConfig(Section):
    """Guided sampling (algorithm 1)."""

    num_samples: Positive = Field(description="Samples per method and scale.")
    shard_size: Positive = Field(description="Samples per job.")
    batch_size: Count = Field(
        description="Samples at once on the device; never changes the samples. auto: as many as fit."
    )
    start: Start = Field(
        description="x_T ~ N(0, I) as published, or around sqrt(abar_T) times the mean training image."
    )
    clip_pred_x0: bool = Field(description="Clip the one-step denoised image to [-1, 1], as published.")
    betas_per_step: bool = Field(
        default=False,
        description="Stabilizers' betas hold per step of this experiment, whatever its T; false: they hold at the "
        "published 400 steps, and for T steps the code uses beta^(400/T).",
    )
    trace: bool = Field(
        description="Record gradient norms, cosines, log-probabilities and clipped pixels of each step."
    )
    seed: Seed = Field(description="Sample i depends on (seed, i) alone.")


class EvaluationConfig(Section):
    """How samples are measured; docs/evaluation.md."""

    features: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Protocols: inception (clean-fid), torcheval (as published), judge, torchvision:NAME, timm:NAME, "
        "python:MODULE:FACTORY, or a list; auto: the judge, and each Inception whose weights are at hand."
    )
    inception_dir: str = Field(description="Folder of the Inception weights; explicit protocols download into it.")
    num_reference: Positive | None = Field(
        description="Training images (the first ones) compared with; null: all. Never drawn with replacement."
    )
    num_pairwise: Annotated[int, Field(ge=10)] | None = Field(
        default=10_000,
        description="Samples and reference images (the first ones) that KID, precision, recall, density, coverage and "
        "diversity compare in pairs; null: all.",
    )
    best_by: BestBy = Field(default="cfid", description="What the best scale of a method is best in.")

    @field_validator("features")
    @classmethod
    def _features(cls, features: str | list[str]) -> str | list[str]:
        entries = [features] if isinstance(features, str) else features
        for entry in entries:
            named = entry in ("auto", "inception", "torcheval", "judge")
            if not named and not re.fullmatch(r"(torchvision|timm|python):\S+", entry):
                raise ValueError(
                    f"{entry!r} is no protocol; allowed: auto, inception, torcheval, judge, torchvision:NAME, "
                    "timm:NAME, python:MODULE:FACTORY, or a list of these"
                )
            if entries.count(entry) > 1:
                raise ValueError(f"{entry} is listed twice")
        return features


class ExperimentConfig(Section):
    """One experiment: `defaults` with the experiment's keys laid over it."""

    description: str = Field(description="One sentence for the report.")
    target: str = Field(description="The class to generate; one of dataset.classes.")
    device: str = Field(description="auto, cpu, cuda or cuda:N.")
    precision: Precision = Field(
        description="Autocast of the U-Net, and of classifiers in their training; auto: where the device gains by it "
        "float16 for sampling and forward analysis on a GPU, else bfloat16."
    )
    unet_weights: WeightsType | None = Field(
        default=None,
        description="Type of the U-Net's weights in sampling and forward analysis, instead of autocast: faster on a "
        "GPU, half the memory; null: as they are saved.",
    )
    compile: Compile = Field(
        default="auto",
        description="Compile the networks by torch.compile; auto: on a GPU, where the job is long enough to win by it; "
        "graphs: what samples as CUDA graphs too, for small batches. Changes results by rounding alone.",
    )
    dataset: DatasetConfig
    ddpm: DDPMConfig
    classifiers: ClassifiersConfig
    forward: ForwardConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    sweep: dict[str, list[float]] = Field(description="Guidance scales per method; [] leaves a method out.")
    likelihood: LikelihoodConfig | None = Field(default=None, description="null measures no likelihood.")
    objectives: ObjectivesConfig | None = Field(default=None, description="null compares no training objectives.")
    explain: ExplainConfig | None = Field(default=None, description="null explains nothing.")

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        return checked_device(device)

    @field_validator("sweep")
    @classmethod
    def _sweep(cls, sweep: dict[str, list[float]]) -> dict[str, list[float]]:
        for method, scales in sweep.items():
            for scale in scales:
                if scale < 0:
                    raise ValueError(f"{method}: {scale} is no guidance scale; a finite number >= 0 is allowed")
            if len(set(scales)) != len(scales):
                raise ValueError(f"{method}: a scale is listed twice")
        if not any(sweep.values()):
            raise ValueError("no method has a scale; give at least one")
        return {method: scales for method, scales in sweep.items() if scales}

    @model_validator(mode="after")
    def _target(self) -> ExperimentConfig:
        if self.target not in self.dataset.classes:
            raise ValueError(
                f"target: {self.target!r} is no class of the data set; allowed: {', '.join(self.dataset.classes)}"
            )
        return self

    @model_validator(mode="after")
    def _pairs(self) -> ExperimentConfig:
        for pair in (self.explain.pairs or []) if self.explain is not None else []:
            for name in pair:
                if name not in self.dataset.classes:
                    raise ValueError(
                        f"explain.pairs: {name!r} is no class of the data set; allowed: "
                        f"{', '.join(self.dataset.classes)}"
                    )
            if pair[0] == pair[1]:
                raise ValueError(f"explain.pairs: {pair[0]} is aimed at itself")
        return self

    @model_validator(mode="after")
    def _class_maps(self) -> ExperimentConfig:
        for role in ROLES:
            mapped = getattr(self.classifiers, role).class_map
            if mapped is not None and set(mapped) != set(self.dataset.classes):
                raise ValueError(
                    f"classifiers.{role}.class_map: needs exactly the keys {', '.join(self.dataset.classes)}, the data"
                    " set's classes"
                )
        return self

    @model_validator(mode="after")
    def _size_halves(self) -> ExperimentConfig:
        if self.ddpm.pretrained is not None or self.ddpm.init is not None:  # it brings its own U-Net
            return self
        size, halvings = self.dataset.image_size, len(self.ddpm.unet.block_out_channels) - 1
        if size % 2**halvings:
            raise ValueError(
                f"dataset.image_size: {size} cannot be halved {halvings} times, once for each entry of"
                f" ddpm.unet.block_out_channels after the first; a multiple of {2**halvings} is allowed"
            )
        return self

    @model_validator(mode="after")
    def _objectives(self) -> ExperimentConfig:
        if self.objectives is None:
            return self
        if self.likelihood is None:
            raise ValueError("objectives: are compared by their likelihood too; likelihood: null leaves it out")
        for key in ("pretrained", "init"):
            if getattr(self.ddpm, key) is not None:
                raise ValueError(f"objectives: are trained from random weights; ddpm.{key} must be null")
        return self

    @property
    def num_shards(self) -> int:
        return math.ceil(self.sampling.num_samples / self.sampling.shard_size)


class Config(Section):
    """The whole file, every experiment merged with the defaults."""

    methods: dict[Name, MethodConfig]
    experiments: dict[Name, ExperimentConfig]
    densities: DensitiesConfig | None = None

    @model_validator(mode="after")
    def _methods_exist(self) -> Config:
        for name, experiment in self.experiments.items():
            used = {f"sweep.{method}": method for method in experiment.sweep}
            if experiment.objectives is not None:
                used["objectives.method"] = experiment.objectives.method
            for key, method in used.items():
                if method not in self.methods:
                    raise ValueError(f"experiments.{name}.{key}: unknown method; allowed: {', '.join(self.methods)}")
            if experiment.objectives is not None and self.methods[experiment.objectives.method].classifier is None:
                raise ValueError(f"experiments.{name}.objectives.method: {experiment.objectives.method} guides nothing")
        return self


def dataset_owner(config: Config, dataset: str) -> str:
    """The first experiment that uses a data set; all that do have equal settings of it."""
    return next(name for name, experiment in config.experiments.items() if experiment.dataset.name == dataset)


def get_experiment(config: Config, name: str) -> ExperimentConfig:
    """An experiment by name. Raises ConfigError that lists the names there are."""
    if name not in config.experiments:
        raise ConfigError(f"experiment {name!r} is unknown; allowed: {', '.join(config.experiments)}")
    return config.experiments[name]
