"""Files of exactly the paper's released format, at toy size: opened by `pretrained:` and by a SPEC with a prefix."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mobilenet_v3_small

from nrcg import cli, load_classifier
from nrcg.classifiers.specs import load_for_classes
from nrcg.classifiers.storage import open_classifier
from nrcg.data.sportballs import write_sportballs
from nrcg.errors import DataError
from nrcg.files import read_record
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training.pretrained import open_pretrained

BALLS = ["baseball", "basketball", "volleyball", "soccer"]
STEPS = 6
OPTIONS = "prefix=classifier.&size=64&range=-1,1&mean=0&std=1"


def write_ddpm(folder: Path, *, pickled: bool = False, scheduler: str = "DDPMScheduler", size: int = 16) -> UNet2DModel:
    """A pipeline folder as the authors saved it: a pipeline class of their own, perhaps a scheduler of their own."""
    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    betas = DDPMScheduler(num_train_timesteps=STEPS, beta_start=0.01, beta_end=0.9)
    DDPMPipeline(unet, betas).save_pretrained(folder, safe_serialization=not pickled)
    index = folder / "model_index.json"
    changed = {"_class_name": "GuidedDDPM", "scheduler": ["diffusers", scheduler]}
    index.write_text(json.dumps(json.loads(index.read_text()) | changed))
    return unet.eval()


def network(num_logits: int, channels: int = 3, bias: bool = False) -> nn.Module:
    """MobileNetV3 small with its first convolution replaced, and batch-norm buffers that are not the initial ones."""
    torch.manual_seed(num_logits)
    module = mobilenet_v3_small(num_classes=num_logits)
    old = module.features[0][0]
    module.features[0][0] = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding, bias=bias
    )
    with torch.no_grad():
        module(torch.randn(8, channels, 32, 32))
    return module.eval()


def write_classifier(path: Path, module: nn.Module) -> Path:
    """The network's state inside a module that calls it `classifier`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"classifier.{name}": value.contiguous() for name, value in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def spec(path: Path, more: str = "") -> str:
    return f"torchvision:mobilenet_v3_small?weights={path}&{OPTIONS}{more}"


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "GuidedScheduler"])
def test_a_released_diffusion_model_predicts_the_same_noise(tmp_path, pickled, scheduler):
    unet = write_ddpm(tmp_path / "celeba", pickled=pickled, scheduler=scheduler)
    pipe, origin = open_pretrained(str(tmp_path / "celeba"))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, STEPS - 1])
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t).sample, unet(x, t).sample)
    assert isinstance(pipe, GuidedDDPMPipeline) and origin["source"] == str(tmp_path / "celeba")
    torch.testing.assert_close(pipe.scheduler.betas, torch.linspace(0.01, 0.9, STEPS))


@pytest.mark.parametrize(("num_logits", "channels", "bias"), [(1, 3, False), (4, 3, False), (1, 3, True), (2, 1, True)])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_released_classifier_gives_the_logits_of_the_original(tmp_path, num_logits, channels, bias, ending):
    module = network(num_logits, channels, bias)
    classifier = load_classifier(spec(write_classifier(tmp_path / f"golden-leaf-103.{ending}", module)))
    x = torch.rand(3, channels, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), module(x), rtol=1e-4, atol=1e-5)
    assert classifier.channels == channels


def test_the_workflow_takes_released_files_in_the_place_of_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    drawing = {"image_size": 16, "classes": BALLS, "num_train": 24, "num_val": 12, "diameter": (0.5, 0.9), "seed": 0}
    write_sportballs("data/balls", **drawing)
    write_ddpm(Path("released/sportballs"), scheduler="GuidedScheduler")
    module = network(4, bias=True)
    path = write_classifier(Path("released/sportballs/light-dew-109.safetensors"), module)
    config = json.loads((Path(__file__).parents[2] / "config.schema.json").read_text())  # JSON is there; YAML below
    assert config["title"] == "nrcg config.yaml"
    from nrcg.config import merge, read_yaml

    root = Path(__file__).parents[2]
    raw = merge(read_yaml(root / "config.yaml"), read_yaml(root / "tests/data/toy.yaml"))
    toy = raw["experiments"]["toy"]
    toy["dataset"] |= {"name": "balls", "classes": BALLS, "num_train": 24, "num_val": 12}
    toy["ddpm"] |= {"pretrained": "released/sportballs", "schedule": toy["ddpm"]["schedule"]}
    toy["classifiers"]["non_robust"] = {"pretrained": spec(path, "&classes=" + ",".join(BALLS))}
    Path("config.yaml").write_text(json.dumps(raw))
    run = ["--config", "config.yaml", "--experiment", "toy", "--data", "data/balls"]
    assert cli.main(["train-ddpm", *run, "--out", "models/toy/ddpm"]) == 0, capsys.readouterr().err
    out = "models/toy/classifiers/non_robust"
    assert cli.main(["train-classifier", *run, "--role", "non_robust", "--out", out]) == 0, capsys.readouterr().err
    assert type(DDPMPipeline.from_pretrained("models/toy/ddpm").scheduler) is DDPMScheduler
    assert read_record("models/toy/ddpm/training.json")["pretrained"]["source"] == "released/sportballs"
    saved = open_classifier(out)
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(saved(x), module(x), rtol=1e-4, atol=1e-5)
    assert saved.classes == BALLS and "images right" in capsys.readouterr().out


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def not_finite(path: Path) -> None:
    module = network(1)
    module.features[0][0].weight.data[0] = float("nan")
    write_classifier(path, module)


def no_prefix(path: Path) -> None:
    save_file({"features.0.0.weight": torch.zeros(16, 3, 3, 3)}, path)


def cut_off(path: Path) -> None:
    write_classifier(path, network(1))
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (pointer, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (not_finite, "classifier.features.0.0.weight holds values that are not finite"),
        (no_prefix, "no key begins with 'classifier.'"),
        (cut_off, "cannot be read as weights"),
        (lambda path: write_classifier(path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))), "does not fit"),
    ],
)
def test_a_damaged_or_foreign_classifier_is_one_line(tmp_path, make, words):
    make(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=words):
        load_for_classes(spec(tmp_path / "a.safetensors"), ["female", "male"])


def test_a_pointer_in_the_place_of_a_unets_weights_is_named(tmp_path):
    write_ddpm(tmp_path / "celeba")
    pointer(tmp_path / "celeba/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match="a Git LFS pointer"):
        open_pretrained(str(tmp_path / "celeba"))
