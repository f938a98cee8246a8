"""dvc.yaml stays in step with config.yaml and with what each step reads."""

import re
from pathlib import Path

import pytest
import yaml

from nrcg import config
from nrcg.config import ROLES, STEPS

ROOT = Path(__file__).parents[2]
DVC_TEXT = (ROOT / "dvc.yaml").read_text()
RAW = config.read_yaml(ROOT / "config.yaml")
CONFIG = config.parse(RAW)

# The pipeline's steps that a stage covers.
COVERED = {
    "dataset": ["dataset"],
    "ddpm": ["train_ddpm"],
    **{role: ["train_classifier"] for role in ROLES},
    "forward": ["forward"],
    "samples": ["sample"],
    "metrics": ["reference", "evaluate"],
    "report": ["report"],
}
# What a step's settings field is made from. A device changes no result.
READS = {
    "clip_pred_x0": ["sampling"],
    "classifier": [],  # of one role: see below
    "schedule": ["ddpm.schedule"],
    "classes": ["dataset"],
    "guidance": ["methods"],
    "experiment": [],
    "device": [],
    "role": [],
    "method": [],
}
SECTIONS = [
    "dataset",
    "description",
    "target",
    "precision",
    "ddpm",
    "ddpm.schedule",
    "classifiers",
    *(f"classifiers.{role}" for role in ROLES),
    "forward",
    "sampling",
    "evaluation",
    "sweep",
]


def variables(text: str) -> tuple[dict, dict]:
    first, second = yaml.safe_load(text)["vars"]
    return first["datasets"], second["experiments"]


def with_examples(text: str) -> str:
    """dvc.yaml with the experiments that stand there as comments."""
    head, rest = text.split("\nstages:\n")
    return re.sub(r"^( {6})# ( *\w+:.*)$", r"\1\2", head, flags=re.MULTILINE) + "\nstages:\n" + rest


DATASETS, EXPERIMENTS = variables(DVC_TEXT)
ALL_DATASETS, ALL_EXPERIMENTS = variables(with_examples(DVC_TEXT))
STAGES = yaml.safe_load(DVC_TEXT)["stages"]


def home(name: str, section: str) -> str:
    """Where a section of an experiment stands: its own block, or `defaults`."""
    place = RAW["experiments"][name]
    for key in section.split("."):
        place = place.get(key) if isinstance(place, dict) else None
        if place is None:
            return "defaults"
    return f"experiments.{name}"


def expected_block(name: str) -> dict[str, str]:
    block = {"data": CONFIG.experiments[name].dataset.name}
    for section in SECTIONS:
        *above, key = section.split(".")
        block[key] = ".".join([home(name, section), *above])
    return block


def params_of(stage: str, item: str | dict, key: str) -> list[str]:
    (params,) = STAGES[stage]["do"]["params"]
    return [resolve(name, item, key) for name in params["config.yaml"]]


def resolve(text: str, item: str | dict, key: str) -> str:
    text = text.replace("${key}", key)
    if isinstance(item, str):
        return text.replace("${item}", item)
    return re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match[1]], text)


def stands_in_config(dotted: str) -> bool:
    place = RAW
    for key in dotted.split("."):
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True


def test_only_the_quickstart_is_versioned_unless_asked_for():
    assert list(EXPERIMENTS) == ["quickstart"]
    assert set(ALL_EXPERIMENTS) == set(CONFIG.experiments)


@pytest.mark.parametrize("name", ALL_EXPERIMENTS)
def test_an_experiments_block_says_where_its_sections_stand(name):
    assert name in CONFIG.experiments, f"dvc.yaml lists {name}, which config.yaml does not have"
    expected = expected_block(name)
    assert ALL_EXPERIMENTS[name] == expected, (
        f"dvc.yaml, vars, should say:\n{yaml.dump({name: expected}, sort_keys=False)}"
    )


def test_each_dataset_is_that_of_an_experiment():
    assert set(ALL_DATASETS) == {block["data"] for block in ALL_EXPERIMENTS.values()}
    assert set(DATASETS) == {block["data"] for block in EXPERIMENTS.values()}
    for folder, place in ALL_DATASETS.items():
        users = [name for name, block in ALL_EXPERIMENTS.items() if block["data"] == folder]
        assert place in {home(name, "dataset") for name in users}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_each_section_that_its_steps_read(stage):
    fields = {field for step in COVERED[stage] for field in STEPS[step].model_fields}
    sections = {section for field in fields for section in READS.get(field, [field])}
    items = ALL_DATASETS if stage == "dataset" else ALL_EXPERIMENTS
    for key, item in items.items():
        params = params_of(stage, item, key)
        for section in sections | ({f"classifiers.{stage}"} & set(SECTIONS)):
            if section == "methods":
                assert "methods" in params
                continue
            place = item if stage == "dataset" else home(key, section)
            assert {f"defaults.{section}", f"{place}.{section}"} <= set(params)
        missing = [name for name in params if not stands_in_config(name)]
        assert not missing, f"DVC refuses names that config.yaml does not have: {missing}"


def test_every_step_is_covered():
    assert {step for steps in COVERED.values() for step in steps} == set(STEPS)
    assert set(COVERED) == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_snakemake_is_asked_for_files_below_the_stages_outputs(stage):
    do = STAGES[stage]["do"]
    command = do["cmd"].split()
    end = command.index("--cores")  # --resources takes all that follows, so targets stand before the options
    prefix = ["exec", "env", "NRCG_PARENT=$PPID"]
    assert command[:4] == [*prefix, "snakemake"] and command[end:] == ["--cores", "all", "--resources", "gpu=1"]
    outs = {path: options for entry in do["outs"] + do.get("metrics", []) for path, options in entry.items()}
    if stage == "samples":
        assert command[4:end] == ["${key}_samples"]
        return
    for target in command[4:end]:
        assert any(target == out or target.startswith(f"{out}/") for out in outs), target
    assert all(options["persist"] for options in outs.values()), "DVC would delete what Snakemake then makes anew"


def test_plots_read_files_of_listed_experiments():
    plots = yaml.safe_load(DVC_TEXT)["plots"]
    for plot in plots:
        for options in plot.values():
            for path in options["y"]:
                assert Path(path).parent.name in EXPERIMENTS
            assert (ROOT / ".dvc" / "plots" / f"{options['template']}.json").exists()
