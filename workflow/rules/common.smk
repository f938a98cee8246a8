# The validated configuration and what the rules ask of it.
import os
import sys
from pathlib import Path

from nrcg import config as nrcg_config
from nrcg import tracking
from nrcg.config import ROLES
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.features import resolve_features
from nrcg.layout import FIGURES, LIKELIHOOD_FILES
from nrcg.pipeline import startup
from nrcg.pipeline.remedies import explained
from nrcg.pipeline.resources import JobResources
from nrcg.pipeline.targets import Targets
from nrcg.processes import end_with_parent

# DVC, of which Snakemake is a child, names itself in dvc.yaml: without it the workflow must not go on.
if workflow.is_main_process and (dvc := os.environ.pop("NRCG_PARENT", "")):
    end_with_parent(int(dvc))

try:
    # Snakemake reads these too, but lets a key stand twice.
    for path in workflow.configfiles:
        nrcg_config.read_yaml(path)
    CONFIG = nrcg_config.parse(dict(config), " + ".join(map(str, workflow.configfiles)))
    if workflow.is_main_process:
        startup.prepare(CONFIG, only_looks=startup.only_looks(sys.argv, workflow.output_settings.dryrun))
except (ConfigError, DataError) as error:
    sys.exit(f"nrcg: {explained(error)}")

# The jobs' tracking runs are children of one run per experiment and invocation (nrcg/tracking).
if workflow.is_main_process or "NRCG_INVOCATION" not in os.environ:
    os.environ["NRCG_INVOCATION"] = tracking.new_invocation()


envvars:
    "NRCG_INVOCATION",


wildcard_constraints:
    experiment="|".join(CONFIG.experiments),
    dataset="|".join(sorted({one.dataset.name for one in CONFIG.experiments.values()})),
    method="|".join(CONFIG.methods),
    role="|".join(ROLES),
    objective=r"[a-z0-9_]+-[a-z0-9_]+",
    explainer=r"(?!explanations\.)\w+",
    scale=r"[0-9.e+-]+",
    shard=r"\d+",


# `exec`: the job takes the shell's place and ends with Snakemake, also at kill -9. One command each: no other would run.
shell.prefix(startup.job_prefix(workflow.deployment_settings.deployment_method))


def targets(experiment):
    """The files of an experiment."""
    return Targets(CONFIG, experiment)


def files(ask):
    """Input function: some of the experiment's files, by `ask(targets, wildcards)`."""

    def of(wildcards):
        return ask(targets(wildcards.experiment), wildcards)

    return of


def manifest(wildcards):
    """The data set's manifest, which holds the checksums of its arrays."""
    return targets(wildcards.experiment).data.manifest.as_posix()


def arrays(wildcards):
    """The data set's arrays; their own times do not matter."""
    return [ancient(path.as_posix()) for path in targets(wildcards.experiment).data.arrays]


def guide(wildcards):
    """The record and weights of a method's guiding classifier, none where nothing guides."""
    role = CONFIG.methods[wildcards.method].classifier
    if role is None:
        return []
    folder = targets(wildcards.experiment).paths.classifier(role).as_posix()
    return [f"{folder}/config.json", ancient(f"{folder}/model.safetensors")]


def guide_flag(wildcards, input):
    """Params function: the classifier that guides."""
    return f"--classifier {Path(input.guide[0]).parent.as_posix()}" if input.guide else ""


def settings_file(step, part=None):
    """Params function: the file with the settings that a step reads. Its name changes when one of them changes."""

    def write(wildcards):
        values = dict(wildcards)
        experiment = values.get("experiment") or nrcg_config.dataset_owner(CONFIG, values["dataset"])
        return nrcg_config.write_step_settings(CONFIG, experiment, step, values.get(part))

    return write


def density_settings(wildcards):
    return nrcg_config.write_step_settings(CONFIG, nrcg_config.DENSITIES, "density", wildcards.density)


def setting(ask):
    """Params function: something of the experiment's settings, by `ask(settings)`."""

    def of(wildcards):
        return ask(CONFIG.experiments[wildcards.experiment])

    return of


def asked(ask):
    """Resource or threads function: what does not grow with the attempt, by `ask(resources)`."""

    def of(wildcards):
        return ask(
            JobResources(CONFIG, wildcards.experiment, workflow.non_local_exec, workflow.resource_settings.cores)
        )

    return of


def growing(ask):
    """Resource function: a retry asks for `attempt` times what `ask(resources, wildcards)` says."""

    def of(wildcards, attempt):
        return attempt * ask(JobResources(CONFIG, wildcards.experiment, workflow.non_local_exec), wildcards)

    return of


def memory(base):
    """Resource function: MB beyond a job's inputs, which may all come to lie in the memory."""

    def total(wildcards, input, attempt):
        return attempt * (base + int(input.size_mb))

    return total


def protocols(wildcards):
    """What `features: auto` finds: metrics are made anew when Inception's weights come or go."""
    evaluation = CONFIG.experiments[wildcards.experiment].evaluation
    return resolve_features(evaluation.features, evaluation.inception_dir)
