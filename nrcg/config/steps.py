"""What each step of the pipeline reads: these settings and no others.

A step's settings file carries a fingerprint in its name; a step runs again when that changes, and only then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from nrcg.config.basics import ROLES, Compile, Name, Precision, Role, Section, WeightsType, fingerprint
from nrcg.config.data import DatasetConfig
from nrcg.config.experiment import (
    Config,
    EvaluationConfig,
    ExperimentConfig,
    ForwardConfig,
    SamplingConfig,
    get_experiment,
)
from nrcg.config.messages import explain
from nrcg.config.methods import MethodConfig
from nrcg.config.models import ClassifierConfig, ClassifiersConfig, DDPMConfig, ObjectiveConfig, ScheduleConfig
from nrcg.config.reading import parse, read_yaml
from nrcg.config.studies import DensitiesConfig, ExplainConfig, ExplainMethodConfig, LikelihoodConfig, ObjectivesConfig
from nrcg.errors import ConfigError
from nrcg.files import atomic_write_text


class StepSettings(Section):
    """Settings of one step of one experiment."""

    experiment: Name
    TRAINS: ClassVar[bool] = False
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
    TRAINS = True
    UNAFFECTING = (
        "device",
        "compile",
        "ddpm.checkpoint_minutes",
        "ddpm.sample_every",
        "ddpm.micro_batch_size",
        "ddpm.num_processes",
    )
    device: str
    precision: Precision
    compile: Compile
    ddpm: DDPMConfig

    def fingerprint(self) -> str:
        if self.ddpm.pretrained is None:
            return super().fingerprint()
        return fingerprint({"ddpm": self.ddpm.model_dump(mode="json", include={"pretrained", "schedule"})})


class TrainClassifierStep(StepSettings):
    TRAINS = True
    UNAFFECTING = ("device", "compile", "classifier.checkpoint_minutes")
    device: str
    precision: Precision
    compile: Compile
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
    UNAFFECTING = ("device", "compile", "forward.batch_size")
    device: str
    precision: Precision
    unet_weights: WeightsType | None
    compile: Compile
    target: str
    clip_pred_x0: bool
    betas_per_step: bool
    forward: ForwardConfig


class SampleStep(StepSettings):
    # num_samples says how many shards there are; a shard that is whole stays whole. The rule passes each shard's size.
    UNAFFECTING = ("device", "compile", "sampling.batch_size", "sampling.num_samples")
    device: str
    precision: Precision
    unet_weights: WeightsType | None
    compile: Compile
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
    UNAFFECTING = ("device", "compile", "sampling.batch_size", "evaluation.best_by")
    device: str
    precision: Precision
    unet_weights: WeightsType | None
    compile: Compile
    target: str
    method: str
    guidance: MethodConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig


class LikelihoodStep(StepSettings):
    # As for samples, num_images says how many shards there are. The rule passes each shard's size.
    UNAFFECTING = ("device", "likelihood.batch_size", "likelihood.num_images")
    device: str
    precision: Precision
    likelihood: LikelihoodConfig


class ObjectiveStep(StepSettings):
    """One training objective of a grid, measured."""

    UNAFFECTING = (
        *("device", "compile", "sampling.batch_size", "forward.batch_size", "likelihood.batch_size"),
        *("sampling.num_samples", "sampling.shard_size", "likelihood.shard_size", "evaluation.best_by"),
        *("objectives.predicts", "objectives.weightings"),
    )
    device: str
    precision: Precision
    unet_weights: WeightsType | None
    compile: Compile
    target: str
    objective: str
    guidance: MethodConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    forward: ForwardConfig
    likelihood: LikelihoodConfig
    objectives: ObjectivesConfig


class ExplainStep(StepSettings):
    """One way to explain, `explainer`."""

    # Not the other methods: each has its settings in `how`.
    UNAFFECTING = (
        *("device", "compile", "explain.methods", "explain.batch_size", "explain.bits"),
        *("explain.identities", "explain.identity_threshold"),
    )
    device: str
    precision: Precision
    unet_weights: WeightsType | None
    compile: Compile
    target: str
    explainer: str
    how: ExplainMethodConfig
    explain: ExplainConfig


class EvaluateExplanationsStep(ExplainStep):
    UNAFFECTING = ("device", "compile", "explain.methods", "explain.batch_size", "evaluation.best_by")
    evaluation: EvaluationConfig


class DensityStep(StepSettings):
    """One distribution of the plane; the experiment is called densities."""

    UNAFFECTING = ("device", "densities.names")
    device: str = "cpu"  # the networks are tiny
    density: str
    densities: DensitiesConfig


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
    likelihood: LikelihoodConfig | None
    objectives: ObjectivesConfig | None
    explain: ExplainConfig | None


STEPS: dict[str, type[StepSettings]] = {
    "dataset": DatasetStep,
    "train_ddpm": TrainDDPMStep,
    "train_classifier": TrainClassifierStep,
    "forward": ForwardStep,
    "sample": SampleStep,
    "reference": ReferenceStep,
    "evaluate": EvaluateStep,
    "likelihood": LikelihoodStep,
    "objective": ObjectiveStep,
    "explain": ExplainStep,
    "evaluate_explanations": EvaluateExplanationsStep,
    "density": DensityStep,
    "report": ReportStep,
}
DENSITIES = "densities"
"""What stands for an experiment where the distributions of the plane are meant."""


def step_settings(config: Config, experiment: str, step: str, part: str | None = None) -> StepSettings:
    """The settings that one step reads.

    Args:
        step: a key of STEPS.
        part: the role for `train_classifier`, the method for `sample` and `evaluate`, the objective of a grid for
            `objective` and, where it is not the experiment's own, for `train_ddpm`; else None.

    Raises:
        ConfigError: unknown experiment, role, method or objective; a section that the experiment does not have.
    """
    if step == "density":
        return _density_step(config, part)
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
    if step == "train_ddpm" and part is not None:
        values["ddpm"] = settings.ddpm.model_copy(update={"objective": _objective(settings, part)})
    if step == "objective":
        _objective(settings, part)
        values |= {"objective": part, "guidance": config.methods[settings.objectives.method]}
    if step in ("explain", "evaluate_explanations"):
        methods = settings.explain.methods if settings.explain is not None else {}
        if part not in methods:
            raise ConfigError(
                f"explainer {part!r} is unknown; allowed: {', '.join(methods) or 'none, explain is null'}"
            )
        values |= {"explainer": part, "how": methods[part]}
    if step == "likelihood" and settings.likelihood is None:
        raise ConfigError(f"experiments.{experiment}.likelihood: null; it measures none")
    if step in ("sample", "evaluate"):
        if part not in config.methods:
            raise ConfigError(f"method {part!r} is unknown; allowed: {', '.join(config.methods)}")
        values |= {"method": part, "guidance": config.methods[part]}
    if step == "forward":
        values |= {key: getattr(settings.sampling, key) for key in ("clip_pred_x0", "betas_per_step")}
    if step == "report":
        values["classes"] = settings.dataset.classes
        values["methods"] = {name: config.methods[name] for name in settings.sweep}
    return STEPS[step](**{key: _plain(value) for key, value in values.items()})


def _density_step(config: Config, name: str | None) -> DensityStep:
    names = config.densities.names if config.densities is not None else []
    if name not in names:
        raise ConfigError(f"density {name!r} is unknown; allowed: {', '.join(names) or 'none, densities is null'}")
    return DensityStep(experiment=DENSITIES, density=name, densities=_plain(config.densities))


def _objective(settings: ExperimentConfig, name: str | None) -> ObjectiveConfig:
    """An objective of an experiment's grid. Raises ConfigError that lists those there are."""
    cells = settings.objectives.cells if settings.objectives is not None else {}
    if name not in cells:
        raise ConfigError(f"objective {name!r} is unknown; allowed: {', '.join(cells) or 'none, objectives is null'}")
    return cells[name]


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
        raise ConfigError(f"{path}: {explain(error, STEPS[step])}") from None
