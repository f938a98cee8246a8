"""The experiments celeba and celebahq through Snakemake, on small data in the formats of the large ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline
from raw_images import write_celeba, write_celebahq

from nrcg import config
from nrcg.data import arrays
from nrcg.guidance.trace import Trace

ROOT = Path(__file__).parents[2]
TOY = config.read_yaml(ROOT / "tests/data/toy.yaml")["experiments"]["toy"]
EXPERIMENTS = {"celeba": "celeba64", "celebahq": "celebahq256"}


@pytest.fixture
def tree(tmp_path) -> Path:
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    (tmp_path / "profiles").symlink_to("workflow/profiles")
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def snakemake(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(Path(sys.executable).parent / "snakemake"), *arguments],
        cwd=tree,
        env=os.environ | {"NRCG_TRACKING": "off", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def put_in_place(tree: Path, name: str, num_train: int, num_val: int) -> None:
    """The raw images where config.yaml expects them."""
    write = {"celeba": write_celeba, "celebahq": write_celebahq}[name]
    write(tree / "raw" / name, num_train, num_val)


def test_what_is_missing_is_said_in_one_line_and_nothing_is_left(tree):
    for name, data in EXPERIMENTS.items():
        run = snakemake(tree, f"data/{data}/dataset.json", "--cores", "1")
        assert run.returncode != 0
        said = [line.strip() for line in run.stdout.splitlines() if "nrcg: raw/" in line]
        assert len(said) == 1 and f"into {tree / 'raw' / name}" in said[0] and "GB" in said[0]
        assert not (tree / "data" / data / "dataset.json").exists()
        assert list((tree / "data").rglob("*.npy*")) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_data_set_is_made_by_the_settings_that_ship(tree, name):
    put_in_place(tree, name, 12, 6)
    data = tree / "data" / EXPERIMENTS[name]
    run = snakemake(tree, f"data/{data.name}/dataset.json", "--cores", "1")
    assert run.returncode == 0, run.stdout[-3000:]
    arrays.verify(data)
    size = config.load(ROOT / "config.yaml").experiments[name].dataset.image_size
    assert np.load(data / "train/images.npy", mmap_mode="r").shape == (12, size, size, 3)
    manifest = arrays.load_manifest(data)
    assert manifest["classes"] == ["female", "male"]
    assert manifest["splits"]["train"]["class_counts"] == (
        {"female": 8, "male": 4} if name == "celeba" else {"female": 6, "male": 6}
    )
    assert "Nothing to be done" in snakemake(tree, "-n", f"data/{data.name}/dataset.json").stdout


def pretrained_models(tree: Path, toy: dict) -> dict:
    """A diffusers folder and a torchvision state_dict as others leave them; the settings that name them."""
    import torch
    from torchvision.models import resnet18

    from nrcg.diffusion.unet import build_scheduler, build_unet

    torch.manual_seed(0)
    defaults = config.load(ROOT / "config.yaml").experiments["sportballs"].ddpm
    settings = config.DDPMConfig.model_validate(config.merge(defaults.model_dump(), toy["ddpm"]))
    DDPMPipeline(build_unet(settings.unet, 16, 3), build_scheduler(settings.schedule)).save_pretrained(tree / "theirs")
    torch.save(resnet18(num_classes=3).state_dict(), tree / "theirs.pth")
    guide = "torchvision:resnet18?weights=theirs.pth&size=32&classes=no,yes,maybe"
    return {
        "ddpm": {"pretrained": "theirs", "schedule": toy["ddpm"]["schedule"]},
        "classifiers": toy["classifiers"]
        | {"non_robust": {"pretrained": guide, "class_map": {"female": ["no", 2], "male": "yes"}}},
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_whole_chain_at_toy_size(tree, name):
    put_in_place(tree, name, 64, 32)
    toy = {key: value for key, value in TOY.items() if key not in ("dataset", "description", "classifiers")}
    toy["classifiers"] = {role: {**TOY["classifiers"][role], "batch_size": 16} for role in config.ROLES}
    toy |= {"dataset": {"image_size": 16}, "evaluation": {"features": "judge"}}
    if name == "celebahq":  # nothing is trained but the robust classifier and the judge
        toy |= pretrained_models(tree, toy)
    toy["sampling"] = TOY["sampling"] | {"trace": True}
    toy["sweep"] = TOY["sweep"] | {"non_robust_x0_ema99": [1]}
    (tree / "toy.json").write_text(json.dumps({"experiments": {name: toy}}))
    run = snakemake(tree, name, "--cores", "2", "--configfile", "toy.json")
    assert run.returncode == 0, run.stdout[-5000:]
    if name == "celebahq":
        saved = json.loads((tree / "models/celebahq/classifiers/non_robust/config.json").read_text())
        assert saved["groups"] == [[0, 2], [1]] and saved["classes"] == ["female", "male"]
        assert not (tree / "models/celebahq/ddpm.checkpoint.pt").exists()
    results = tree / "results" / name
    assert "female" in (results / "report.html").read_text()
    summary = json.loads((results / "summary.json").read_text())
    assert set(summary) == {"unconditional", "non_robust_x0_ema99", "record_sha256"}
    setting = results / "samples/non_robust_x0_ema99/scale1"
    shard = np.load(setting / "shard0000.npy")
    assert Trace.load(setting / "shard0000.trace.npz").grad_norm.shape == (8, 5)  # T - 1 guided steps
    assert (results / "metrics/non_robust_x0_ema99/trace_scale1.png").exists()
    assert all(path.name.startswith("shard") for path in setting.iterdir()), "DVC hashed it before the evaluation"
    assert shard.shape == (8, 16, 16, 3)
    assert "Nothing to be done" in snakemake(tree, name, "-n", "--configfile", "toy.json").stdout
