"""The command line: help, mistakes in one line, and sampling with anybody's models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import (
    BALLS,
    TINY_SIZE,
    logged_inputs,
    toy_settings,
    track_without_a_store,
    write_balls,
    write_tiny_classifier,
    write_tiny_pipeline,
)

from nrcg import config
from nrcg.cli import main
from nrcg.csv_files import write_csv

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config.yaml")
VERBS = [
    *("run", "plan", "validate", "schema", "adopt", "compare", "track", "export-ddpm"),
    *("export-classifier", "dataset", "train-ddpm", "train-classifier", "forward", "sample", "publish", "reference"),
    *(
        "evaluate",
        "tune",
        "likelihood",
        "likelihood-table",
        "objective",
        "objectives-table",
        "density",
        "densities-table",
    ),
    *("explain", "explain-shard", "evaluate-explanations", "explanations-table", "collect", "figures", "report"),
]


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Each test in a folder of its own, without a network, untracked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NRCG_TRACKING", "off")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with `ddpm`, `classifier`, `data` and `toy.yaml`: 8 x 8 pixels, six steps, nothing trained."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_pipeline(folder / "ddpm")
    write_tiny_classifier(folder / "classifier")
    write_balls(folder / "data", 8, 4)
    (folder / "toy.yaml").write_text(json.dumps(toy_settings()))
    return folder


def nrcg(*arguments: object) -> int:
    """Run the command in this process; its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code


# --- Help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert nrcg(verb, "--help") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: nrcg {verb} ")
    assert said.err == ""


def test_help_names_every_verb(capsys):
    assert nrcg("--help") == 0
    assert re.findall(r"^ {4}(\S+)", capsys.readouterr().out, re.MULTILINE) == VERBS


def test_help_and_mistakes_answer_without_loading_torch():
    """A loaded torch takes seconds. Mistakes are found before it is."""
    code = (
        "import sys; from nrcg.cli import main\n"
        "try: sys.exit(main(sys.argv[1:]))\n"
        "finally: print('torch' in sys.modules)"
    )
    for arguments in (["sample", "--help"], ["validate", "--config", "nope.yaml"]):
        found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert found.stdout.endswith("False\n")


def test_version(capsys):
    from nrcg import __version__

    assert nrcg("--version") == 0
    assert capsys.readouterr().out == f"nrcg {__version__}\n"


# --- Mistakes ---------------------------------------------------------------------------------------------------

# A command, and what its one line on stderr says. {tiny} is the folder of tiny models.
SAMPLE = "sample --ddpm {tiny}/ddpm --out out"
GUIDED = f"{SAMPLE} --classifier {{tiny}}/classifier"
SHARD = "sample --config {tiny}/toy.yaml --experiment toy --ddpm {tiny}/ddpm --out out/s.npy"
CLASSIFIER = "train-classifier --config {tiny}/toy.yaml --experiment toy --role judge --out out"
MISTAKES = {
    "no verb": ("", "nrcg: the following arguments are required: VERB"),
    "unknown verb": ("smaple", "nrcg: argument VERB: invalid choice: 'smaple'"),
    "unknown flag": (f"{SAMPLE} --stabiliser none", "nrcg: unrecognized arguments: --stabiliser none"),
    "missing flag": ("sample --ddpm {tiny}/ddpm", "nrcg: the following arguments are required: --out"),
    "missing config": ("validate --config nope.yaml", "nrcg: nope.yaml: no such config file"),
    "unknown experiment": (
        "dataset --config {tiny}/toy.yaml --experiment nope --out out",
        "nrcg: experiment 'nope' is unknown; allowed: quickstart, digits, objectives, objectives64, sportballs, ",
    ),
    "no experiment": ("dataset --config {tiny}/toy.yaml --out out", "holds several experiments; name one by --exp"),
    "unknown method": (f"{SHARD} --method nope --scale 1 --shard 0", "nrcg: method 'nope' is unknown; allowed: "),
    "no method": (f"{SHARD} --scale 1 --shard 0", "nrcg: --method: missing"),
    "no shard": (f"{SHARD} --method unconditional --scale 1", "nrcg: --shard: missing"),
    "shard past the end": (
        f"{SHARD} --method unconditional --scale 0 --shard 2",
        "nrcg: --shard: 2 is past the last of 12 samples",
    ),
    "shard before the start": (f"{SHARD} --method unconditional --scale 0 --shard=-1", "-8 is no whole number >= 0"),
    "no classifier": (f"{SHARD} --method robust --scale 1 --shard 0", "nrcg: --classifier: missing; method robust"),
    "no ddpm": ("sample --out out", "nrcg: --ddpm: missing"),
    "missing ddpm": ("sample --ddpm nope --out out", "nrcg: nope: no such folder"),
    "no pipeline": ("sample --ddpm {tiny} --out out", "model_index.json: not found"),
    "missing classifier": (
        f"{SAMPLE} --classifier nope --target 0",
        "nrcg: classifier 'nope': no such folder, and no SPEC",
    ),
    "missing classifier folder": (f"{SAMPLE} --classifier no/pe --target 0", "nrcg: no/pe/config.json: not found"),
    "classifier of no library": (
        f"{SAMPLE} --classifier torchvision:x --target 0",
        "torchvision has no classifier 'x'",
    ),
    "unknown schedule": (
        f"{SAMPLE} --scale-schedule steep",
        "nrcg: --scale-schedule: scale schedule 'steep' is unknown",
    ),
    "trace of nothing": (f"{SAMPLE} --trace", "nrcg: --trace: nothing guides; give --classifier"),
    "batch size that is text": (f"{SAMPLE} --batch-size all", "nrcg: argument --batch-size: all is not a whole number"),
    "skip above 2": (f"{GUIDED} --target 0 --skip-above 2", "nrcg: skip_above: 2.0 is no probability in (0, 1]"),
    "bad stabilizer": (f"{SAMPLE} --stabilizer ema", "nrcg: --stabilizer: stabilizer 'ema' is unknown; allowed: none"),
    "bad beta": (f"{SAMPLE} --stabilizer ema:1.5", "nrcg: --stabilizer: "),
    "no target": (f"{GUIDED}", "nrcg: --target: missing; allowed: baseball, basketball, soccer or a number"),
    "unknown target": (f"{GUIDED} --target tennis", "nrcg: target 'tennis' is no class of the classifier; allowed: "),
    "target past the end": (f"{GUIDED} --target 3", "nrcg: target '3' is no class of the classifier; allowed: "),
    "scale that is text": (f"{GUIDED} --target 0 --scale big", "nrcg: argument --scale: 'big' is no number"),
    "negative scale": (f"{GUIDED} --target 0 --scale=-1", "nrcg: argument --scale: -1 is not a finite number >= 0"),
    "nan scale": (f"{GUIDED} --target 0 --scale nan", "nrcg: argument --scale: nan is not a finite number >= 0"),
    "no samples": (f"{SAMPLE} --num-samples 0", "nrcg: argument --num-samples: 0 is not a whole number >= 1"),
    "half a sample": (f"{SAMPLE} --num-samples 1.5", "nrcg: argument --num-samples: 1.5 is not a whole number >= 1"),
    "device that is not there": (f"{SAMPLE} --device cuda:99", "nrcg: device: cuda:99 is not there"),
    "device that is none": (
        f"{SAMPLE} --device tpu",
        "nrcg: argument --device: 'tpu' is no device; allowed: auto, cpu",
    ),
    "no mean image": (f"{SAMPLE} --start data_mean", "nrcg: start: "),
    "missing data": (f"{CLASSIFIER} --data nope", "nrcg: nope/dataset.json: no such file"),
    "missing metrics": ("collect --metrics nope.csv --out out.csv", "nrcg: nope.csv: "),
    "nothing to compare": ("compare nope", "nrcg: results/nope/metrics.csv: "),
}


def assert_one_line(capsys, text: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("nrcg: ")
    assert text in error
    assert error.count("\n") == 1
    assert error.endswith("\n")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tiny, tmp_path, capsys, mistake):
    command, text = MISTAKES[mistake]
    assert nrcg(*command.format(tiny=tiny).split()) in (1, 2)
    assert_one_line(capsys, text)
    assert not (tmp_path / "out").exists()


# The file that is cut off, and the command that reads it.
CUT_OFF = {
    "images": ("data/train/images.npy", f"{CLASSIFIER} --data {{tiny}}/data"),
    "labels": ("data/val/labels.npy", f"{CLASSIFIER} --data {{tiny}}/data"),
    "manifest": ("data/dataset.json", f"{CLASSIFIER} --data {{tiny}}/data"),
    "classifier": ("classifier/model.safetensors", f"{GUIDED} --target 0"),
    "classifier's config": ("classifier/config.json", f"{GUIDED} --target 0"),
    "ddpm's weights": ("ddpm/unet/diffusion_pytorch_model.safetensors", SAMPLE),
    "ddpm's index": ("ddpm/model_index.json", SAMPLE),
}


@pytest.mark.parametrize("what", CUT_OFF)
def test_a_file_that_is_cut_off_is_named_with_its_remedy(tiny, tmp_path, capsys, what):
    name, command = CUT_OFF[what]
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    path = copy / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert nrcg(*command.format(tiny=copy).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nrcg: {copy / name.split('/')[0]}")
    assert "; restore it, or " in error
    assert error.count("\n") == 1


def test_a_mistake_shows_no_traceback_in_a_shell(tmp_path):
    command = [Path(sys.executable).parent / "nrcg", "validate", "--config", "nope.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr == "nrcg: nope.yaml: no such config file; give its path by --config\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`nrcg validate | true`."""
    script = f"'{Path(sys.executable).parent / 'nrcg'}' schema --help | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in found.stderr


# --- Verbs ------------------------------------------------------------------------------------------------------


def test_validate_names_the_experiments(capsys):
    assert nrcg("validate", "--config", CONFIG) == 0
    assert "valid; experiments: quickstart, digits, objectives, objectives64, sportballs, " in capsys.readouterr().out


def test_schema_writes_the_models_schema(tmp_path):
    assert nrcg("schema", "--out", tmp_path / "schema.json") == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == config.json_schema()


def sample(tiny: Path, out: Path, *more: object) -> np.ndarray:
    guided = ["--classifier", tiny / "classifier", "--target", "soccer", "--scale", 30, "--stabilizer", "ema:0.5"]
    flags = ["--num-samples", 5, "--seed", 3, "--precision", "float32", "--threads", 1]
    assert nrcg("sample", "--ddpm", tiny / "ddpm", *guided, *flags, "--out", out, *more) == 0
    return np.load(out / "samples.npy")


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory) -> np.ndarray:
    """The samples of these settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRCG_TRACKING", "off")
        return sample(tiny, tmp_path_factory.mktemp("drawn"))


def test_a_classifier_by_spec_and_a_trace(tiny, tmp_path, monkeypatch):
    """A classifier without names, from one's own module, on the denoised image; every flag of the guidance at once."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom nrcg.classifiers.architectures import SmallCNN\n"
        "def make():\n    torch.manual_seed(0)\n    return SmallCNN(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [
        "--classifier",
        "python:mine:make",
        "--target",
        "1",
        "--scale-schedule",
        "linear:0.5",
        "--skip-above",
        "0.99",
    ]
    flags += ["--no-clip-pred-x0", "--sampler", "ddim", "--steps", 3, "--eta", 0.5, "--trace", "--every-k", 2]
    assert sample(tiny, tmp_path / "out", *flags).shape == (5, TINY_SIZE, TINY_SIZE, 3)
    sys.modules.pop("mine")
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["classifier"] == "python:mine:make" and record["skip_above"] == 0.99 and not record["clip_pred_x0"]
    with np.load(tmp_path / "out" / "samples.trace.npz") as trace:
        assert trace["grad_norm"].shape == (5, 3) and np.isnan(trace["grad_norm"][:, 1]).all()
    assert (tmp_path / "out" / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_with_anybodys_models_writes_pictures_and_what_made_them(tiny, tmp_path, capsys):
    images = sample(tiny, tmp_path / "out")
    assert (images.shape, images.dtype) == ((5, TINY_SIZE, TINY_SIZE, 3), np.uint8)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"{i:05d}.png" for i in range(5)), "grid.png", "samples.json", "samples.npy"]
    from PIL import Image

    for index, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{index:05d}.png")), image)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert {key: record[key] for key in ("target", "scale", "seed", "input", "stabilizer", "num_samples")} == {
        "target": "soccer",
        "scale": 30.0,
        "seed": 3,
        "input": "pred_x0",
        "stabilizer": "ema:0.5",
        "num_samples": 5,
    }
    assert capsys.readouterr().out.startswith(f"5 samples in {tmp_path / 'out'}: samples.npy")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_batch_size_does_not_change_the_samples(tiny, drawn, tmp_path, batch_size):
    """Float32 sums may differ in the last bit between batch sizes, so one of 256 levels is allowed, seldom."""
    difference = np.abs(drawn.astype(int) - sample(tiny, tmp_path / "parts", "--batch-size", batch_size))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", 4],
        ["--scale", 0],
        ["--target", "0"],
        ["--input", "x_t"],
        ["--stabilizer", "none"],
        ["--stabilizer", "adam"],
    ],
    ids=lambda change: " ".join(map(str, change)),
)
def test_each_setting_reaches_the_sampler(tiny, drawn, tmp_path, change):
    assert not np.array_equal(drawn, sample(tiny, tmp_path / "b", *change))


def test_without_a_classifier_nothing_guides(tiny, tmp_path):
    """As a scale of 0 does. Tolerance: one of 256 levels, for the rounding of another path through the code."""
    flags = ["--num-samples", 5, "--seed", 3, "--precision", "float32", "--out", tmp_path / "plain"]
    assert nrcg("sample", "--ddpm", tiny / "ddpm", *flags) == 0
    guided = sample(tiny, tmp_path / "zero", "--scale", 0)
    plain = np.load(tmp_path / "plain" / "samples.npy")
    assert np.abs(plain.astype(int) - guided).max() <= 1


def test_shards_are_parts_of_one_run(tiny, tmp_path):
    """Shards of 8 and 4 samples; the second begins at the run's ninth."""
    command = f"{SHARD} --method unconditional --scale 0".format(tiny=tiny).split()
    for shard in (0, 1):
        assert nrcg(*command, "--shard", shard, "--out", tmp_path / f"shard{shard}.npy") == 1  # no mean image stored
    np.save(tmp_path / "mean.npy", np.zeros((3, TINY_SIZE, TINY_SIZE), np.float32))
    ddpm = tmp_path / "ddpm"
    shutil.copytree(tiny / "ddpm", ddpm)
    (tmp_path / "mean.npy").rename(ddpm / "data_mean.npy")
    for shard in (0, 1):
        assert nrcg(*command, "--ddpm", ddpm, "--shard", shard, "--out", tmp_path / f"shard{shard}.npy") == 0
    shards = [np.load(tmp_path / f"shard{shard}.npy") for shard in (0, 1)]
    records = [json.loads((tmp_path / f"shard{shard}.json").read_text()) for shard in (0, 1)]
    assert [len(shard) for shard in shards] == [8, 4]
    assert [record["first_sample"] for record in records] == [0, 8]
    assert len({image.tobytes() for shard in shards for image in shard}) == 12
    flags = ["--num-samples", 12, "--seed", records[0]["seed"], "--precision", "float32", "--out", tmp_path / "whole"]
    assert nrcg("sample", "--ddpm", ddpm, *flags) == 0
    whole = np.load(tmp_path / "whole" / "samples.npy")
    assert np.abs(whole.astype(int) - np.concatenate(shards)).max() <= 1


def test_threads_reach_the_matrix_libraries(tiny, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    sample(tiny, tmp_path / "out")
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("columns, code", [(("fd_judge", "fd_judge"), 0), (("fd_judge", "fid"), 1)])
def test_metrics_of_different_features_are_not_joined(columns, code, capsys):
    paths = []
    for number, column in enumerate(columns):
        names = {"fid": ("fid", "cfid", "kid", "ckid")}.get(column, ("fd_judge", "cfd_judge", "kd_judge", "ckd_judge"))
        row = {
            **{"experiment": "toy", "method": f"m{number}", "scale": 1.0, "num_samples": 8},
            **{"accuracy_guide": 0.5, "accuracy_judge": 0.5},
            **dict.fromkeys(names, 2.0),
            **{"precision": 1.0, "recall": 1.0, "nonfinite": 0},
            **{"images_per_second": 1.0, "peak_memory_mib": 1.0, "mlflow_run_id": ""},
        }
        write_csv(f"m{number}.csv", [row], list(row))
        paths.append(f"m{number}.csv")
    assert main(["collect", "--metrics", *paths, "--out", "metrics.csv"]) == code
    assert Path("metrics.csv").exists() == (code == 0)
    if code:
        assert capsys.readouterr().err.startswith("nrcg: features differ and cannot be compared")


def test_a_pretrained_classifier_takes_the_place_of_a_trained_one(tiny, tmp_path, capsys, monkeypatch):
    """Another net with more classes, as a state_dict; its groups are the data set's classes."""
    from torchvision.models import resnet18

    from nrcg.classifiers.storage import open_classifier

    torch.manual_seed(0)
    theirs = resnet18(num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    raw = json.loads((tiny / "toy.yaml").read_text())
    block = raw["experiments"]["toy"]["classifiers"]["judge"]
    block["pretrained"] = f"torchvision:resnet18?weights={tmp_path / 'theirs.pth'}&size=32"
    command = ["train-classifier", "--config", tmp_path / "c.json", "--experiment", "toy", "--role", "judge"]
    command += ["--data", tiny / "data", "--out", tmp_path / "judge"]
    (tmp_path / "c.json").write_text(json.dumps(raw))
    assert nrcg(*command) == 1
    assert_one_line(capsys, "it has 4 classes, the data set 3; give class_map")
    block["class_map"] = {"soccer": 2, "baseball": [0, 3], "basketball": 1}
    track_without_a_store(monkeypatch, tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(raw))
    assert nrcg(*command) == 0
    name = json.loads((tiny / "data/dataset.json").read_text())["name"]
    assert logged_inputs(tmp_path) == [(f"{name}/val", "validation"), ("judge",)]
    classifier = open_classifier(tmp_path / "judge")
    assert classifier.classes == BALLS
    names = {path.name for path in (tmp_path / "judge").iterdir()}
    assert names == {"model.safetensors", "config.json", "training.csv", "accuracy_over_t.csv"}
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    p = theirs((((seen + 1) / 2) - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)).softmax(dim=1)
    expected = torch.stack([p[:, 0] + p[:, 3], p[:, 1], p[:, 2]], dim=1)
    torch.testing.assert_close(classifier(x).softmax(dim=1), expected, rtol=1e-4, atol=1e-5)


# --- Faults -----------------------------------------------------------------------------------------------------


def test_a_shard_is_the_same_after_the_memory_ran_out(tiny, tmp_path, monkeypatch, caplog):
    """Out of memory within the third step of the first batch, as a GPU says it."""
    ddpm = tmp_path / "ddpm"
    shutil.copytree(tiny / "ddpm", ddpm)
    np.save(ddpm / "data_mean.npy", np.zeros((3, TINY_SIZE, TINY_SIZE), np.float32))
    guided = ["--method", "non_robust_x0_ema99", "--scale", 1, "--classifier", tiny / "classifier"]
    command = [*SHARD.format(tiny=tiny).split(), *guided, "--ddpm", ddpm, "--shard", 0]
    assert nrcg(*command, "--out", tmp_path / "undisturbed.npy") == 0
    from diffusers import UNet2DModel

    forward, batches = UNet2DModel.forward, []

    def once(self, x, *arguments, **settings):
        batches.append(len(x))
        if len(batches) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x, *arguments, **settings)

    monkeypatch.setattr(UNet2DModel, "forward", once)
    assert nrcg(*command, "--out", tmp_path / "disturbed.npy") == 0
    assert "out of memory with batches of 5; going on with 2" in caplog.text
    assert batches[:4] == [5, 5, 5, 2]
    # Convolutions of another batch size may sum in another order, which may turn a rounding.
    undisturbed, disturbed = (np.load(tmp_path / f"{name}.npy").astype(int) for name in ("undisturbed", "disturbed"))
    assert undisturbed.shape == (8, TINY_SIZE, TINY_SIZE, 3)
    assert np.abs(disturbed - undisturbed).max() <= 1
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("undisturbed", "disturbed")]
    for key in ("first_sample", "num_samples", "seed", "settings", "weights_sha256", "nonfinite"):
        assert records[0][key] == records[1][key]


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "data_mean.npy", "training.json"])
def test_a_flipped_byte_of_a_diffusion_model_is_refused(tmp_path, capsys, name):
    from diffusers import DDPMScheduler, UNet2DModel

    from nrcg.diffusion.storage import save_pipeline

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    unet = UNet2DModel(sample_size=TINY_SIZE, block_out_channels=(8,), layers_per_block=1, **blocks)
    ddpm, row = tmp_path / "ddpm", {"epoch": 1, "train_loss": 0.5}
    save_pipeline(ddpm, unet, DDPMScheduler(4), np.zeros((3, TINY_SIZE, TINY_SIZE)), {"seconds": 12.5}, [row])
    command = ["sample", "--ddpm", ddpm, "--num-samples", 1, "--out", tmp_path / "out"]
    assert nrcg(*command) == 0
    content = bytearray((ddpm / name).read_bytes())
    content[content.find(b"12.5") if name == "training.json" else -2] ^= 1
    (ddpm / name).write_bytes(content)
    capsys.readouterr()
    assert nrcg(*command) == 1
    assert_one_line(capsys, f"nrcg: {ddpm / name}: ")


def test_a_flipped_byte_of_the_data_is_refused(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "copy")
    path = tmp_path / "copy/data/train/images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert nrcg(*CLASSIFIER.format(tiny=tiny).split(), "--data", tmp_path / "copy/data") == 1
    assert_one_line(capsys, f"nrcg: {path}: has changed since it was written (SHA-256 differs); ")
