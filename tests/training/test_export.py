"""Models in half precision and in pieces: they open as before, and draw nearly the same."""

import json
import shutil

import pytest
import torch
from toys import TINY_SIZE, write_tiny_pipeline

from nrcg.classifiers.architectures import SmallCNN
from nrcg.classifiers.storage import open_classifier, save_classifier
from nrcg.cli import main
from nrcg.errors import DataError
from nrcg.files import sha256_file
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training.export import export_classifier, export_ddpm

SHARD = 140_000
RECORD = {
    "settings": {
        "experiment": "tiny",
        "ddpm": {
            "epochs": 7,
            "batch_size": 32,
            "schedule": {"num_train_timesteps": 6, "beta_start": 0.02, "beta_end": 0.8},
            "optimizer": {"learning_rate": 0.001},
        },
    },
    "dataset": {"dataset": "toyballs"},
}


@pytest.fixture
def ddpm(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "ddpm")
    weights = sha256_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "training.json").write_text(json.dumps(RECORD | {"sha256": weights}))
    (folder / "training.csv").write_text("epoch,step\n7,70\n")
    return folder


def classifier(folder, scale=1.0):
    torch.manual_seed(0)
    module = SmallCNN(3).requires_grad_(False)
    module.head.weight.mul_(scale)
    config = {"architecture": "small_cnn", "classes": ["a", "b", "c"], "image_size": TINY_SIZE, "note": "kept"}
    save_classifier(folder, module, config)
    return folder


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_an_exported_ddpm_opens_in_float32_with_rounded_weights(ddpm, tmp_path, dtype, bits):
    out = export_ddpm(ddpm, tmp_path / "small", dtype=dtype, max_shard_bytes=SHARD)
    before, after = (GuidedDDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in (ddpm, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == torch.float32
        # Rounding to `bits` significant bits; float16's smallest numbers are coarser.
        assert torch.allclose(after[name], value, rtol=2.0**-bits, atol=1e-7), name


def test_the_weights_lie_in_files_below_the_size_and_are_the_same_in_one_file(ddpm, tmp_path):
    pieces = export_ddpm(ddpm, tmp_path / "pieces", max_shard_bytes=SHARD)
    whole = export_ddpm(ddpm, tmp_path / "whole")
    files = sorted((pieces / "unet").glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) <= SHARD
    assert len(list((whole / "unet").glob("*.safetensors"))) == 1
    a, b = (GuidedDDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in (pieces, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_diffusers_own_pipeline_opens_it_and_samples_are_close(ddpm, tmp_path):
    from diffusers import DDPMPipeline

    out = export_ddpm(ddpm, tmp_path / "small", max_shard_bytes=SHARD)
    assert isinstance(DDPMPipeline.from_pretrained(out), DDPMPipeline)
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    first, second = (
        GuidedDDPMPipeline.from_pretrained(folder)(num_samples=2, on_step=lambda done: None).samples
        for folder in (ddpm, out)
    )
    assert 0 < (first - second).abs().max() < 0.05  # weights rounded to 8 bits, six steps


def test_the_record_and_the_card_say_what_it_is(ddpm, tmp_path):
    out = export_ddpm(ddpm, tmp_path / "small", max_shard_bytes=SHARD)
    record = json.loads((out / "training.json").read_text())
    assert record["exported"] == {
        "dtype": "bfloat16",
        "from_sha256": sha256_file(ddpm / "unet" / "diffusion_pytorch_model.safetensors"),
    }
    assert record["settings"] == RECORD["settings"]
    assert len(record["sha256"]) == 64
    assert (out / "training.csv").read_text() == (ddpm / "training.csv").read_text()
    card = (out / "README.md").read_text()
    for fact in ("# tiny: unconditional DDPM", "| epochs | 7 |", "| data set | toyballs |", "0.02 to 0.8", "8 x 8"):
        assert fact in card
    assert "None" not in card


def test_nothing_that_is_written_holds_the_folder_it_came_from(ddpm, tmp_path):
    """Neither an export nor what a user's own save_pretrained writes."""
    export_ddpm(ddpm, tmp_path / "exported")
    GuidedDDPMPipeline.from_pretrained(ddpm).save_pretrained(tmp_path / "saved")
    texts = [path for folder in ("exported", "saved") for path in (tmp_path / folder).rglob("*.json")]
    assert len(texts) >= 6
    assert [path for path in texts if str(ddpm) in path.read_text() or str(tmp_path) in path.read_text()] == []


def test_a_model_without_a_record_is_exported_too(ddpm, tmp_path):
    (ddpm / "training.json").unlink()
    out = export_ddpm(ddpm, tmp_path / "small", name="somebody's")
    card = (out / "README.md").read_text()
    assert "# somebody's: unconditional DDPM" in card
    assert "None" not in card
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert json.loads((out / "training.json").read_text())["sha256"] == sha256_file(weights)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(ddpm, tmp_path):
    with pytest.raises(DataError, match="one tensor alone takes"):
        export_ddpm(ddpm, tmp_path / "small", max_shard_bytes=100_100)
    with pytest.raises(DataError, match=r"head\.weight is not finite in float16"):
        export_classifier(classifier(tmp_path / "large", scale=1e7), tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ddpm", "large"]


def test_an_exported_classifier_opens_in_float32_with_rounded_weights(tmp_path):
    folder = classifier(tmp_path / "classifier")
    out = export_classifier(folder, tmp_path / "half")
    x = torch.rand(4, 3, TINY_SIZE, TINY_SIZE) * 2 - 1
    with torch.no_grad():
        before, after = open_classifier(folder)(x), open_classifier(out)(x)
    assert after.dtype == torch.float32
    assert torch.allclose(before, after, atol=2e-3)
    config = json.loads((out / "config.json").read_text())
    assert config["note"] == "kept"
    assert config["exported"]["dtype"] == "float16"
    assert (out / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size


def test_the_verbs_export_what_sampling_opens(ddpm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    classifier(tmp_path / "classifier")
    export = ["export-ddpm", "--ddpm", "ddpm", "--out", "small/ddpm", "--max-shard-mb", "0.14"]
    assert main(export) == 0
    assert main(["export-classifier", "--classifier", "classifier", "--out", "small/classifier"]) == 0
    shutil.rmtree(ddpm)
    guided = ["--classifier", "small/classifier", "--target", "a", "--num-samples", "2", "--precision", "float32"]
    assert main(["sample", "--ddpm", "small/ddpm", *guided, "--out", "drawn"]) == 0
    assert (tmp_path / "drawn" / "grid.png").exists()
