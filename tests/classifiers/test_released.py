"""Files of exactly the paper's released format, at toy size: opened by `pretrained:` and by a SPEC with a prefix."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import mobilenet_v3_small
from toys import toy_settings, write_balls, write_tiny_pipeline

from nrcg import cli, config, load_classifier
from nrcg.classifiers.storage import open_classifier, save_classifier
from nrcg.errors import ConfigError, DataError
from nrcg.files import read_record
from nrcg.training.pretrained import open_pretrained

ROOT = Path(__file__).parents[2]
BALLS = ["baseball", "basketball", "volleyball", "soccer"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
X = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


def write_ddpm(folder: Path, *, scheduler: str = "GuidedScheduler", old: bool = False) -> Path:
    """A pipeline folder as the authors saved it: of a pipeline class and perhaps a scheduler of their own; in the old
    layout everything lies at the top, weights as .bin."""
    write_tiny_pipeline(folder)
    index = json.loads((folder / "model_index.json").read_text())
    parts = {"_class_name": "GuidedDDPM", "scheduler": ["diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    settings = folder / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"_class_name": scheduler, "guided": True}))
    if old:
        torch.save(load_file(folder / "unet" / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
        (folder / "unet" / WEIGHTS).unlink()
        for path in (*folder.glob("unet/*"), settings):
            path.rename(folder / path.name)
        (folder / "unet").rmdir()
        (folder / "scheduler").rmdir()
    return folder


def network(num_logits: int, channels: int = 3, bias: bool = False) -> nn.Module:
    """MobileNetV3 small with its first convolution replaced, and batch-norm buffers that are not the initial ones."""
    torch.manual_seed(num_logits)
    module = mobilenet_v3_small(num_classes=num_logits)
    module.features[0][0] = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=bias)
    with torch.no_grad():
        module(torch.randn(8, channels, 32, 32))
    return module.eval()


def write_classifier(path: Path, module: nn.Module) -> str:
    """Save the network's state inside a module that calls it `classifier`; the SPEC of it."""
    state = {f"classifier.{name}": value.contiguous() for name, value in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(state, path)
    return f"torchvision:mobilenet_v3_small?weights={path}&prefix=classifier.&size=64&range=-1,1&mean=0&std=1"


# Channels-last convolutions add up in another order.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "GuidedScheduler"])
@pytest.mark.parametrize("old", [False, True])
def test_a_released_diffusion_model_predicts_the_same_noise(tmp_path, old, scheduler):
    unet = UNet2DModel.from_pretrained(write_tiny_pipeline(tmp_path / "original") / "unet")
    source = str(write_ddpm(tmp_path / "celeba", scheduler=scheduler, old=old))
    pipe, origin = open_pretrained(source)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 5])
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t).sample, unet(x, t).sample)
    assert origin == {"source": source, "revision": None} and type(pipe.scheduler) is DDPMScheduler
    torch.testing.assert_close(pipe.scheduler.betas, torch.linspace(0.02, 0.8, 6))


@pytest.mark.parametrize("library", ["diffusers", "mine"])
@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_no_code_of_the_folder_is_run(tmp_path, monkeypatch, part, library):
    """Where diffusers looks for the code of a part."""
    folder = write_ddpm(tmp_path / "celeba")
    for place in (folder, folder / part):
        (place / f"{library}.py").write_text("raise SystemExit('executed')")
    index = json.loads((folder / "model_index.json").read_text())
    index[part][0] = library
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(folder)
    assert open_pretrained(str(folder))[0].scheduler.config.num_train_timesteps == 6


@pytest.mark.parametrize(
    ("num_logits", "channels", "bias", "ending"),
    [(1, 3, False, "safetensors"), (4, 3, True, "pth"), (2, 1, True, "safetensors")],
)
def test_a_released_classifier_gives_the_logits_of_the_original(tmp_path, num_logits, channels, bias, ending):
    module = network(num_logits, channels, bias)
    classifier = load_classifier(write_classifier(tmp_path / f"golden-leaf-103.{ending}", module))
    torch.testing.assert_close(classifier(X[:, :channels]), module(X[:, :channels]), **NEAR)
    assert classifier.channels == channels
    save_classifier(tmp_path / "saved", classifier.module, classifier.record() | {"classes": ["a"] * num_logits})
    assert torch.equal(open_classifier(tmp_path / "saved")(X[:, :channels]), classifier(X[:, :channels]))


def test_the_workflow_takes_released_files_in_the_place_of_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    write_balls("data/balls", 12, 8, 8, classes=BALLS)
    write_ddpm(Path("released"))
    module = network(4, bias=True)
    spec = write_classifier(Path("released/light-dew-109.safetensors"), module) + "&classes=" + ",".join(BALLS)
    schedule = {"num_train_timesteps": 6, "beta_start": 0.02, "beta_end": 0.8}
    dataset = {"name": "balls", "classes": BALLS, "image_size": 8}
    raw = toy_settings(dataset=dataset, ddpm={"pretrained": "released", "schedule": schedule})
    raw["experiments"]["toy"]["classifiers"]["non_robust"] = {"pretrained": spec}
    Path("config.yaml").write_text(json.dumps(raw))
    run = ["--config", "config.yaml", "--experiment", "toy", "--data", "data/balls"]
    assert cli.main(["train-ddpm", *run, "--out", "ddpm"]) == 0, capsys.readouterr().err
    assert cli.main(["train-classifier", *run, "--role", "non_robust", "--out", "guide"]) == 0, capsys.readouterr().err
    assert "% of the validation images right" in capsys.readouterr().out
    assert type(DDPMPipeline.from_pretrained("ddpm").scheduler) is DDPMScheduler
    assert read_record("ddpm/training.json")["pretrained"]["source"] == "released"
    saved = open_classifier("guide")
    torch.testing.assert_close(saved(X), module(X), **NEAR)
    assert saved.classes == BALLS


def test_the_documented_blocks_are_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/released.md").read_text(), re.S)
    found = config.parse(config.merge(config.read_yaml(ROOT / "config.yaml"), yaml.safe_load(block))).experiments
    for name in ("celeba_released", "sportballs_released"):
        for role in ("non_robust", "robust"):
            spec = getattr(found[name].classifiers, role).pretrained
            assert spec.split("classes=")[1].split(",") == found[name].dataset.classes


# --- Files that are not what they should be -------------------------------------------------------------------------


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def not_finite(path: Path) -> None:
    module = network(1)
    module.features[0][0].weight.data[0] = float("nan")
    write_classifier(path, module)


def cut_off(path: Path) -> None:
    write_classifier(path, network(1))
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (pointer, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (not_finite, "classifier.features.0.0.weight holds values that are not finite"),
        (lambda path: save_file({"conv.weight": torch.zeros(2, 3, 3, 3)}, path), "no key begins with 'classifier.'"),
        (cut_off, "cannot be read as weights"),
        (lambda path: write_classifier(path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))), "does not fit"),
    ],
)
def test_a_classifier_that_cannot_be_taken_is_one_line(tmp_path, make, words):
    make(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=words) as caught:
        load_classifier(f"torchvision:mobilenet_v3_small?weights={tmp_path}/a.safetensors&prefix=classifier.")
    assert "\n" not in str(caught.value)


def leave_out_a_weight(folder: Path) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    save_file({key: value for key, value in state.items() if key != "conv_in.weight"}, folder / "unet" / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: pointer(folder / "unet" / WEIGHTS), "a Git LFS pointer"),
        (lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"\xff" * 64), "incomplete or damaged"),
        (lambda folder: (folder / "model_index.json").unlink(), "incomplete or damaged .*model_index.json"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").write_text("{}"), "states? no betas"),
        (leave_out_a_weight, "its weights lack conv_in.weight, which would stay random"),
    ],
)
def test_a_diffusion_model_that_cannot_be_taken_is_one_line(tmp_path, damage, words):
    damage(write_ddpm(tmp_path / "celeba"))
    with pytest.raises((DataError, ConfigError), match=words) as caught:
        open_pretrained(str(tmp_path / "celeba"))
    assert "\n" not in str(caught.value)
