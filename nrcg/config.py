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
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nrcg.errors import ConfigError

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


class DatasetConfig(Section):
    """Which images, and how they are made or read."""

    name: Name = Field(description="Folder below data/. Experiments with equal data may share it.")
    source: Literal["sportballs"] = Field(description="Where the images come from.")
    image_size: Annotated[int, Field(ge=8)] = Field(description="Height and width in pixels.")
    classes: Annotated[list[str], Field(min_length=2)] = Field(description="Class names; label = position.")
    num_train: Positive = Field(description="Number of training images.")
    num_val: Positive = Field(description="Number of validation images.")
    diameter: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="Smallest and largest ball diameter as a share of the canvas."
    )
    seed: Annotated[int, Field(ge=0)] = Field(description="Image i depends on (seed, i) alone.")

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        # The list repeats nrcg.sportballs.CLASSES: a test keeps the two in step.
        allowed = ["baseball", "basketball", "soccer", "volleyball"]
        for name in self.classes:
            if name not in allowed:
                raise ValueError(f"classes: {name!r} is no SportBalls class; allowed: {', '.join(allowed)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a class is listed twice")
        low, high = self.diameter
        if not 0 < low <= high <= 1:
            raise ValueError("diameter: two shares of the canvas, 0 < smallest <= largest <= 1")
        return self


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
    """The forward process (eq. 2): betas linear from beta_start to beta_end."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = Field(description="T, the number of diffusion steps.")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(description="beta_1 of the linear schedule.")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(description="beta_T of the linear schedule.")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.beta_start > self.beta_end:
            raise ValueError("beta_start: must not be larger than beta_end")
        return self


class DDPMConfig(Section):
    """The unconditional diffusion model."""

    schedule: ScheduleConfig
    unet: UNetConfig
    epochs: Positive = Field(description="Passes over the training images.")
    batch_size: Positive
    optimizer: OptimizerConfig
    ema_decay: Fraction = Field(description="Largest decay of the weight EMA; the saved weights are the EMA's.")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        description="A checkpoint at least this often; a killed training goes on from the last."
    )
    num_val_images: Positive = Field(description="Validation images of the loss per epoch.")
    sample_every: Annotated[int, Field(ge=0)] = Field(description="A sample grid each n epochs; 0: only at the end.")
    seed: Annotated[int, Field(ge=0)]


class ClassifierConfig(Section):
    """One classifier. `noised` images follow eq. 2, each at its own t uniform over the steps."""

    architecture: str = Field(description="mobilenet_v3_small, small_cnn, or another torchvision model's name.")
    noised: bool = Field(description="Train on noised images (robust) or on clean ones.")
    epochs: Positive
    batch_size: Positive
    optimizer: OptimizerConfig
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        description="torchvision's MobileNetV3 ships 0.01, too slow for short trainings."
    )
    seed: Annotated[int, Field(ge=0)]

    @field_validator("architecture")
    @classmethod
    def _architecture(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} is no torchvision model name; for example: mobilenet_v3_small")
        return name


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


class StabilizerConfig(Section):
    """Smoothing of the guidance gradient over the steps. Betas hold at the published 400 steps;
    for T steps the code uses beta^(400/T)."""

    name: Literal["none", "ema", "adam"] = "none"
    beta: Beta | None = Field(default=None, description="ema: momentum at 400 steps (eq. 7).")
    beta1: Beta | None = Field(default=None, description="adam: first-moment beta at 400 steps (eq. 8).")
    beta2: Beta | None = Field(default=None, description="adam: second-moment beta at 400 steps (eq. 8).")
    eps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="adam: added to the root.")

    @model_validator(mode="after")
    def _check(self) -> StabilizerConfig:
        needed = {"none": (), "ema": ("beta",), "adam": ("beta1", "beta2", "eps")}[self.name]
        for key in ("beta", "beta1", "beta2", "eps"):
            given = getattr(self, key) is not None
            if given and key not in needed:
                raise ValueError(f"{key}: stabilizer {self.name!r} has no such key; allowed: {list(needed)}")
            if not given and key in needed:
                raise ValueError(f"{key}: missing; stabilizer {self.name!r} needs {list(needed)}")
        return self


class ForwardConfig(Section):
    """The forward analysis (figs. 1 to 4)."""

    num_images: Positive = Field(description="Validation images, one noise trajectory each.")
    batch_size: Positive
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


class MethodConfig(Section):
    """What guides: a classifier, what it sees, and how its gradient is smoothed."""

    classifier: Literal["robust", "non_robust"] | None = Field(
        default=None, description="Guiding classifier; null samples without guidance."
    )
    input: Literal["x_t", "pred_x0"] = Field(
        default="x_t",
        description="The classifier sees the noisy image or the one-step denoised image (eq. 5).",
    )
    stabilizer: StabilizerConfig = StabilizerConfig()


class SamplingConfig(Section):
    """Guided sampling (algorithm 1)."""

    num_samples: Positive = Field(description="Samples per method and scale.")
    shard_size: Positive = Field(description="Samples per job.")
    batch_size: Positive = Field(description="Samples at once on the device; never changes the samples.")
    start: Literal["standard_normal", "data_mean"] = Field(
        description="x_T ~ N(0, I) as published, or around sqrt(abar_T) times the mean training image."
    )
    clip_pred_x0: bool = Field(description="Clip the one-step denoised image to [-1, 1], as published.")
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
    def _size_halves(self) -> ExperimentConfig:
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


def _explain(error: ValidationError) -> str:
    """The first mistake in one line: key, what is wrong, what is allowed."""
    errors = error.errors()
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        text = f"unknown key; allowed here: {', '.join(_fields_at(first['loc'][:-1]))}"
    elif kind == "missing":
        text = "missing; give it here or in defaults"
    elif kind in ("model_type", "dict_type"):
        text = f"should be a mapping, got {value!r}"
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
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {text}{more}"


def _fields_at(loc: tuple) -> list[str]:
    """Names of the keys allowed at a place of the configuration."""
    place: Any = Config
    for part in loc:
        if isinstance(place, type) and issubclass(place, BaseModel):
            place = place.model_fields[part].annotation
        else:  # a key of a mapping or a position in a list
            place = _inner_model(place)
    model = _inner_model(place)
    return sorted(model.model_fields) if model else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as dict[str, Model] or Model | None is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in reversed(getattr(annotation, "__args__", ())):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None


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
        message = _explain(error)
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
    """Short name in methods and tables: ema99 for EMA 0.99, adam, none."""
    return f"ema{f'{config.beta:g}'.removeprefix('0.').ljust(2, '0')}" if config.name == "ema" else config.name


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
            section.pop(key)
        return fingerprint(settings)


class DatasetStep(StepSettings):
    UNAFFECTING = ("experiment",)  # experiments may share a data set
    dataset: DatasetConfig


class TrainDDPMStep(StepSettings):
    UNAFFECTING = ("device", "ddpm.checkpoint_minutes", "ddpm.sample_every")
    device: str
    precision: Precision
    ddpm: DDPMConfig


class TrainClassifierStep(StepSettings):
    UNAFFECTING = ("device",)
    device: str
    precision: Precision
    role: Role
    classifier: ClassifierConfig
    schedule: ScheduleConfig


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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)
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
        raise ConfigError(f"{path}: {_explain(error)}") from None


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
