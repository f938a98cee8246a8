"""The configuration: `config.yaml` merged, validated and cut into the sections that each step reads.

Imports no torch, so that the Snakefile and `nrcg --help` stay light.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from nrcg.errors import ConfigError
from nrcg.files import atomic_write_text

PUBLISHED_STEPS = 400
"""T of the paper: the number of steps for which `config.yaml` states a stabilizer's betas."""

ROLES = ("non_robust", "robust", "judge")

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
)
"""Rules of the workflow. An experiment is a rule too, so it cannot have one of these names."""

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _checked_batch_size(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is no batch size; allowed: auto or a whole number >= 1")
    return value


BatchSize = Annotated[Positive | Literal["auto"], BeforeValidator(_checked_batch_size)]
# A name becomes a folder and a Snakemake rule.
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


BestBy = Literal["cfid", "fid", "ckid", "kid", "accuracy_judge"]
Role = Literal["non_robust", "robust", "judge"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


def checked_device(device: str) -> str:
    """A device's name as it is. Raises ValueError for anything else."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device):
        raise ValueError(f"{device!r} is no device; allowed: auto, cpu, cuda, cuda:N, mps")
    return device


class Section(BaseModel):
    """A part of the configuration. Unknown keys and wrong types are errors, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """Which images, and how they are made or read: what every source has in common."""

    name: Name = Field(description="Folder below data/. Experiments with equal data may share it.")
    image_size: Annotated[int, Field(ge=8)] = Field(description="Height and width in pixels.")
    classes: Annotated[list[str], Field(min_length=2)] = Field(description="Class names; label = position.")

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a class is listed twice")
        return self


class SportBallsData(DataSection):
    """Balls on a white canvas, drawn by nrcg.sportballs."""

    source: Literal["sportballs"] = Field(description="Drawn here; nothing to download.")
    num_train: Positive = Field(description="Number of training images.")
    num_val: Positive = Field(description="Number of validation images.")
    diameter: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="Smallest and largest ball diameter as a share of the canvas."
    )
    seed: Annotated[int, Field(ge=0)] = Field(description="Image i depends on (seed, i) alone.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        # The list repeats nrcg.sportballs.CLASSES: a test keeps the two in step.
        allowed = ["baseball", "basketball", "soccer", "volleyball"]
        for name in self.classes:
            if name not in allowed:
                raise ValueError(f"classes: {name!r} is no SportBalls class; allowed: {', '.join(allowed)}")
        low, high = self.diameter
        if not 0 < low <= high <= 1:
            raise ValueError("diameter: two shares of the canvas, 0 < smallest <= largest <= 1")
        return self


class ImageData(DataSection):
    """Images that are read from files: what the sources below have in common."""

    path: Annotated[str, Field(min_length=1)] = Field(
        description="Folder of the raw files, relative to the working directory."
    )
    preprocessing: Literal["squash", "center_crop"] = Field(
        default="center_crop",
        description="How an image becomes square: squash resizes both sides, center_crop first cuts out the largest"
        " centred square. Resized by Pillow's antialiased bilinear filter.",
    )
    num_train: Positive | None = Field(default=None, description="Only so many training images; null: all.")
    num_val: Positive | None = Field(default=None, description="Only so many validation images; null: all.")
    max_unreadable: Fraction = Field(
        default=0.0, description="Largest share of image files that may be unreadable; they are listed and left out."
    )


class CelebAData(ImageData):
    """CelebA, aligned and cropped, with its official splits; labelled by one of its 40 attributes."""

    source: Literal["celeba"] = Field(description="img_align_celeba (folder or zip) and its two lists.")
    preprocessing: Literal["squash", "center_crop"] = Field(
        default="squash",
        description="squash: 178 x 218 to a square, as published; center_crop: the middle 178 x 178 first, the usual"
        " protocol elsewhere. Resized by Pillow's antialiased bilinear filter.",
    )
    classes: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        description="Names for the images without and with the attribute, in this order."
    )
    attribute: str = Field(description="A column of list_attr_celeba.txt, such as Male.")
    download: bool = Field(default=True, description="Fetch what is missing, where gdown and the network are at hand.")


class HuggingFaceData(ImageData):
    """Parquet files as the Hugging Face hub holds them: a column of images and one of labels."""

    source: Literal["huggingface"] = Field(description="Parquet files, on disk or from a hub id.")
    hub_id: str | None = Field(default=None, description="Data set to fetch into path if no parquet file is there.")
    revision: str | None = Field(default=None, description="Branch or commit of hub_id; null: the newest.")
    image_column: str = Field(default="image", description="Encoded images: struct{bytes, path} or binary.")
    label_column: str = Field(
        default="label", description="Class numbers (by the ClassLabel's names, if any) or names."
    )
    train_split: str = Field(default="train", description="Files of this split train, such as train-00000-of-00006.")
    val_split: str | None = Field(
        default="validation", description="Files of this split validate; null: val_share of the training split."
    )
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of each class that validates, where val_split is null."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the images' order and of the split.")


class FolderData(ImageData):
    """One's own images: a folder per class, or one folder and a CSV file of labels."""

    source: Literal["folder"] = Field(description="Image files: a folder per class, or one folder and a CSV of labels.")
    max_unreadable: Fraction = Field(
        default=0.01, description="Largest share of image files that may be unreadable; they are listed and left out."
    )
    labels: str | None = Field(
        default=None, description="CSV file with a header, relative to path; null: each class has a folder of its name."
    )
    image_column: str = Field(default="image", description="Column of the CSV: file names relative to path.")
    label_column: str = Field(default="label", description="Column of the CSV: class names, or positions in classes.")
    split_column: str | None = Field(
        default=None, description="Column of the CSV that says train or val; null: split by val_share and seed."
    )
    image_suffix: str = Field(default="", description="Added to the CSV's file names, such as .jpg.")
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of each class that validates, where no split is given."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the images' order and of the split.")


DatasetConfig = Annotated[
    SportBallsData | CelebAData | HuggingFaceData | FolderData,
    Field(discriminator="source", description="Which images, and how they are made or read."),
]


class UNetConfig(Section):
    """diffusers UNet2DModel."""

    block_out_channels: Annotated[list[Positive], Field(min_length=1)] = Field(
        description="Channels per level; each level after the first halves the resolution."
    )
    attention: list[bool] = Field(description="Self-attention per level, as long as block_out_channels.")
    layers_per_block: Positive = Field(description="Residual layers per level.")
    attention_head_dim: Positive = Field(description="Channels per attention head.")
    norm_num_groups: Positive = Field(description="Groups of the group norm; divides every channel count.")
    dropout: Fraction = Field(description="Dropout probability while training.")

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError("attention: one entry for each entry of block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups: {self.norm_num_groups} does not divide {channels} channels")
        return self


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate of AdamW.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(description="Steps of linear warm-up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="Decoupled weight decay.")
    grad_clip: Annotated[float, Field(gt=0)] = Field(description="Largest 2-norm of the gradient.")


class ScheduleConfig(Section):
    """The forward process (eq. 2), in the terms of diffusers' schedulers."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = Field(description="T, the number of diffusion steps.")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(description="beta_1; squaredcos_cap_v2 does not use it.")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(description="beta_T; squaredcos_cap_v2 does not use it.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="linear",
        description="linear in beta (published), in its root (latent diffusion), or the cosine of improved DDPM.",
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.beta_start > self.beta_end:
            raise ValueError("beta_start: must not be larger than beta_end")
        return self


class DDPMConfig(Section):
    """The unconditional diffusion model: trained from scratch, or a pretrained one."""

    pretrained: str | None = Field(
        default=None,
        description="A diffusers folder, or a hub id (optionally ID@REVISION), taken instead of training; null trains. "
        "The schedule must be the model's own; the keys of the training are not used.",
    )
    schedule: ScheduleConfig
    unet: UNetConfig
    epochs: Positive = Field(description="Passes over the training images.")
    batch_size: Positive = Field(description="Images per optimiser step, over all processes.")
    micro_batch_size: Positive | None = Field(
        default=None,
        description="Images at once on a device, the gradients being summed; null: all of a step's. Takes less memory, "
        "changes the result by rounding alone.",
    )
    num_processes: Positive | Literal["auto"] = Field(
        default="auto",
        description="Processes that share each batch; auto: one per GPU that the job has, 1 on a CPU. Changes the "
        "result by rounding alone.",
    )
    optimizer: OptimizerConfig
    ema_decay: Fraction = Field(description="Largest decay of the weight EMA; the saved weights are the EMA's.")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        description="A checkpoint at least this often; a killed training goes on from the last."
    )
    num_val_images: Positive = Field(description="Validation images of the loss per epoch.")
    sample_every: Annotated[int, Field(ge=0)] = Field(description="A sample grid each n epochs; 0: only at the end.")
    seed: Annotated[int, Field(ge=0)]

    @field_validator("pretrained")
    @classmethod
    def _pretrained(cls, source: str | None) -> str | None:
        if source is not None and not source.strip():
            raise ValueError("empty; give a diffusers folder or hub id, or null to train")
        return source

    @field_validator("num_processes", mode="before")
    @classmethod
    def _num_processes(cls, number: Any) -> Any:
        # A union's own message would speak of each of its types.
        if number != "auto" and (type(number) is not int or number < 1):
            raise ValueError(f"{number!r} is no number of processes; a whole number >= 1 or auto is allowed")
        return number

    @model_validator(mode="after")
    def _one_image_per_process(self) -> DDPMConfig:
        if self.num_processes != "auto" and self.num_processes > self.batch_size:
            raise ValueError(f"num_processes: {self.num_processes} processes cannot share {self.batch_size} images")
        return self


class ClassifierConfig(Section):
    """One classifier, trained here or `pretrained`. `noised` images follow eq. 2, each at its own t uniform over the
    steps."""

    pretrained: str | None = Field(
        default=None,
        description="A folder, torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER or python:MODULE:FACTORY; null"
        " trains one. The training's settings then do not matter.",
    )
    class_map: dict[str, int | str | list[int | str]] | None = Field(
        default=None,
        description="pretrained: for each of dataset.classes the classifier's class, by name or number, or a list of"
        " classes whose probabilities add up.",
    )
    architecture: str = Field(description="mobilenet_v3_small, small_cnn, or another torchvision model's name.")
    noised: bool = Field(description="Train on noised images (robust) or on clean ones.")
    epochs: Positive
    batch_size: Positive
    optimizer: OptimizerConfig
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        description="torchvision's MobileNetV3 ships 0.01, too slow for short trainings."
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        default=10, description="A checkpoint at least this often; a killed training goes on from the last."
    )
    seed: Annotated[int, Field(ge=0)]

    @field_validator("architecture")
    @classmethod
    def _architecture(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} is no torchvision model name; for example: mobilenet_v3_small")
        return name

    @model_validator(mode="after")
    def _check(self) -> ClassifierConfig:
        if self.class_map is not None and self.pretrained is None:
            raise ValueError("class_map: is for a pretrained classifier; one trained here has the data set's classes")
        return self


class ClassifiersConfig(Section):
    non_robust: ClassifierConfig
    robust: ClassifierConfig
    judge: ClassifierConfig

    @model_validator(mode="after")
    def _check(self) -> ClassifiersConfig:
        for role, noised in (("non_robust", False), ("robust", True), ("judge", False)):
            if getattr(self, role).noised != noised:
                raise ValueError(f"{role}.noised: must be {str(noised).lower()}, or the role is not what it says")
        return self


STABILIZER_KEYS = {
    "none": (),
    "ema": ("beta",),
    "adam": ("beta1", "beta2", "eps"),
    "adam_debiased": ("beta1", "beta2", "eps"),
    "unit_norm": (),
    "norm_clip": ("max_norm",),
    "adaptive_clip": ("factor", "beta"),
    "chain": ("of",),
}
"""Keys that each stabilizer needs. One's own class, `module:Class`, takes `arguments` alone."""


class StabilizerConfig(Section):
    """Smoothing of the guidance gradient over the steps. Betas hold at the published 400 steps;
    for T steps the code uses beta^(400/T)."""

    name: str = Field(
        default="none", description=f"{', '.join(STABILIZER_KEYS)}, or one's own nrcg.Stabilizer as module:Class."
    )
    beta: Beta | None = Field(default=None, description="ema, adaptive_clip: momentum at 400 steps (eq. 7).")
    beta1: Beta | None = Field(default=None, description="adam: first-moment beta at 400 steps (eq. 8).")
    beta2: Beta | None = Field(default=None, description="adam: second-moment beta at 400 steps (eq. 8).")
    eps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="adam: added to the root.")
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="norm_clip: largest 2-norm of a sample's gradient."
    )
    factor: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="adaptive_clip: largest norm as a multiple of the sample's average so far."
    )
    of: Annotated[list[StabilizerConfig], Field(min_length=1)] | None = Field(
        default=None, description="chain: stabilizers, each fed with the last one's result."
    )
    arguments: dict[str, float | str | bool] | None = Field(
        default=None, description="module:Class: keyword arguments, as they are (no beta is scaled)."
    )

    @model_validator(mode="after")
    def _check(self) -> StabilizerConfig:
        own = re.fullmatch(r"[\w.]+:\w+", self.name) is not None
        if self.name not in STABILIZER_KEYS and not own:
            raise ValueError(
                f"name: {self.name!r} is no stabilizer; allowed: {', '.join(STABILIZER_KEYS)} or module:Class"
            )
        needed = () if own else STABILIZER_KEYS[self.name]
        for key in [field for field in type(self).model_fields if field != "name"]:
            given = getattr(self, key) is not None
            if given and key not in needed and not (own and key == "arguments"):
                raise ValueError(f"{key}: stabilizer {self.name!r} has no such key; allowed: {list(needed)}")
            if not given and key in needed:
                raise ValueError(f"{key}: missing; stabilizer {self.name!r} needs {list(needed)}")
        return self


class ForwardConfig(Section):
    """The forward analysis (figs. 1 to 4)."""

    num_images: Positive = Field(description="Validation images, one noise trajectory each.")
    batch_size: BatchSize = Field(description="Images at once on the device; changes no result. auto: as many as fit.")
    stabilizers: Annotated[list[StabilizerConfig], Field(min_length=1)] = Field(
        description="Stabilizers measured on non_robust_x0 (fig. 4)."
    )
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> ForwardConfig:
        names = [stabilizer_name(entry) for entry in self.stabilizers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stabilizers: {name} is listed twice; forward.csv has one line for each name")
        return self


class ScaleScheduleConfig(Section):
    """How the guidance scale changes along a trajectory; the sweep's scale is multiplied by it."""

    name: Literal["constant", "linear", "cosine", "interval"] = "constant"
    start: Annotated[float, Field(ge=0)] = Field(default=1.0, description="linear, cosine: factor at t = T.")
    end: Annotated[float, Field(ge=0)] = Field(default=1.0, description="linear, cosine: factor at t = 0.")
    low: Fraction = Field(default=0.0, description="interval: guidance where low <= t / T <= high.")
    high: Fraction = Field(default=1.0, description="interval: guidance where low <= t / T <= high.")

    @model_validator(mode="after")
    def _check(self) -> ScaleScheduleConfig:
        if self.low > self.high:
            raise ValueError("low: must not be larger than high")
        used = {"linear": ("start", "end"), "cosine": ("start", "end"), "interval": ("low", "high")}
        for key in ("start", "end", "low", "high"):
            if key not in used.get(self.name, ()) and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: the schedule {self.name!r} has no such key")
        return self


class SamplerConfig(Section):
    """The way from x_T to x_0."""

    name: Literal["model", "ddpm", "ddim", "dpmpp"] = Field(
        default="model", description="model: the scheduler saved with the diffusion model; dpmpp: DPM-Solver++(2M)."
    )
    steps: Positive | None = Field(default=None, description="Sampling steps; null: all T.")
    eta: Fraction = Field(default=0.0, description="ddim: share of the ancestral sampler's noise.")

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta: the sampler {self.name!r} has no such key; ddim has")
        return self


class MethodConfig(Section):
    """What guides: a classifier, what it sees, how its gradient is taken and smoothed, and the sampler."""

    classifier: Literal["robust", "non_robust"] | None = Field(
        default=None, description="Guiding classifier; null samples without guidance."
    )
    input: Literal["x_t", "pred_x0"] = Field(
        default="x_t",
        description="The classifier sees the noisy image or the one-step denoised image (eq. 5).",
    )
    stabilizer: StabilizerConfig = StabilizerConfig()
    scale_schedule: ScaleScheduleConfig = ScaleScheduleConfig()
    grad_mode: Literal["full", "checkpoint", "no_jacobian"] = Field(
        default="full", description="pred_x0: how the gradient passes the U-Net; no_jacobian takes eps for a constant."
    )
    every_k: Positive = Field(default=1, description="A new gradient each k-th step.")
    skip_above: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="No gradient for a sample while its p(target) is above this; 1: always one."
    )
    sampler: SamplerConfig = SamplerConfig()

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.classifier is None:
            for key, field in type(self).model_fields.items():
                if key not in ("classifier", "sampler") and getattr(self, key) != field.default:
                    raise ValueError(f"{key}: guides nothing without a classifier; give robust or non_robust")
        if self.input == "x_t" and self.grad_mode != "full":
            raise ValueError("grad_mode: is about the U-Net, which the gradient passes only with input pred_x0")
        return self


class SamplingConfig(Section):
    """Guided sampling (algorithm 1)."""

    num_samples: Positive = Field(description="Samples per method and scale.")
    shard_size: Positive = Field(description="Samples per job.")
    batch_size: BatchSize = Field(
        description="Samples at once on the device; never changes the samples. auto: as many as fit."
    )
    start: Literal["standard_normal", "data_mean"] = Field(
        description="x_T ~ N(0, I) as published, or around sqrt(abar_T) times the mean training image."
    )
    clip_pred_x0: bool = Field(description="Clip the one-step denoised image to [-1, 1], as published.")
    trace: bool = Field(
        description="Record gradient norms, cosines, log-probabilities and clipped pixels of each step."
    )
    seed: Annotated[int, Field(ge=0)] = Field(description="Sample i depends on (seed, i) alone.")


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
        description="Autocast of the U-Net and classifiers; auto: bfloat16 where the device gains by it."
    )
    dataset: DatasetConfig
    ddpm: DDPMConfig
    classifiers: ClassifiersConfig
    forward: ForwardConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    sweep: dict[str, list[float]] = Field(description="Guidance scales per method; [] leaves a method out.")

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
        if self.ddpm.pretrained is not None:  # it brings its own U-Net
            return self
        size, halvings = self.dataset.image_size, len(self.ddpm.unet.block_out_channels) - 1
        if size % 2**halvings:
            raise ValueError(
                f"dataset.image_size: {size} cannot be halved {halvings} times, once for each entry of"
                f" ddpm.unet.block_out_channels after the first; a multiple of {2**halvings} is allowed"
            )
        return self

    @property
    def num_shards(self) -> int:
        return math.ceil(self.sampling.num_samples / self.sampling.shard_size)


class Config(Section):
    """The whole file, every experiment merged with the defaults."""

    methods: dict[Name, MethodConfig]
    experiments: dict[Name, ExperimentConfig]

    @model_validator(mode="after")
    def _methods_exist(self) -> Config:
        for name, experiment in self.experiments.items():
            for method in experiment.sweep:
                if method not in self.methods:
                    raise ValueError(
                        f"experiments.{name}.sweep.{method}: unknown method; allowed: {', '.join(self.methods)}"
                    )
        return self


def dataset_owner(config: Config, dataset: str) -> str:
    """The first experiment that uses a data set; all that do have equal settings of it."""
    return next(name for name, experiment in config.experiments.items() if experiment.dataset.name == dataset)


def merge(base: Any, over: Any) -> Any:
    """Lay `over` on `base`: mappings merge key by key, anything else (lists too) is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = merge(base[key], value) if key in base else copy.deepcopy(value)
        return merged
    return copy.deepcopy(over)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a lost setting should be heard of."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is no plain text", problem_mark=key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is no YAML, holds a key twice or holds no mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; give its path by --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{path}{place}: no valid YAML: {reason}") from None
    except ValueError as error:  # a date such as 2024-13-45
        raise ConfigError(f"{path}: no valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no mapping; expected the keys defaults, methods, experiments")
    return data


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in one line: key, what is wrong, what is allowed. `root` is the model that refused."""
    errors = error.errors()
    first = errors[0]
    parts, models = _locate(first["loc"], root)
    key = ".".join(parts)
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        _, above = _locate(first["loc"][:-1], root)
        text = f"unknown key; allowed here: {', '.join(sorted(above[0].model_fields))}"
        if len(_union_at(first["loc"], root)) > 1:
            text += f" (source {_tag(above[0])})"
    elif kind == "missing":
        text = "missing; give it here or in defaults"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        text = f"should be a mapping, got {value!r}"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        key = f"{key}.source"
        given = "missing" if kind == "union_tag_not_found" else f"{first['ctx']['tag']!r} is no source of images"
        text = f"{given}; allowed: {', '.join(map(_tag, models))}"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
        # A validator names the keys below the model it belongs to.
        match = re.match(r"^((?:\w+\.)*\w+): (.*)$", text, re.DOTALL)
        if match:
            key = f"{key}.{match[1]}" if key and not match[1].startswith("experiments.") else match[1]
            text = match[2]
    else:
        text = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {value!r}"
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+", value):
            text += " (YAML reads this as text: write it with a point and a sign, such as 1.0e-3 or 1.0e+3)"
        elif kind == "string_type":
            text += " (put it in quotes)"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {text}{more}"


def _locate(loc: tuple, root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys that lead to a place of the configuration, and the models that may stand there.

    Where a mapping has several models, pydantic's location holds which of them was taken: that is no key.
    """
    keys: list[str] = []
    models = [root]
    in_container = False
    for part in loc:
        if part == "[key]":
            continue
        if len(models) > 1 and not in_container:
            models = [model for model in models if _tag(model) == part]
            continue
        keys.append(str(part))
        if in_container:  # a key of a mapping or a position in a list
            in_container = False
            continue
        annotation = models[0].model_fields[part].annotation if models and part in models[0].model_fields else None
        models = _models_in(annotation)
        in_container = get_origin(annotation) in (dict, list)
    return keys, models


def _union_at(loc: tuple, root: type[BaseModel]) -> list[type[BaseModel]]:
    """The models of the union whose chosen model holds the key at `loc`; fewer than two where there is none."""
    return _locate(loc[:-2], root)[1] if len(loc) > 2 else []


def _tag(model: type[BaseModel]) -> str:
    """The value of `source` that chooses a model of `DatasetConfig`."""
    return get_args(model.model_fields["source"].annotation)[0]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation such as dict[str, Model] or Model | OtherModel is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def parse(raw: dict, source: str = "config.yaml") -> Config:
    """Merge and validate a configuration as read from YAML.

    Args:
        raw: mapping with the keys defaults, methods and experiments.
        source: the file's name for messages.

    Raises:
        ConfigError: one line that names the key and what is allowed.
    """
    try:
        raw = json.loads(json.dumps(raw, default=str))  # plain dicts, whatever mapping type the reader made
    except ValueError as error:  # an anchor that holds itself
        raise ConfigError(f"{source}: {error}") from None
    for key in raw:
        if key not in ("defaults", "methods", "experiments"):
            raise ConfigError(f"{source}: {key}: unknown key; allowed here: defaults, experiments, methods")
    for key in ("defaults", "methods", "experiments"):
        if not isinstance(raw.get(key), dict) or not raw[key]:
            raise ConfigError(f"{source}: {key}: missing, empty or no mapping")
    merged = {}
    for name, block in raw["experiments"].items():
        if name in RULES:
            raise ConfigError(f"{source}: experiments.{name}: the name of a rule of the workflow; choose another")
        if not isinstance(block, dict):
            raise ConfigError(f"{source}: experiments.{name}: should be a mapping, got {block!r}")
        merged[name] = merge(raw["defaults"], block)
    try:
        config = Config(methods=raw["methods"], experiments=merged)
    except ValidationError as error:
        message = _explain(error, Config)
        # A mistake in `defaults` would be reported for the first experiment that inherits it.
        match = re.match(r"experiments\.(\w+)\.([\w.]+): ", message)
        if match and _holds(raw["defaults"], match[2]) and not _holds(raw["experiments"][match[1]], match[2]):
            message = f"defaults.{message.split('.', 2)[2]}"
        raise ConfigError(f"{source}: {message}") from None
    for name, experiment in config.experiments.items():
        owner = dataset_owner(config, experiment.dataset.name)
        if config.experiments[owner].dataset != experiment.dataset:
            raise ConfigError(
                f"{source}: experiments.{name}.dataset.name: {experiment.dataset.name!r} is also the data set of"
                f" {owner}, with other settings; give it another name"
            )
    return config


def _holds(mapping: Any, dotted: str) -> bool:
    """Whether nested mappings and lists have an entry at a dotted path."""
    for part in dotted.split("."):
        if isinstance(mapping, list) and part.isdecimal() and int(part) < len(mapping):
            mapping = mapping[int(part)]
        elif isinstance(mapping, dict) and part in mapping:
            mapping = mapping[part]
        else:
            return False
    return True


def load(path: str | os.PathLike = "config.yaml") -> Config:
    """Read, merge and validate a configuration file. Raises ConfigError."""
    return parse(read_yaml(path), str(path))


def get_experiment(config: Config, name: str) -> ExperimentConfig:
    """An experiment by name. Raises ConfigError that lists the names there are."""
    if name not in config.experiments:
        raise ConfigError(f"experiment {name!r} is unknown; allowed: {', '.join(config.experiments)}")
    return config.experiments[name]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal settings give equal text, whatever their order in the file."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def scaled_beta(beta: float, num_steps: int) -> float:
    """beta^(400/T): the beta whose window spans the same share of T steps as `beta` does of the
    published 400 (method settings of arXiv 2507.00687, section 3)."""
    return beta ** (PUBLISHED_STEPS / num_steps)


def stabilizer_name(config: StabilizerConfig) -> str:
    """Short name in methods and tables: ema99 for EMA 0.99, adam, none, adaptive_clip_ema99 for a chain."""
    if config.name == "chain":
        return "_".join(stabilizer_name(part) for part in config.of)
    if config.name == "ema":
        return f"ema{f'{config.beta:g}'.removeprefix('0.').ljust(2, '0')}"
    return config.name.rpartition(":")[2]


def format_scale(scale: float) -> str:
    """A scale as it stands in paths and tables: 10 for 10.0, 0.5 for 0.5."""
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


# What each step of the pipeline reads: these settings and no others. A step's settings file carries a
# fingerprint in its name; a step runs again when that changes, and only then.


class StepSettings(Section):
    """Settings of one step of one experiment."""

    experiment: Name
    # Where a job runs and in which batches changes no result, so it must not make results stale.
    UNAFFECTING: ClassVar[tuple[str, ...]] = ()

    def fingerprint(self) -> str:
        """Changes when, and only when, a setting changes that can change the step's result."""
        settings = self.model_dump(mode="json")
        for dotted in self.UNAFFECTING:
            *path, key = dotted.split(".")
            section = settings
            for part in path:
                section = section[part]
            section.pop(key, None)  # not every source of images has it
        return fingerprint(settings)


class DatasetStep(StepSettings):
    # Experiments may share a data set; images are the same whoever has put them there.
    UNAFFECTING = ("experiment", "dataset.download")
    dataset: DatasetConfig


class TrainDDPMStep(StepSettings):
    UNAFFECTING = (
        "device",
        "ddpm.checkpoint_minutes",
        "ddpm.sample_every",
        "ddpm.micro_batch_size",
        "ddpm.num_processes",
    )
    device: str
    precision: Precision
    ddpm: DDPMConfig

    def fingerprint(self) -> str:
        if self.ddpm.pretrained is None:
            return super().fingerprint()
        return fingerprint({"ddpm": self.ddpm.model_dump(mode="json", include={"pretrained", "schedule"})})


class TrainClassifierStep(StepSettings):
    UNAFFECTING = ("device", "classifier.checkpoint_minutes")
    device: str
    precision: Precision
    role: Role
    classifier: ClassifierConfig
    schedule: ScheduleConfig

    def fingerprint(self) -> str:
        if self.classifier.pretrained is None:
            return super().fingerprint()
        classifier = self.classifier.model_dump(mode="json", include={"pretrained", "class_map"})
        schedule = self.schedule.model_dump(mode="json")
        return fingerprint({"classifier": classifier, "role": self.role, "schedule": schedule})


class ForwardStep(StepSettings):
    UNAFFECTING = ("device", "forward.batch_size")
    device: str
    precision: Precision
    target: str
    clip_pred_x0: bool
    forward: ForwardConfig


class SampleStep(StepSettings):
    # num_samples says how many shards there are; a shard that is whole stays whole. The rule passes each shard's size.
    UNAFFECTING = ("device", "sampling.batch_size", "sampling.num_samples")
    device: str
    precision: Precision
    target: str
    method: str
    guidance: MethodConfig
    sampling: SamplingConfig


class ReferenceStep(StepSettings):
    UNAFFECTING = ("device", "evaluation.best_by")
    device: str
    target: str
    evaluation: EvaluationConfig


class EvaluateStep(StepSettings):
    UNAFFECTING = ("device", "sampling.batch_size", "evaluation.best_by")
    device: str
    precision: Precision
    target: str
    method: str
    guidance: MethodConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig


class ReportStep(StepSettings):
    description: str
    target: str
    classes: list[str]
    dataset: DatasetConfig
    ddpm: DDPMConfig
    classifiers: ClassifiersConfig
    forward: ForwardConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    methods: dict[str, MethodConfig]
    sweep: dict[str, list[float]]


STEPS: dict[str, type[StepSettings]] = {
    "dataset": DatasetStep,
    "train_ddpm": TrainDDPMStep,
    "train_classifier": TrainClassifierStep,
    "forward": ForwardStep,
    "sample": SampleStep,
    "reference": ReferenceStep,
    "evaluate": EvaluateStep,
    "report": ReportStep,
}


def step_settings(config: Config, experiment: str, step: str, part: str | None = None) -> StepSettings:
    """The settings that one step reads.

    Args:
        step: a key of STEPS.
        part: the role for `train_classifier`, the method for `sample` and `evaluate`, else None.

    Raises:
        ConfigError: unknown experiment, role or method.
    """
    settings = get_experiment(config, experiment)
    values: dict[str, Any] = {"experiment": experiment}
    for field in STEPS[step].model_fields:
        if field in type(settings).model_fields:
            values[field] = getattr(settings, field)
    if step == "train_classifier":
        if part not in ROLES:
            raise ConfigError(f"role {part!r} is unknown; allowed: {', '.join(ROLES)}")
        values |= {"role": part, "schedule": settings.ddpm.schedule}
        values["classifier"] = getattr(settings.classifiers, part)
    if step in ("sample", "evaluate"):
        if part not in config.methods:
            raise ConfigError(f"method {part!r} is unknown; allowed: {', '.join(config.methods)}")
        values |= {"method": part, "guidance": config.methods[part]}
    if step == "forward":
        values["clip_pred_x0"] = settings.sampling.clip_pred_x0
    if step == "report":
        values["classes"] = settings.dataset.classes
        values["methods"] = {name: config.methods[name] for name in settings.sweep}
    return STEPS[step](**{key: _plain(value) for key, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def write_step_settings(
    config: Config,
    experiment: str,
    step: str,
    part: str | None = None,
    folder: str | os.PathLike = ".nrcg/config",
) -> str:
    """Write a step's settings to `<folder>/<experiment>/<step>[-<part>]-<fingerprint>.json`; return the path.

    A job that is under way keeps the settings it was started with, also when config.yaml is edited meanwhile.
    """
    settings = step_settings(config, experiment, step, part)
    name = "-".join(filter(None, (step, part, settings.fingerprint())))
    path = Path(folder) / experiment / f"{name}.json"
    text = json.dumps({"step": step, "settings": settings.model_dump(mode="json")}, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        atomic_write_text(path, text)
    return path.as_posix()


def read_step_settings(
    path: str | os.PathLike, step: str, experiment: str | None = None, part: str | None = None
) -> StepSettings:
    """Settings of a step, from a settings file written above or from a whole config.yaml.

    Raises:
        ConfigError: the file is missing, cut off, for another step, or invalid.
    """
    raw = read_yaml(path)  # JSON is YAML
    if "settings" not in raw:
        config = parse(raw, str(path))
        if experiment is None:
            raise ConfigError(
                f"{path} holds several experiments; name one by --experiment: {', '.join(config.experiments)}"
            )
        return step_settings(config, experiment, step, part)
    if raw.get("step") != step:
        raise ConfigError(f"{path}: holds the settings of the step {raw.get('step')!r}, not of {step!r}")
    try:
        return STEPS[step].model_validate(raw["settings"])
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, STEPS[step])}") from None


def write_schema(path: str | os.PathLike) -> None:
    """Write the JSON schema of config.yaml, for editors. An experiment may leave out any key that
    `defaults` gives, so at the file's level nothing is required."""
    Path(path).write_text(json.dumps(json_schema(), indent=2) + "\n")


def json_schema() -> dict:
    """JSON schema of config.yaml, generated from the models above."""
    schema = ExperimentConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    definitions |= MethodConfig.model_json_schema(ref_template="#/$defs/{model}").pop("$defs", {})
    definitions["ExperimentConfig"] = schema
    definitions["MethodConfig"] = {
        key: value for key, value in MethodConfig.model_json_schema().items() if key != "$defs"
    }
    partial = {name: copy.deepcopy(body) for name, body in definitions.items() if name != "StabilizerConfig"}
    for body in partial.values():
        if body is not definitions["MethodConfig"]:
            body.pop("required", None)
    # What `defaults` says of the data set fits every source, so that more than one of them may match.
    partial["ExperimentConfig"]["properties"]["dataset"] = {
        "anyOf": partial["ExperimentConfig"]["properties"]["dataset"]["oneOf"],
        "description": ExperimentConfig.model_fields["dataset"].description,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nrcg config.yaml",
        "type": "object",
        "additionalProperties": False,
        "required": ["defaults", "methods", "experiments"],
        "properties": {
            "defaults": {"$ref": "#/$defs/ExperimentConfig"},
            "methods": {"type": "object", "additionalProperties": {"$ref": "#/$defs/MethodConfig"}},
            "experiments": {"type": "object", "additionalProperties": {"$ref": "#/$defs/ExperimentConfig"}},
        },
        "$defs": partial | {"StabilizerConfig": definitions["StabilizerConfig"]},
    }
