"""The sections `ddpm` and `classifiers`: networks, and how they are trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nrcg.config.basics import Count, Fraction, Positive, Section, Seed, Target, Weighting


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


class ObjectiveConfig(Section):
    """What the U-Net is trained to predict, and how its squared error is weighted over t (docs/training.md)."""

    predicts: Target = Field(
        default="epsilon",
        description="epsilon, the noise; sample, x_0; v_prediction; score and mean, read from the U-Net's noise and "
        "its x_0.",
    )
    weighting: Weighting = Field(
        default="simple",
        description="simple: the target's own error; vlb: the variational bound; snr; min_snr; p2; truncated_snr.",
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="min_snr: the largest SNR (5); p2: the exponent (1)."
    )
    k: Annotated[float, Field(gt=0)] | None = Field(default=None, description="p2: added to the SNR (1).")
    timesteps: Literal["uniform", "importance"] = Field(
        default="uniform",
        description="Which t are drawn; importance: in proportion to the root of each one's mean squared loss (iDDPM).",
    )

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        for key, users in (("gamma", ("min_snr", "p2")), ("k", ("p2",))):
            if getattr(self, key) is not None and self.weighting not in users:
                raise ValueError(f"{key}: the weighting {self.weighting!r} has no such key; {', '.join(users)} has")
        return self

    @property
    def bound(self) -> tuple[float, float]:
        """(gamma, k), with the published values where none are given."""
        return (5.0 if self.weighting == "min_snr" else 1.0) if self.gamma is None else self.gamma, self.k or 1.0


class DDPMConfig(Section):
    """The unconditional diffusion model: trained from scratch, or a pretrained one."""

    pretrained: str | None = Field(
        default=None,
        description="A diffusers folder, or a hub id (optionally ID@REVISION), taken instead of training; null trains. "
        "The schedule must be the model's own; the keys of the training are not used.",
    )
    init: str | None = Field(
        default=None,
        description="A diffusers folder, or a hub id (optionally ID@REVISION), whose U-Net the training starts from: "
        "for few images or few epochs. `unet` is not used then; the schedule is this one. null: random weights.",
    )
    schedule: ScheduleConfig
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="What is learned.")
    unet: UNetConfig
    epochs: Positive = Field(description="Passes over the training images.")
    batch_size: Positive = Field(description="Images per optimiser step, over all processes.")
    micro_batch_size: Positive | None = Field(
        default=None,
        description="Images at once on a device, the gradients being summed; null: all of a step's. Takes less memory, "
        "changes the result by rounding alone.",
    )
    num_processes: Count = Field(
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
    sample_every: Annotated[int, Field(ge=0)] = Field(
        description="Sample grids each n epochs, one of them guided where the workflow's classifier is there by then; "
        "0: only at the end."
    )
    seed: Seed = Field(description="Seed of the initial weights, the order of the images and their noise.")

    @field_validator("pretrained", "init")
    @classmethod
    def _pretrained(cls, source: str | None) -> str | None:
        if source is not None and not source.strip():
            raise ValueError("empty; give a diffusers folder or hub id, or null to train")
        return source

    @model_validator(mode="after")
    def _one_source(self) -> DDPMConfig:
        if self.pretrained is not None and self.init is not None:
            raise ValueError("init: starts a training, and pretrained takes its place: give one of them")
        return self

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
        description="A folder, torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER, clip:ID_OR_FOLDER?texts=A|B or"
        " python:MODULE:FACTORY; null trains one. The training's settings then do not matter.",
    )
    class_map: dict[str, int | str | list[int | str]] | None = Field(
        default=None,
        description="pretrained: for each of dataset.classes the classifier's class, by name or number, or a list of"
        " classes whose probabilities add up.",
    )
    init: str | None = Field(
        default=None,
        description="torchvision:NAME or timm:NAME: the training starts from its library's weights (ImageNet's, or "
        "?weights=FILE) and a new last layer. It is shown images of its library's size and values; ?size=64 is cheaper "
        "than 224. `architecture` is not used then.",
    )
    architecture: str = Field(description="mobilenet_v3_small, small_cnn, or another torchvision model's name.")
    noised: bool = Field(description="Train on noised images (robust) or on clean ones.")
    epochs: Positive = Field(description="Passes over the training images.")
    batch_size: Positive = Field(description="Images per optimiser step.")
    optimizer: OptimizerConfig
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        description="torchvision's MobileNetV3 ships 0.01, too slow for short trainings."
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        default=10, description="A checkpoint at least this often; a killed training goes on from the last."
    )
    seed: Seed = Field(description="Seed of the initial weights, the order of the images and their noise.")

    @property
    def network(self) -> str:
        """Which network it is: a SPEC, or an architecture."""
        return self.pretrained or self.init or self.architecture

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
        if self.init is not None and self.pretrained is not None:
            raise ValueError("init: starts a training, and pretrained takes its place: give one of them")
        if self.init is not None and not re.match("(torchvision|timm):.", self.init):
            raise ValueError(f"init: {self.init!r} is neither torchvision:NAME nor timm:NAME")
        return self


class ClassifiersConfig(Section):
    """The two classifiers that guide, and the judge that grades and never guides."""

    non_robust: ClassifierConfig
    robust: ClassifierConfig
    judge: ClassifierConfig

    @model_validator(mode="after")
    def _check(self) -> ClassifiersConfig:
        for role, noised in (("non_robust", False), ("robust", True), ("judge", False)):
            if getattr(self, role).noised != noised:
                raise ValueError(f"{role}.noised: must be {str(noised).lower()}, or the role is not what it says")
        return self
