"""dvc.yaml, made from config.yaml: a stage for each step, with the sections of the file that its settings read."""

from __future__ import annotations

import importlib.resources
from typing import Any

import yaml

from nrcg.config.experiment import get_experiment
from nrcg.config.reading import holds, parse
from nrcg.config.steps import STEPS

HEADER = """\
# Made by `nrcg schema --dvc`: versions of data, models and results. Each stage asks Snakemake for its files, so that
# either tool may run first: `dvc repro` after `snakemake` computes nothing anew, and the other way round. Snakemake
# takes the shell's place (exec), so that it is DVC's child and ends with it, also when that is killed by kill -9.
# `dvc repro` must not start days of training: only the experiments that --experiment names are listed here.

"""
# Sections that a field of a step's settings is made from, where they are not called like it. A device changes nothing,
# nor does compiling.
SECTIONS_OF_FIELD: dict[str, list[str]] = {
    "clip_pred_x0": ["sampling"],
    "betas_per_step": ["sampling"],
    "schedule": ["ddpm.schedule"],
    "classes": ["dataset"],
    "guidance": ["methods"],
    "how": ["explain"],
} | {field: [] for field in ("experiment", "device", "compile", "role", "method", "objective", "explainer")}


def template() -> dict[str, Any]:
    """Stages and plots that each experiment has."""
    return yaml.safe_load((importlib.resources.files(__package__) / "templates" / "dvc_stages.yaml").read_text("utf-8"))


def dvc_yaml(raw: dict, experiments: list[str]) -> str:
    """Text of dvc.yaml.

    Args:
        raw: config.yaml as read from YAML.
        experiments: names of the experiments to version.

    Raises:
        ConfigError: the configuration is invalid or has no such experiment.
    """
    config, common = parse(raw), template()
    sections = {
        name: _sections(name, stage["steps"]) + stage.get("sections", []) for name, stage in common["stages"].items()
    }
    read = sorted({section for names in sections.values() for section in names} - {"methods"})
    blocks, datasets = {}, {}
    for name in experiments:
        data = get_experiment(config, name).dataset.name
        homes = {_key(section): _home(raw, name, section) for section in read}
        blocks[name] = {"data": data} | homes
        datasets.setdefault(data, homes["dataset"])
    images = {
        "desc": "The images of data/${key}",
        "cmd": _command("data/${key}/dataset.json"),
        "params": [{"config.yaml": ["defaults.dataset", "${item}"]}],
        "outs": [{"data/${key}": {"persist": True}}],
    }
    groups, stages = {"experiments": blocks}, {"dataset": {"foreach": "${datasets}", "do": images}}
    for name, stage in common["stages"].items():
        group, section = "experiments", stage.get("asked")
        if section is not None:
            asking = [one for one in experiments if getattr(config.experiments[one], section) is not None]
            if not asking:
                continue
            if asking != experiments:
                group = f"with_{section}"
                groups[group] = {one: dict(blocks[one]) for one in asking}
        stages[name] = {"foreach": f"${{{group}}}", "do": _stage(stage, sections[name])}
    document = {
        "vars": [{"datasets": datasets}, *({group: those} for group, those in groups.items())],
        "stages": stages,
        "plots": [_plot(name, *plot.popitem()) for name in experiments for plot in map(dict, common["plots"])],
    }
    return HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=200)


def _sections(stage: str, steps: list[str]) -> list[str]:
    """Sections of config.yaml that the settings of a stage's steps are made from."""
    fields = [field for step in steps for field in STEPS[step].model_fields]
    made_from = SECTIONS_OF_FIELD | {"classifier": [f"classifiers.{stage}"]}
    return list(dict.fromkeys(section for field in fields for section in made_from.get(field, [field])))


def _home(raw: dict, experiment: str, section: str) -> str:
    """Where a section stands: in the experiment's block, else in `defaults`. DVC refuses a name that is not there."""
    return f"{f'experiments.{experiment}' if holds(raw['experiments'][experiment], section) else 'defaults'}.{section}"


def _key(section: str) -> str:
    return section.replace(".", "_")


def _command(targets: str) -> str:
    return f"exec env NRCG_PARENT=$PPID snakemake {targets} --cores all --resources gpu=1"


def _stage(stage: dict[str, Any], sections: list[str]) -> dict[str, Any]:
    params = []
    for name in sections:
        params += ["methods"] if name == "methods" else [f"defaults.{name}", f"${{item.{_key(name)}}}"]
    files = {key: stage[key] for key in ("deps", "outs", "metrics") if key in stage}
    return {"desc": stage["desc"], "cmd": _command(stage["snakemake"]), "params": [{"config.yaml": params}]} | files


def _plot(experiment: str, name: str, plot: dict[str, Any]) -> dict[str, Any]:
    label = {"scale": "guidance scale"}.get(plot["x"], plot["x"])
    files = {f"results/{experiment}/{file}": column for file, column in plot["y"].items()}
    text = {"title": f"{experiment}: {plot['title']}", "x_label": label, "template": "by_method"}
    return {f"{experiment}_{name}": plot | {"y": files} | text}
