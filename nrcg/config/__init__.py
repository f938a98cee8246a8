"""The configuration: `config.yaml` merged, validated and cut into the settings of each step. Imports no torch."""

from nrcg.config.basics import ROLES, BestBy, checked_device, fingerprint
from nrcg.config.data import DatasetConfig, ImageData, SportBallsData
from nrcg.config.experiment import RULES, Config, ExperimentConfig, dataset_owner, get_experiment
from nrcg.config.messages import _models_in
from nrcg.config.methods import MethodConfig, ScaleScheduleConfig, StabilizerConfig, stabilizer_name
from nrcg.config.models import ClassifierConfig, DDPMConfig, OptimizerConfig, ScheduleConfig, UNetConfig
from nrcg.config.reading import load, merge, parse, read_yaml
from nrcg.config.schema import json_schema, write_schema
from nrcg.config.steps import (
    STEPS,
    EvaluateStep,
    ReferenceStep,
    ReportStep,
    SampleStep,
    StepSettings,
    TrainClassifierStep,
    TrainDDPMStep,
    read_step_settings,
    step_settings,
    write_step_settings,
)

__all__ = [
    "ROLES",
    "RULES",
    "STEPS",
    "BestBy",
    "ClassifierConfig",
    "Config",
    "DDPMConfig",
    "DatasetConfig",
    "EvaluateStep",
    "ExperimentConfig",
    "ImageData",
    "MethodConfig",
    "OptimizerConfig",
    "ReferenceStep",
    "ReportStep",
    "SampleStep",
    "ScaleScheduleConfig",
    "ScheduleConfig",
    "SportBallsData",
    "StabilizerConfig",
    "StepSettings",
    "TrainClassifierStep",
    "TrainDDPMStep",
    "UNetConfig",
    "_models_in",
    "checked_device",
    "dataset_owner",
    "fingerprint",
    "get_experiment",
    "json_schema",
    "load",
    "merge",
    "parse",
    "read_step_settings",
    "read_yaml",
    "stabilizer_name",
    "step_settings",
    "write_schema",
    "write_step_settings",
]
