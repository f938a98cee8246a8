"""What is made from the models of config.yaml: its JSON schema, dvc.yaml, docs/config.md. `make schema` renews them."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from nrcg import config
from nrcg.config import STEPS
from nrcg.config.dvc import template

ROOT = Path(__file__).parents[2]
RAW = config.read_yaml(ROOT / "config.yaml")
TOY = config.read_yaml(ROOT / "tests/data/toy.yaml")
ALL = yaml.safe_load(config.dvc_yaml(RAW, list(RAW["experiments"])))


def test_the_files_are_in_step_with_the_models():
    assert json.loads((ROOT / "config.schema.json").read_text()) == config.json_schema()
    assert (ROOT / "dvc.yaml").read_text() == config.dvc_yaml(RAW, ["quickstart"])
    assert (ROOT / "docs/config.md").read_text() == config.config_reference(RAW)


def test_dvc_opens_the_repository():
    """It reads every file called dvc.yaml, wherever it lies."""
    from dvc.repo import Repo

    stages = {stage.addressing for stage in Repo(ROOT).index.stages}
    assert {"dataset@sportballs20", "ddpm@quickstart", "report@quickstart"} <= stages


@pytest.mark.parametrize("raw", [RAW, config.merge(RAW, TOY)], ids=["config.yaml", "toy.yaml"])
def test_the_shipped_files_validate_against_the_schema(raw):
    validator = jsonschema.Draft202012Validator(config.json_schema())
    validator.check_schema(validator.schema)
    assert [error.message for error in validator.iter_errors(raw)] == []
    config.parse(raw)


def test_the_reference_says_of_a_key_what_it_may_be_its_default_and_its_meaning():
    lines = config.config_reference(RAW).splitlines()
    assert "| `num_train_timesteps` | whole number ≥ 2 | `400` | T, the number of diffusion steps. |" in lines
    assert lines.count("### ddpm.schedule") == 1
    assert [line for line in lines if line.startswith("| `") and line.endswith("|  |")] == []


# --- dvc.yaml ---------------------------------------------------------------------------------------------------


def stands_in_config(dotted: str) -> bool:
    place = RAW
    for key in dotted.split("."):
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True


def params(stage: str, experiment: str) -> set[str]:
    ((_, names),) = ALL["stages"][stage]["do"]["params"][0].items()
    block = ALL["vars"][1]["experiments"][experiment]
    item = {"": ALL["vars"][0]["datasets"].get(block["data"])} | {f".{key}": value for key, value in block.items()}
    return {re.sub(r"\$\{item(\.\w+)?\}", lambda match: item[match[1] or ""], name) for name in names}


@pytest.mark.parametrize("experiment", RAW["experiments"])
@pytest.mark.parametrize("stage", ALL["stages"])
def test_a_stage_reads_sections_that_stand_in_config(stage, experiment):
    """DVC refuses names that the file does not have."""
    assert [name for name in params(stage, experiment) if not stands_in_config(name)] == []


def test_a_stage_reads_the_sections_of_its_steps_where_they_stand():
    assert params("ddpm", "quickstart") == {
        "defaults.precision", "defaults.ddpm", "experiments.quickstart.ddpm",
    }  # fmt: skip
    assert params("judge", "quickstart") == {
        "defaults.precision", "defaults.classifiers.judge", "experiments.quickstart.classifiers.judge",
        "defaults.ddpm.schedule", "experiments.quickstart.ddpm.schedule",
    }  # fmt: skip
    assert {"methods", "defaults.sampling", "experiments.quickstart.sampling"} <= params("samples", "quickstart")
    # A scale more is a job more, whatever the settings of each.
    assert all("experiments.quickstart.sweep" in params(stage, "quickstart") for stage in ("samples", "metrics"))
    assert {step for stage in template()["stages"].values() for step in stage["steps"]} | {"dataset", "density"} == set(
        STEPS
    )


@pytest.mark.parametrize("stage", ALL["stages"])
def test_snakemake_is_asked_for_files_below_the_stages_outputs(stage):
    do = ALL["stages"][stage]["do"]
    command = do["cmd"].split()
    end = command.index("--cores")  # --resources takes all that follows, so targets stand before the options
    assert command[:4] == ["exec", "env", "NRCG_PARENT=$PPID", "snakemake"]
    assert command[end:] == ["--cores", "all", "--resources", "gpu=1"]
    outs = {path: options for entry in do["outs"] + do.get("metrics", []) for path, options in entry.items()}
    assert all(options["persist"] for options in outs.values()), "DVC would delete what Snakemake then makes anew"
    if stage == "samples":
        assert command[4:end] == ["${key}_samples"]
        return
    for target in command[4:end]:
        assert any(target == out or target.startswith(f"{out}/") for out in outs), target


def test_plots_have_their_template():
    (template,) = {options["template"] for plot in ALL["plots"] for options in plot.values()}
    assert (ROOT / ".dvc" / "plots" / f"{template}.json").exists()
