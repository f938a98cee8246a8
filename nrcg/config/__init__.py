"""The configuration: `config.yaml` merged, validated and cut into the settings of each step. Imports no torch."""

from nrcg.config.basics import (
    BEST_BY,
    COMPILE,
    FORWARD_NOISES,
    GRAD_MODES,
    INPUTS,
    PRECISIONS,
    PREPROCESSING,
    ROLES,
    SAMPLERS,
    STARTS,
    TARGETS,
    WEIGHTINGS,
    WEIGHTS_TYPES,
    Compile,
    GradMode,
    Input,
    checked_device,
    fingerprint,
)
from nrcg.config.data import DatasetConfig, DigitsData, ImageData, SportBallsData
from nrcg.config.dvc import dvc_yaml
from nrcg.config.experiment import RULES, Config, ExperimentConfig, dataset_owner, get_experiment
from nrcg.config.methods import (
    PUBLISHED_STEPS,
    STABILIZER_KEYS,
    MethodConfig,
    ScaleScheduleConfig,
    StabilizerConfig,
    scaled_beta,
    stabilizer_name,
)
from nrcg.config.models import (
    ClassifierConfig,
    DDPMConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    UNetConfig,
)
from nrcg.config.reading import load, merge, parse, read_yaml
from nrcg.config.reference import config_reference
from nrcg.config.schema import json_schema
from nrcg.config.steps import (
    DENSITIES,
    STEPS,
    DatasetStep,
    DensityStep,
    EvaluateExplanationsStep,
    EvaluateStep,
    ExplainStep,
    ForwardStep,
    LikelihoodStep,
    ObjectiveStep,
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
from nrcg.config.studies import (
    NEAREST,
    DensitiesConfig,
    ExplainConfig,
    ExplainMethodConfig,
    LikelihoodConfig,
    ObjectivesConfig,
)
