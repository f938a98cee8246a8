"""Files of exactly the released format, at toy size: imported, opened again, and compared with their originals."""

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torcheval.metrics import FrechetInceptionDistance
from torchvision.models import mobilenet_v3_small

from nrcg import cli, released
from nrcg.classifiers.storage import load_classifier
from nrcg.config import load, merge, parse, read_yaml
from nrcg.data.sportballs import write_sportballs
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.frechet import FeatureStatistics
from nrcg.files import weights_hash
from nrcg.foreign import read_ddpm, read_torcheval_state
from nrcg.released import Item, find_released, import_released, parse_assignment

ROOT = Path(__file__).parent.parent
STEPS = 6
BALLS = ["baseball", "basketball", "volleyball", "soccer"]


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NRCG_TRACKING", "off")


# --- Files as the authors saved them ----------------------------------------------------------------------------


def write_ddpm(
    folder: Path, size: int = 64, pipeline: str = "DDPMPipeline", pickled: bool = False, **scheduler
) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

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
    settings = {"num_train_timesteps": STEPS, "beta_start": 0.01, "beta_end": 0.9} | scheduler
    DDPMPipeline(unet, DDPMScheduler(**settings)).save_pretrained(folder, safe_serialization=not pickled)
    change_json(folder / "model_index.json", _class_name=pipeline)
    return folder


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Wrapper(nn.Module):
    """The released classifiers were saved inside such a module."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier


def network(num_logits: int, channels: int = 3, bias: bool = False, seed: int = 0) -> nn.Module:
    """MobileNetV3 small with its first convolution replaced, and batch-norm buffers that are not the initial ones."""
    torch.manual_seed(seed)
    module = mobilenet_v3_small(num_classes=num_logits)
    old = module.features[0][0]
    module.features[0][0] = nn.Conv2d(
        channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding, bias=bias or old.bias
    )
    with torch.no_grad():
        module(torch.randn(8, channels, 32, 32))
    return module.eval()


def write_classifier(path: Path, num_logits: int, seed: int = 0, **first_conv) -> nn.Module:
    module = network(num_logits, seed=seed, **first_conv)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(Wrapper(module).state_dict(), path, metadata={"format": "pt"})
    return module


def write_state(path: Path, dim: int = 2048, double: bool = True, count: int = 24, seed: int = 0) -> np.ndarray:
    """torcheval's own state of some random features (N, dim), which are returned."""
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, dim))
    metric = FrechetInceptionDistance(model=model, feature_dim=dim)
    if double:  # as the released script does
        metric.real_sum, metric.real_cov_sum = metric.real_sum.double(), metric.real_cov_sum.double()
    for part in images.split(8):
        metric.update(part, is_real=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(metric.state_dict(), path)
    with torch.no_grad():
        return model(images).numpy()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone: classifiers and statistics lie inside the pipelines' folders."""
    root = tmp_path_factory.mktemp("clone")
    models = root / "pretrained_models"
    write_ddpm(models / "celeba")
    write_ddpm(models / "sportballs", pipeline="GuidedDDPMPipeline", pickled=True)
    write_classifier(models / "celeba/classic-aardvark-104.safetensors", 1, seed=1)
    write_classifier(models / "celeba/golden-leaf-103.safetensors", 1, seed=2)
    write_classifier(models / "sportballs/light-dew-109.safetensors", 4, seed=3)
    write_classifier(models / "sportballs/sleek-river-105.safetensors", 4, seed=4)
    write_classifier(models / "celebahq/summer-snowflake-110.safetensors", 1, seed=5)
    write_state(models / "celeba/fid/celeba_fid_real_24_class20.pt")
    torch.save({"weights": torch.zeros(2)}, models / "celeba/other.pt")
    (root / ".git/lfs").mkdir(parents=True)
    (root / ".git/lfs/copy.safetensors").write_text("not to be read")
    return root


@pytest.fixture(scope="module")
def imported(clone, tmp_path_factory) -> tuple[Path, released.Imported]:
    models = tmp_path_factory.mktemp("imported") / "models"
    done = import_released(clone, models, data=models.parent / "data", experiments={}, versions={"nrcg": "1"})
    return models, done


# --- A whole clone ----------------------------------------------------------------------------------------------


def test_everything_of_a_clone_comes_where_the_workflow_looks_for_it(imported, clone):
    models, done = imported
    assert {(kind, source.removeprefix("pretrained_models/"), target) for kind, source, target, _ in done.rows} == {
        ("ddpm", "celeba", f"{models}/celeba/ddpm"),
        ("ddpm", "sportballs", f"{models}/sportballs/ddpm"),
        ("classifier non_robust", "celeba/classic-aardvark-104.safetensors", f"{models}/celeba/classifiers/non_robust"),
        ("classifier robust", "celeba/golden-leaf-103.safetensors", f"{models}/celeba/classifiers/robust"),
        (
            "classifier non_robust",
            "sportballs/light-dew-109.safetensors",
            f"{models}/sportballs/classifiers/non_robust",
        ),
        (
            "classifier non_robust",
            "celebahq/summer-snowflake-110.safetensors",
            f"{models}/celebahq/classifiers/non_robust",
        ),
        (
            "reference",
            "celeba/fid/celeba_fid_real_24_class20.pt",
            f"{models}/celeba/reference/fid_torcheval_female.npz",
        ),
    }
    assert {Path(name).name for name, _ in done.ignored} == {"sleek-river-105.safetensors", "other.pt"}
    assert all(Path(target).exists() for *_, target, _ in done.rows)
    assert list(models.rglob(".*")) == []
    notes = "\n".join(done.notes)
    assert "pipeline GuidedDDPMPipeline written as DDPMPipeline" in notes
    assert "classes are taken to be baseball, basketball, volleyball, soccer, in this order" in notes
    assert "no `start: data_mean`" in notes


@pytest.mark.parametrize("experiment", ["celeba", "sportballs"])
def test_diffusers_opens_the_imported_model_and_it_predicts_the_same_noise(imported, clone, experiment):
    from diffusers import DDPMPipeline, UNet2DModel

    folder = imported[0] / experiment / "ddpm"
    pipe = DDPMPipeline.from_pretrained(folder)
    original = UNet2DModel.from_pretrained(clone / "pretrained_models" / experiment / "unet")
    x, t = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, STEPS - 1])
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t).sample, original(x, t).sample)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert pipe.scheduler.config.num_train_timesteps == STEPS
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    record = json.loads((folder / "training.json").read_text())
    source = next((clone / "pretrained_models" / experiment / "unet").glob("diffusion_pytorch_model.*"))
    assert record["imported"] == {
        "path": str(clone / "pretrained_models" / experiment),
        "sha256": released.sha256_file(source),
    }
    assert weights_hash(folder) == released.sha256_file(folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("source", "target", "num_logits", "classes"),
    [
        ("celeba/classic-aardvark-104", "celeba/classifiers/non_robust", 1, ["female", "male"]),
        ("celeba/golden-leaf-103", "celeba/classifiers/robust", 1, ["female", "male"]),
        ("sportballs/light-dew-109", "sportballs/classifiers/non_robust", 4, BALLS),
    ],
)
def test_an_imported_classifier_gives_the_logits_of_the_original(imported, clone, source, target, num_logits, classes):
    original = Wrapper(mobilenet_v3_small(num_classes=num_logits)).eval()
    original.load_state_dict(load_file(clone / f"pretrained_models/{source}.safetensors"))
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifier = load_classifier(imported[0] / target)
    with torch.no_grad():
        # Channels-last convolutions add up in another order.
        torch.testing.assert_close(classifier(x), original.classifier(x), rtol=1e-4, atol=1e-5)
    assert classifier.classes == classes


def test_imported_statistics_are_those_of_the_features(imported, clone):
    path = imported[0] / "celeba/reference/fid_torcheval_female.npz"
    state = torch.load(clone / "pretrained_models/celeba/fid/celeba_fid_real_24_class20.pt", weights_only=True)
    statistics = FeatureStatistics.load(path)
    assert statistics.n == 24
    total, outer = state["real_sum"].numpy(), (state["real_cov_sum"] + state["real_cov_sum"].T).numpy() / 2
    np.testing.assert_allclose(statistics.mean, total / statistics.n, rtol=1e-12)
    np.testing.assert_allclose(
        statistics.cov, (outer - np.outer(total, total) / statistics.n) / (statistics.n - 1), rtol=1e-9, atol=1e-12
    )
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["protocol"], record["class"], record["num_images"]) == ("torcheval", "female", 24)
    assert record["sha256"] == released.sha256_file(path)


@pytest.mark.parametrize("target", ["female", "male"])
def test_the_sampler_runs_on_imported_folders(imported, tmp_path, target, capsys):
    models = imported[0] / "celeba"
    arguments = ["sample", "--ddpm", models / "ddpm", "--classifier", models / "classifiers/non_robust"]
    arguments += ["--target", target, "--scale", "5", "--stabilizer", "ema:0.9", "--num-samples", "2", "--seed", "0"]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "out"), "--threads", "1"]) == 0, capsys.readouterr()
    assert np.load(tmp_path / "out/samples.npy").shape == (2, 64, 64, 3)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["nonfinite"] == 0


def test_the_two_targets_of_one_logit_pull_apart(imported):
    """log p(female) and log p(male) of one logit have gradients of opposite sign."""
    from nrcg.guidance.guidance import ClassifierGuidance

    classifier = load_classifier(imported[0] / "celeba/classifiers/robust")
    schedule, x = Schedule.linear(4, 0.01, 0.5), torch.zeros(1, 3, 64, 64)
    gradients = [
        ClassifierGuidance(classifier, target, input="x_t").gradient(x, 2, lambda x, t: x, schedule).grad
        for target in (0, 1)
    ]
    assert float((gradients[0] * gradients[1]).sum()) < 0


# --- Deciding what a file is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "experiment", "role"),
    [
        ("celeba/robust.safetensors", "celeba", "robust"),
        ("CelebA_HQ/Non-Robust/model.safetensors", "celebahq", "non_robust"),
        ("celeba/hq/nonrobust.safetensors", "celebahq", "non_robust"),
        ("celeba-hq_noisy.safetensors", "celebahq", "robust"),
        ("sport_balls/non_robust/x.safetensors", "sportballs", "non_robust"),
        ("celeba/balls_robust.safetensors", "sportballs", "robust"),  # the nearest name counts
    ],
)
def test_experiment_and_role_are_read_from_the_path(tmp_path, name, experiment, role):
    root = tmp_path / "clone"
    write_classifier(root / name, 1)
    assert find_released(root).items == [Item(root / name, experiment, role)]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("celeba/celeba_fid_real_50176.pt", "celeba/reference/fid_torcheval.npz"),
        ("celeba/celeba_fid_real_50176_class20.pt", "celeba/reference/fid_torcheval_female.npz"),
        ("celebahq/fid_real_1024_class20_0.pt", "celebahq/reference/fid_torcheval_female.npz"),
        ("celebahq/fid_real_1024_class20_1.pt", "celebahq/reference/fid_torcheval_male.npz"),
        ("balls/fid_class0_0.pt", "sportballs/reference/fid_torcheval_baseball.npz"),
        ("balls/fid_soccer.pt", "sportballs/reference/fid_torcheval_soccer.npz"),
    ],
)
def test_the_class_of_statistics_is_read_from_the_name(tmp_path, name, target):
    write_state(tmp_path / "clone" / name, dim=4)
    assert [str(item.target) for item in find_released(tmp_path / "clone").items] == [target]


def test_assignments_go_before_names(tmp_path):
    root = tmp_path / "clone"
    write_classifier(root / "a.safetensors", 1)
    write_classifier(root / "celeba/robust.safetensors", 1)
    write_state(root / "stats.pt", dim=4)
    write_ddpm(root / "net", size=8)
    said = ["a.safetensors=celeba/robust", "celeba/robust.safetensors=ignore", "stats.pt=mine/reference:cat"]
    plan = find_released(root, assign=[*said, "net/model_index.json=mine/ddpm"])
    assert {(item.path.name, str(item.target)) for item in plan.items} == {
        ("a.safetensors", "celeba/classifiers/robust"),
        ("stats.pt", "mine/reference/fid_torcheval_cat.npz"),
        ("net", "mine/ddpm"),
    }
    assert plan.ignored == [(root / "celeba/robust.safetensors", "as --assign says")]


def test_a_model_of_256_pixels_is_celebahq_also_in_the_layout_of_old_pipelines(tmp_path):
    """Old pipelines keep the parts' files in the folder itself, and name the weights of attention otherwise."""
    root, renamed = tmp_path / "hub", {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    write_ddpm(root / "net", size=256)
    for part in ("unet", "scheduler"):
        for path in (root / "net" / part).iterdir():
            path.rename(root / "net" / path.name)
        (root / "net" / part).rmdir()
    weights = root / "net/diffusion_pytorch_model.safetensors"
    new = load_file(weights)
    old = {}
    for name, value in new.items():
        for now, before in renamed.items():
            name = name.replace(f"{now}.", f"{before}.")
        old[name] = value
    assert old.keys() != new.keys()
    save_file(old, weights)
    change_json(root / "net/config.json", _diffusers_version="0.1.1")
    assert find_released(root).items == [Item(root / "net", "celebahq", "ddpm")]
    state = read_ddpm(root / "net").unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in new.items())


@pytest.mark.parametrize(
    "text",
    ["a.pt", "a.pt=celeba", "a.pt=celeba/guide", "a.pt=../x/robust", "a.pt=celeba/reference:../x", "b.pt=ignore"],
)
def test_an_assignment_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "a.pt").touch()
    with pytest.raises(ConfigError, match="--assign"):
        parse_assignment(text, tmp_path)


# --- The formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "bias"), [(1, False), (1, True), (3, True)])
def test_another_first_convolution_is_kept(tmp_path, channels, bias):
    original = write_classifier(tmp_path / "clone/celeba_robust.safetensors", 1, channels=channels, bias=bias)
    import_released(tmp_path / "clone", tmp_path / "models", data=tmp_path, experiments={})
    classifier = load_classifier(tmp_path / "models/celeba/classifiers/robust")
    x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), original(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_torchevals_sums_are_ours(tmp_path, double):
    features = write_state(tmp_path / "a.pt", dim=12, double=double, count=40).astype(np.float64)
    found, expected = read_torcheval_state(tmp_path / "a.pt", dim=12), FeatureStatistics.from_features(features)
    tolerance = 1e-5  # float32 features; torcheval multiplies them in float32 in either case
    assert found.n == expected.n
    np.testing.assert_allclose(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=0, atol=tolerance * np.abs(expected.cov).max() * 10)


def test_a_schedulers_subclass_is_taken_for_the_ddpm_it_is(tmp_path):
    write_ddpm(tmp_path)
    path = tmp_path / "scheduler/scheduler_config.json"
    change_json(path, _class_name="GuidedScheduler", extra=1)
    ddpm = read_ddpm(tmp_path)
    assert type(ddpm.scheduler).__name__ == "DDPMScheduler"
    assert ddpm.changes == ["scheduler GuidedScheduler written as DDPMScheduler"]
    torch.testing.assert_close(ddpm.scheduler.betas, torch.linspace(0.01, 0.9, STEPS))


# --- What is refused, in one line -------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path: Path, name: str) -> None:
    state = load_file(path)
    state[name].view(-1)[0] = float("nan")
    save_file(state, path)


class Runs:
    def __reduce__(self):
        return (print, ("code was run",))


def change_state(path: Path, **values) -> None:
    write_state(path, dim=2048, count=2)
    torch.save(torch.load(path, weights_only=True) | values, path)


def unnamed(root: Path) -> None:
    write_classifier(root / "a.safetensors", 1)


def no_role(root: Path) -> None:
    write_classifier(root / "celeba/b.safetensors", 1)


def damaged_weights(root: Path) -> None:
    cut(write_ddpm(root / "celeba") / "unet/diffusion_pytorch_model.safetensors")


def damaged_classifier(root: Path) -> None:
    write_classifier(root / "celeba_robust.safetensors", 1)
    cut(root / "celeba_robust.safetensors")


def nan_weights(root: Path) -> None:
    spoil(write_ddpm(root / "celeba") / "unet/diffusion_pytorch_model.safetensors", "conv_in.weight")


def nan_classifier(root: Path) -> None:
    write_classifier(root / "celeba_robust.safetensors", 1)
    spoil(root / "celeba_robust.safetensors", "classifier.features.0.1.running_var")


def pickled_code(root: Path) -> None:
    root.mkdir()
    (root / "celeba_real.pt").write_bytes(pickle.dumps(Runs(), protocol=2))


def pickled_code_in_torch_file(root: Path) -> None:
    root.mkdir()
    torch.save({"real_sum": Runs()}, root / "celeba_real.pt")


def pickled_unet(root: Path) -> None:
    torch.save(Runs(), write_ddpm(root / "celeba", pickled=True) / "unet/diffusion_pytorch_model.bin")


def cut_statistics(root: Path) -> None:
    write_state(root / "celeba_real.pt", dim=64)
    cut(root / "celeba_real.pt")


def pointer(root: Path) -> None:
    root.mkdir()
    (root / "celeba_robust.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def pointer_unet(root: Path) -> None:
    path = write_ddpm(root / "celeba") / "unet/diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_weights(root: Path) -> None:
    (write_ddpm(root / "celeba") / "unet/diffusion_pytorch_model.safetensors").unlink()


def no_unet_config(root: Path) -> None:
    (write_ddpm(root / "celeba") / "unet/config.json").unlink()


def other_width(root: Path) -> None:
    change_json(write_ddpm(root / "celeba") / "unet/config.json", block_out_channels=[8, 16])


def other_depth(root: Path) -> None:
    change_json(write_ddpm(root / "celeba") / "unet/config.json", layers_per_block=2)


def fewer_layers(root: Path) -> None:
    shutil.copytree(write_ddpm(root / "other"), root / "celeba")
    shutil.rmtree(root / "other")
    path = root / "celeba/unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"spare.weight": torch.zeros(1)}, path)


def other_size(root: Path) -> None:
    write_ddpm(root / "celeba", size=32)


def latent_model(root: Path) -> None:
    change_json(write_ddpm(root / "celeba") / "model_index.json", vae=["diffusers", "AutoencoderKL"])


def euler(root: Path) -> None:
    change_json(write_ddpm(root / "celeba") / "scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler")


def no_betas(root: Path) -> None:
    path = write_ddpm(root / "celeba") / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "GuidedScheduler", "num_train_timesteps": 400}))


def thresholding(root: Path) -> None:
    write_ddpm(root / "celeba", thresholding=True)


def other_network(root: Path) -> None:
    root.mkdir()
    save_file(Wrapper(nn.Linear(2, 2)).state_dict(), root / "celeba_robust.safetensors")


def large_network(root: Path) -> None:
    from torchvision.models import mobilenet_v3_large

    root.mkdir()
    save_file(Wrapper(mobilenet_v3_large(num_classes=1)).state_dict(), root / "celeba_robust.safetensors")


def five_classes(root: Path) -> None:
    write_classifier(root / "balls_robust.safetensors", 5)


def twice(root: Path) -> None:
    write_classifier(root / "celeba/a/robust.safetensors", 1)
    write_classifier(root / "celeba/b/robust.safetensors", 1)


def other_features(root: Path) -> None:
    write_state(root / "celeba_real.pt", dim=64)


def one_image(root: Path) -> None:
    change_state(root / "celeba_real.pt", num_real_images=torch.tensor(1))


def infinite_sum(root: Path) -> None:
    change_state(root / "celeba_real.pt", real_sum=torch.full((2048,), float("inf")))


def lopsided(root: Path) -> None:
    outer = torch.eye(2048)
    outer[0, 1] = 0.5
    change_state(root / "celeba_real.pt", real_cov_sum=outer)


def indefinite(root: Path) -> None:
    change_state(root / "celeba_real.pt", real_sum=torch.ones(2048) * 5, real_cov_sum=torch.eye(2048))


def unknown_class(root: Path) -> None:
    write_state(root / "celeba_class_x.pt", dim=4)


def no_files(root: Path) -> None:
    root.mkdir()
    (root / "readme.md").write_text("nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unnamed, "cannot tell from the path what these are: a.safetensors; say it by --assign FILE=EXPERIMENT/ROLE"),
        (no_role, "what these are: celeba/b.safetensors; .* --assign celeba/b.safetensors=celeba/robust"),
        (damaged_weights, "diffusion_pytorch_model.safetensors: damaged"),
        (damaged_classifier, "celeba_robust.safetensors: damaged .*; fetch it anew"),
        (nan_weights, "conv_in.weight holds values that are not finite"),
        (nan_classifier, "features.0.1.running_var holds values that are not finite"),
        (pickled_code, "celeba_real.pt: refused, it holds more than tensors"),
        (pickled_code_in_torch_file, "celeba_real.pt: refused, it holds more than tensors"),
        (pickled_unet, "diffusion_pytorch_model.bin: refused, it holds more than tensors"),
        (cut_statistics, "celeba_real.pt: damaged"),
        (pointer, "celeba_robust.safetensors: a Git LFS pointer, not the file itself; run git lfs pull"),
        (pointer_unet, "model.safetensors: a Git LFS pointer, not the file itself; run git lfs pull"),
        (no_weights, "unet: holds none of diffusion_pytorch_model.safetensors, diffusion_pytorch_model.bin"),
        (no_unet_config, "unet/config.json: not found"),
        (other_width, "not the weights of its config.json"),
        (other_depth, "lacks .* of its config.json"),
        (fewer_layers, "has unknown spare.weight"),
        (other_size, "sample_size 32, but celeba has images of 64; .*--assign"),
        (latent_model, "no unconditional DDPM: has scheduler, unet, vae"),
        (euler, "scheduler EulerDiscreteScheduler is not supported; allowed: DDPMScheduler"),
        (no_betas, "scheduler GuidedScheduler is not supported"),
        (thresholding, "scheduler thresholding True is not supported"),
        (other_network, "no MobileNetV3 small: features.0.0.weight or classifier.3.weight is missing"),
        (large_network, "no MobileNetV3 small \\("),
        (five_classes, "the names of its 5 classes are not known; give them: --classes sportballs=NAME,NAME"),
        (twice, "would both become celeba/classifiers/robust; leave one out: --assign"),
        (other_features, "real_sum \\(64,\\) and real_cov_sum \\(64, 64\\); torcheval's Inception has \\(2048,\\)"),
        (one_image, "made of 1 real images; at least 2"),
        (infinite_sum, "holds values that are not finite"),
        (lopsided, "real_cov_sum is not symmetric"),
        (indefinite, "is not positive semi-definite"),
        (unknown_class, "what these are: celeba_class_x.pt; .*=celeba/reference"),
        (no_files, "holds no diffusers folder, no classifier .* and no torcheval state"),
        (lambda root: None, "clone: no such folder; give a clone"),
    ],
)
def test_what_is_refused_is_said_in_one_line_and_nothing_is_written(tmp_path, capfd, make, message):
    make(tmp_path / "clone")
    assert cli.main(["import-released", "clone", "--threads", "1"]) == 1
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("nrcg: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "code was run" not in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "models").exists()


def test_a_model_trained_here_is_kept_unless_told_otherwise(tmp_path):
    write_classifier(tmp_path / "clone/celeba_robust.safetensors", 1)
    trained = tmp_path / "models/celeba/classifiers/robust"
    trained.mkdir(parents=True)
    (trained / "config.json").write_text('{"architecture": "mobilenet_v3_small"}')
    again = {"root": tmp_path / "clone", "models": tmp_path / "models", "data": tmp_path, "experiments": {}}
    with pytest.raises(DataError, match="holds a model that was trained here; move it away, or say --replace"):
        import_released(**again)
    assert [path.name for path in trained.iterdir()] == ["config.json"]
    import_released(**again, replace=True)
    first = (trained / "config.json").read_text()
    import_released(**again)  # an import may be repeated
    assert (trained / "config.json").read_text() == first


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    write_classifier(tmp_path / "clone/celeba_robust.safetensors", 1)
    write_classifier(tmp_path / "clone/sleek-river-105.safetensors", 4)
    assert cli.main(["import-released", "clone", "--dry-run", "--classes", "celeba=no,yes", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "from", "to", "found"]
    assert re.fullmatch(
        r"classifier robust +celeba_robust.safetensors +models/celeba/classifiers/robust +MobileNetV3 small, 1 logit: "
        r"no, yes; images in \[-1, 1\]",
        lines[1],
    )
    assert any(line.startswith("sleek-river-105.safetensors  ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone"]


@pytest.mark.parametrize("text", ["celeba", "celeba=female", "celeba=a,a", "=a,b", "celeba=a,"])
def test_class_names_that_cannot_be_read_are_refused(tmp_path, capsys, text):
    write_classifier(tmp_path / "clone/celeba_robust.safetensors", 1)
    assert cli.main(["import-released", "clone", "--classes", text, "--threads", "1"]) == 1
    assert capsys.readouterr().err.startswith(f"nrcg: --classes {text}: expected EXPERIMENT=NAME,NAME")


def test_as_many_class_names_as_classes(tmp_path):
    write_classifier(tmp_path / "celeba_robust.safetensors", 1)
    with pytest.raises(ConfigError, match=r"--classes: 3 names for celeba, .* 1 logit, so 2 classes"):
        import_released(
            tmp_path, tmp_path / "models", data=tmp_path, experiments={}, classes={"celeba": ["a", "b", "c"]}
        )


# --- With the experiment's settings and data --------------------------------------------------------------------


def toy_experiments(**dataset) -> dict:
    """sportballs at toy size, of config.yaml."""
    toy = read_yaml(ROOT / "tests/data/toy.yaml")["experiments"]["toy"]
    toy = merge(toy, {"dataset": {"name": "toyballs"} | dataset})
    raw = merge(read_yaml(ROOT / "config.yaml"), {"experiments": {"sportballs": toy}})
    return parse(raw).experiments


def test_the_schedule_of_the_configuration_is_compared(tmp_path):
    write_ddpm(tmp_path / "clone/sportballs", size=64)
    done = import_released(
        tmp_path / "clone",
        tmp_path / "models",
        data=tmp_path,
        experiments=load(ROOT / "config.yaml").experiments,
        dry_run=True,
    )
    assert [note for note in done.notes if "schedule" in note] == [
        "config.yaml: experiments.sportballs.ddpm.schedule is not the imported model's, which has "
        "num_train_timesteps 6, beta_start 0.01, beta_end 0.9 (linear): set it to that"
    ]


@pytest.mark.parametrize("classes", [BALLS, ["baseball", "basketball", "soccer"]])
def test_with_the_data_at_hand_the_models_are_measured(tmp_path, classes):
    """Every file that the workflow's rules name is there; where labels mean other classes no accuracy is claimed."""
    experiments = toy_experiments(classes=classes)
    write_sportballs(
        tmp_path / "data/toyballs",
        image_size=16,
        classes=classes,
        num_train=8,
        num_val=12,
        diameter=(0.5, 0.9),
        seed=0,
        workers=1,
    )
    write_ddpm(tmp_path / "clone/sportballs", size=16)
    write_classifier(tmp_path / "clone/sportballs/light-dew-109.safetensors", 4)
    done = import_released(tmp_path / "clone", tmp_path / "models", data=tmp_path / "data", experiments=experiments)
    ddpm, guide = tmp_path / "models/sportballs/ddpm", tmp_path / "models/sportballs/classifiers/non_robust"
    outputs = {"data_mean.npy", "training.json", "training.csv", "samples.png", "model_index.json"}
    assert outputs <= {path.name for path in ddpm.iterdir()}
    expected = np.load(tmp_path / "data/toyballs/train/mean.npy").transpose(2, 0, 1)
    assert np.array_equal(np.load(ddpm / "data_mean.npy"), expected)
    header, row = (ddpm / "training.csv").read_text().splitlines()
    assert header == "epoch,step,train_loss,val_loss"
    assert 0.5 < float(row.removeprefix(",,,")) < 3  # an untrained network's: near 1
    assert not any("schedule" in note for note in done.notes)
    measured = {"model.safetensors", "config.json", "training.csv", "accuracy_over_t.csv"}
    config = json.loads((guide / "config.json").read_text())
    if classes == BALLS:
        assert {path.name for path in guide.iterdir()} == measured
        assert config["validation_accuracy"] in {right / 12 for right in range(13)}
        said = f"{guide}: {100 * config['validation_accuracy']:.1f} % of the validation images of "
        assert sum(note.startswith(said) for note in done.notes) == 1
    else:
        assert "validation_accuracy" not in config
        assert any("dataset.classes is [baseball, basketball, soccer], but" in note for note in done.notes)


def test_the_workflow_does_not_train_what_was_imported(tmp_path):
    """The judge alone is left to train: it is not among the released files."""
    from test_workflow import command, copy_tree, planned

    tree, experiments = copy_tree(tmp_path / "tree"), toy_experiments(classes=BALLS)
    toy = {"experiments": {"sportballs": experiments["sportballs"].model_dump(mode="json")}}
    (tree / "change.json").write_text(json.dumps(toy))
    draw = {"image_size": 16, "num_train": 96, "num_val": 32, "diameter": (0.5, 0.9), "workers": 1}
    write_sportballs(tree / "data/toyballs", classes=BALLS, seed=0, **draw)
    write_ddpm(tmp_path / "clone/sportballs", size=16)
    write_classifier(tmp_path / "clone/sportballs/light-dew-109.safetensors", 4)
    write_classifier(tmp_path / "clone/sportballs/apricot-galaxy-108.safetensors", 4)
    import_released(tmp_path / "clone", tree / "models", data=tree / "data", experiments=experiments)
    words = command("--dry-run", "sportballs", "--configfile", "change.json")
    run = subprocess.run(words, cwd=tree, capture_output=True, text=True)
    jobs = planned(run.stdout + run.stderr)
    assert jobs["train_classifier"] == 1
    assert "train_ddpm" not in jobs
    assert "models/sportballs/classifiers/judge/model.safetensors" in run.stdout + run.stderr
