"""The experiments celeba and celebahq through Snakemake, on small data in the formats of the large ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline
from raw_images import write_celeba, write_celebahq
from workflow_runs import CONFIG, ROOT, copy_tree, planned, run_snakemake

from nrcg import config
from nrcg.data import arrays
from nrcg.guidance.trace import Trace

TOY = config.read_yaml(ROOT / "tests/data/toy.yaml")["experiments"]["toy"]
EXPERIMENTS = {"celeba": "celeba64", "celebahq": "celebahq256"}


@pytest.fixture
def tree(tmp_path) -> Path:
    return copy_tree(tmp_path)


def put_in_place(tree: Path, name: str, num_train: int, num_val: int) -> None:
    """The raw images where config.yaml expects them."""
    write = {"celeba": write_celeba, "celebahq": write_celebahq}[name]
    write(tree / "raw" / name, num_train, num_val)


def made(tree: Path, name: str) -> dict[str, int]:
    """Training images of each class of a data set made of 12 and 6 raw images."""
    data = tree / "data" / EXPERIMENTS[name]
    arrays.verify(data)
    size = CONFIG.experiments[name].dataset.image_size
    assert np.load(data / "train/images.npy", mmap_mode="r").shape == (12, size, size, 3)
    manifest = arrays.load_manifest(data)
    assert manifest["classes"] == ["female", "male"]
    return manifest["splits"]["train"]["class_counts"]


def test_the_data_sets_are_made_by_the_settings_that_ship_and_what_is_missing_is_said_in_one_line(tree):
    both = [f"data/{data}/dataset.json" for data in EXPERIMENTS.values()]
    put_in_place(tree, "celeba", 12, 6)
    run = run_snakemake(tree, *both, "--cores", "1", "--keep-going")
    assert run.returncode != 0
    (said,) = [line.strip() for line in run.stdout.splitlines() if "nrcg: raw/" in line]
    assert f"into {tree / 'raw/celebahq'}" in said and "GB" in said
    assert made(tree, "celeba") == {"female": 8, "male": 4}
    assert [path.name for path in (tree / "data/celebahq256").rglob("*") if path.is_file()] == []
    put_in_place(tree, "celebahq", 12, 6)
    run = run_snakemake(tree, *both, "--cores", "1")
    assert run.returncode == 0, run.stdout[-3000:]
    assert planned(run.stdout) == {"dataset": 1}  # what was made is made
    assert made(tree, "celebahq") == {"female": 6, "male": 6}


def pretrained_models(tree: Path, toy: dict) -> dict:
    """A diffusers folder and a torchvision state_dict as others leave them; the settings that name them."""
    import torch
    from torchvision.models import resnet18

    from nrcg.diffusion.unet import build_scheduler, build_unet

    torch.manual_seed(0)
    defaults = CONFIG.experiments["sportballs"].ddpm
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
    toy["explain"] = TOY["explain"] | {"pairs": [["female", "male"]]}
    if name == "celebahq":  # nothing is trained but the robust classifier and the judge
        toy |= pretrained_models(tree, toy)
        del toy["objectives"]
    toy["sampling"] = TOY["sampling"] | {"trace": True}
    toy["sweep"] = TOY["sweep"] | {"non_robust_x0_ema99": [1]}
    (tree / "toy.json").write_text(json.dumps({"experiments": {name: toy}}))
    run = run_snakemake(tree, name, "--cores", "2", "--configfile", "toy.json")
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
    assert "Nothing to be done" in run_snakemake(tree, name, "-n", "--configfile", "toy.json").stdout
