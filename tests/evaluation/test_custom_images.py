"""`nrcg evaluate` on anybody's images and features, against clean-fid, torch-fidelity and prdc."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_stand_in import StandInInception, save_script
from PIL import Image

from nrcg.cli import main
from nrcg.evaluation import features
from nrcg.evaluation.features import INCEPTION_FILE
from nrcg.evaluation.sides import CHUNK, open_side

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2))
"""


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnet.py").write_text(NET)
    yield
    sys.modules.pop("ownnet", None)


def write_images(folder: Path, count: int, seed: int, *, mean: float = 120, sizes=(24,), ending: str = "png") -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        size = sizes[number % len(sizes)]
        pixels = rng.normal(mean + 20 * rng.normal(size=3), 40, (size, size + 2, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{ending}")


def evaluate(*flags: object) -> dict:
    command = ["evaluate", "--device", "cpu", *map(str, flags), "--out", "out.json"]
    assert main(command) == 0
    return json.loads(Path("out.json").read_text())


# --- Parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_given_features_score_as_in_the_reference_packages(dtype):
    """clean-fid takes a matrix square root in float64 and torch-fidelity sums in another order: relative 1e-6."""
    from cleanfid.fid import frechet_distance
    from prdc import compute_prdc
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12))
    real = (rng.normal(size=(200, 12)) @ mix).astype(dtype)
    fake = (rng.normal(size=(200, 12)) @ mix * 0.9 + 0.4).astype(dtype)
    np.save("real.npy", real)
    np.save("fake.npy", fake)
    row = evaluate("--samples", "fake.npy", "--reference", "real.npy")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    fid = frechet_distance(fake.mean(0), np.cov(fake, rowvar=False), real.mean(0), np.cov(real, rowvar=False))
    assert row["fd_given"] == pytest.approx(fid, rel=1e-6)
    kernel = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    pairs = ((fake, fake), (fake, real), (real, real))
    kid = mmd2(*(kernel_poly(a, b, **kernel) for a, b in pairs))
    assert row["kd_given"] == pytest.approx(kid, rel=1e-6)
    near3 = compute_prdc(real, fake, 3)
    near5 = compute_prdc(real, fake, 5)
    # A neighbour on the ball's edge counts in one and not in the other: half an image.
    for name, expected in (
        ("precision", near3["precision"]),
        ("recall", near3["recall"]),
        ("density", near5["density"]),
        ("coverage", near5["coverage"]),
    ):
        assert row[name] == pytest.approx(expected, abs=0.5 / 200), name
    assert (row["num_samples"], row["num_reference"], row["num_pairwise"]) == (200, 200, 200)
    assert row["fd_given_lo"] < row["fd_given"] < row["fd_given_hi"]


def test_folders_of_images_score_as_in_clean_fid(tmp_path, monkeypatch):
    """Mixed sizes and formats, subfolders; clean-fid's own reading, resizing and network on the same stand-in.

    Its batches are others and float32. The trace of the root of C_a C_b is taken as the sum of the singular values of
    A B', rows centred and divided by the root of n - 1: clean-fid's matrix root of 2048 x 2048 takes minutes.
    """
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    save_script(StandInInception(), tmp_path / "weights" / INCEPTION_FILE)
    monkeypatch.setattr(features, "INCEPTION_SHA256", None)
    monkeypatch.setattr(features.InceptionExtractor.__init__, "__kwdefaults__", {"download": False, "sha256": None})
    write_images(tmp_path / "fake", 20, 1, sizes=(24, 40))
    write_images(tmp_path / "fake" / "more", 20, 2, ending="jpg")
    write_images(tmp_path / "real", 45, 3, mean=100, sizes=(32, 310), ending="webp")
    Image.new("L", (20, 20), 90).save(tmp_path / "real" / "grey.png")
    row = evaluate("--samples", "fake", "--reference", "real")
    model = InceptionV3W(str(tmp_path / "weights"), download=False, resize_inside=False)
    theirs = [
        fid.get_folder_features(
            name, model, num_workers=0, batch_size=16, device=torch.device("cpu"), mode="clean", verbose=False
        )
        for name in ("fake", "real")
    ]
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (found.astype(np.float64) for found in theirs))
    shift = theirs[0].mean(0, np.float64) - theirs[1].mean(0, np.float64)
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert row["fid"] == pytest.approx(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * trace, rel=1e-5)
    assert (row["num_samples"], row["num_reference"]) == (40, 46)
    assert "clean-fid" in row["protocols"]
    assert any("2048-dimensional" in warning for warning in row["warnings"])


# --- What is read ----------------------------------------------------------------------------------------------------

MEASURES = ("fd_python_ownnet_make", "kd_python_ownnet_make", "precision", "recall", "density", "coverage")


def test_the_same_images_score_alike_however_they_are_stored(tmp_path):
    """Folder, .npy, guided-diffusion's .npz, and a folder of `nrcg sample`, whose grid is no sample."""
    write_images(tmp_path / "real", 30, 0)
    write_images(tmp_path / "fake", 25, 1, mean=100)
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "fake").iterdir())])
    np.save("fake.npy", arrays)
    np.savez("fake.npz", arrays)
    np.savez_compressed("fake2.npz", arr_0=arrays, arr_1=np.zeros(25, np.int64))
    own = tmp_path / "own"
    own.mkdir()
    np.save(own / "samples.npy", arrays)
    (own / "samples.json").write_text("{}")
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(own / "grid.png")
    flags = ("--reference", "real", "--features", "python:ownnet:make")
    rows = [evaluate("--samples", name, *flags) for name in ("fake", "fake.npy", "fake.npz", "fake2.npz", "own")]
    for row in rows[1:]:  # the order of the images differs, and with it the rounding of sums
        assert [row[name] for name in MEASURES] == pytest.approx([rows[0][name] for name in MEASURES], rel=1e-5)
        assert row["num_samples"] == 25


def test_classes_are_subfolders_or_labels_of_any_kind(tmp_path):
    """The class-conditional distance is the one to the class's folder alone."""
    write_images(tmp_path / "real" / "cat", 15, 0)
    write_images(tmp_path / "real" / "dog", 20, 1, mean=90)
    write_images(tmp_path / "fake", 12, 2, mean=90)
    net = ("--features", "python:ownnet:make")
    alone = evaluate("--samples", "fake", "--reference", "real/dog", *net)["fd_python_ownnet_make"]
    names = sorted(path.relative_to(tmp_path / "real").as_posix() for path in (tmp_path / "real").glob("*/*"))
    numbers = [int(name.startswith("dog")) for name in names]
    np.save("labels.npy", numbers)
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "class"), *zip(names[::-1], numbers[::-1], strict=True)])
    np.save("real.npy", np.stack([np.asarray(Image.open(tmp_path / "real" / name)) for name in names]))
    (tmp_path / "column.csv").write_text("\n".join(map(str, numbers)))
    for reference, target, *labels in (
        ("real", "dog"),
        ("real", "1", "--reference-labels", "labels.npy"),
        ("real", "1", "--reference-labels", "labels.csv"),
        ("real.npy", "1", "--reference-labels", "labels.npy"),
        ("real.npy", "1", "--reference-labels", "column.csv"),
    ):
        row = evaluate("--samples", "fake", "--reference", reference, "--target", target, *labels, *net)
        assert row["cfd_python_ownnet_make"] == pytest.approx(alone, rel=1e-5), (reference, labels)
        assert row["num_reference_target"] == 20
        assert row["cfd_python_ownnet_make"] != pytest.approx(row["fd_python_ownnet_make"], rel=0.01)


def test_a_judge_gives_the_accuracy_and_its_own_features(tmp_path):
    write_images(tmp_path / "real" / "a", 10, 0)
    write_images(tmp_path / "real" / "b", 10, 1)
    write_images(tmp_path / "fake", 16, 2, sizes=(20, 30))
    flags = ("--reference", "real", "--classifier", "python:ownnet:make?classes=a,b", "--target", "b")
    row = evaluate("--samples", "fake", *flags, "--features", "judge", "python:ownnet:make")
    from ownnet import make

    net = make().eval()
    hits = []
    for path in (tmp_path / "fake").iterdir():
        x = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        hits.append(net(x).argmax().item() == 1)
    assert row["accuracy_judge"] == np.mean(hits)
    assert row["cfd_judge"] == pytest.approx(row["cfd_python_ownnet_make"], rel=1e-6)
    assert {"precision", "precision_all", "precision_python_ownnet_make"} <= row.keys()


def test_a_judge_of_grey_images_takes_grey_files_and_refuses_coloured_ones(tmp_path, capsys):
    (tmp_path / "ownnet.py").write_text(
        NET.replace("Conv2d(3,", "Conv2d(1,") + "\nplain = make\n"
        "def make():\n    from nrcg import Classifier\n"
        "    return Classifier(plain(), channels=1, classes=['a', 'b'])\n"
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12), np.uint8)
    (tmp_path / "real").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "real" / f"{number}.png")
    np.save("fake.npy", images)
    flags = ("--classifier", "python:ownnet:make", "--features", "judge")
    row = evaluate("--samples", "fake.npy", "--reference", "real", *flags)
    # The same images on both sides, in another order: the distance is zero but for float32 features.
    assert row["fd_judge"] == pytest.approx(0, abs=1e-6)
    assert row["precision"] == row["recall"] == 1
    write_images(tmp_path / "colour", 8, 0)
    assert main(["evaluate", "--samples", "colour", "--reference", "real", "--device", "cpu", *flags]) == 1
    assert "the classifier takes grey images, these are coloured" in capsys.readouterr().err


def test_links_to_folders_are_followed(tmp_path):
    write_images(tmp_path / "own", 10, 0)
    write_images(tmp_path / "elsewhere", 10, 1)
    (tmp_path / "own" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "own")
    assert open_side("own").count == 20


def test_shards_beside_a_picture_are_the_samples(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    write_images(tmp_path / "scale1", 1, 0)
    np.save("scale1/shard0000.npy", images)
    Path("scale1/shard0000.json").write_text("{}")
    assert open_side("scale1").count == 9


def test_rows_say_what_makes_them_incomparable(tmp_path):
    """Another reference behind the same name, and images that were resized first."""
    flags = ("--features", "python:ownnet:make?size=16")
    write_images(tmp_path / "fake", 20, 1)
    rows = []
    for seed, size in ((0, ()), (0, ("--image-size", 16)), (2, ())):
        shutil.rmtree("real", ignore_errors=True)
        write_images(tmp_path / "real", 20, seed)
        rows.append(evaluate("--samples", "fake", "--reference", "real", *flags, *size))
    first, resized, other = rows
    assert first["protocols"] == other["protocols"] != resized["protocols"]
    assert len({row["reference"] for row in rows}) == 3


def test_the_first_samples_and_a_common_size(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (30, 12, 12), np.uint8)
    np.save("grey.npy", arrays)
    np.save("few.npy", arrays[:20])
    flags = ("--reference", "grey.npy", "--features", "python:ownnet:make?size=16")
    some = evaluate("--samples", "grey.npy", "--num-samples", 20, *flags)
    assert {name: some[name] for name in MEASURES if name in some} == {
        name: value for name, value in evaluate("--samples", "few.npy", *flags).items() if name in MEASURES
    }
    assert next(open_side("grey.npy", image_size=7).chunks())[0].shape == (7, 7, 1)


def test_copies_of_one_image_are_told():
    """Twelve copies have no spread, so that every interval says nothing."""
    np.save("real.npy", np.random.default_rng(0).integers(0, 256, (30, 12, 12), np.uint8))
    np.save("copies.npy", np.repeat(np.load("real.npy")[:2], 6, axis=0))
    flags = ("--reference", "real.npy", "--features", "python:ownnet:make?size=16")
    assert any("of 12 images 2 differ" in line for line in evaluate("--samples", "copies.npy", *flags)["warnings"])
    assert not any("differ" in line for line in evaluate("--samples", "real.npy", *flags)["warnings"])


def test_arrays_and_archives_are_read_in_pieces(tmp_path):
    count = 2 * CHUNK + 5
    arrays = np.arange(count, dtype=np.uint16).view(np.uint8).reshape(count, 1, 2)
    np.save("a.npy", arrays)
    np.savez_compressed("a.npz", arrays)
    for name in ("a.npy", "a.npz"):
        chunks = list(open_side(name).chunks())
        assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 5]
        np.testing.assert_array_equal(np.stack([image for chunk in chunks for image in chunk])[..., 0], arrays)


def test_csv_holds_the_same_numbers_and_the_table_is_printed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save("a.npy", rng.normal(size=(60, 4)))
    np.save("b.npy", rng.normal(size=(60, 4)))
    row = evaluate("--samples", "a.npy", "--reference", "b.npy")
    printed = capsys.readouterr()
    assert "fd_given" in printed.out and "95 % interval" in printed.out and "num_reference: 60" in printed.out
    assert main(["evaluate", "--samples", "a.npy", "--reference", "b.npy", "--out", "out.csv"]) == 0
    with open("out.csv", newline="") as file:
        (found,) = csv.DictReader(file)
    assert float(found["fd_given"]) == row["fd_given"]
    assert found["protocols"] == row["protocols"]


# --- What is refused -------------------------------------------------------------------------------------------------

MISTAKES = {
    "nothing there": ("nope real.npy", "nope: no such file or folder"),
    "no image": ("empty real.npy", "empty: holds no image"),
    "too few": ("three.npy real.npy", "three.npy: 3 samples; an evaluation needs 6 or more"),
    "float images": ("float.npy real.npy", "float.npy: float32 of shape (9, 8, 8, 3); images must be uint8"),
    "channels first": ("first.npy real.npy", "must have 1 or 3 channels, not 8; move the channels to the end"),
    "other channels": ("grey.npy real.npy", "grey.npy has 1 channels, real.npy 3: they cannot be compared"),
    "no labels": ("real.npy real.npy --target 1", "--target: real.npy has no labels; give --reference-labels"),
    "labels of others": (
        "real.npy real.npy --target 1 --reference-labels labels.npy",
        "labels of shape (4,) for 9 images",
    ),
    "unknown class": (
        "real.npy real.npy --target 7 --reference-labels nine.npy",
        "holds 0 of the class '7', 6 or more are needed; its labels: 0, 1",
    ),
    "features and images": ("vectors.npy real.npy", "vectors.npy holds features, real.npy images"),
    "dimensions": ("vectors.npy longer.npy", "vectors.npy holds features of 4 dimensions, longer.npy of 5"),
    "not finite": ("nan.npy vectors.npy", "nan.npy: row 0 holds a value that is not finite"),
    "given of images": ("real.npy real.npy --features given", "--features given: both sides must be .npy files of"),
    "judge without one": ("real.npy real.npy --features judge", "--features judge: give the judge by --classifier"),
    "damaged": ("damaged.npy real.npy", "damaged.npy: no .npy array that can be read"),
    "damaged archive": ("damaged.npz real.npy", "damaged.npz: no .npz archive"),
    "damaged image": ("broken real.npy --features python:ownnet:make", "broken/5.png: "),
    "too many": ("real.npy real.npy --num-samples 10", "--num-samples: 10, but real.npy holds 9"),
    "another ending": ("real.npy real.npy --out o.txt", "--out: o.txt: must be a file that ends in .json or .csv"),
    "out is a folder": ("real.npy real.npy --out dir.json", "--out: dir.json: must be a file"),
    "features in an archive": ("vectors.npz real.npy", "vectors.npz: holds features; save them as a .npy"),
    "one image": ("one.npy real.npy", "one.npy: shape (8, 8, 3): one image"),
    "a flipped byte": ("flipped.npz real.npy --features python:ownnet:make", "flipped.npz: damaged"),
    "a label too few": ("real.npy real.npy --target 1 --reference-labels short.csv", "short.csv: 8 labels below"),
    "a blank label": (
        "real.npy real.npy --target 1 --reference-labels blank.csv",
        "blank.csv, line 3: expected a label",
    ),
    "two labels": (
        "real.npy ten --target 1 --reference-labels two.csv",
        "two.csv, line 2: another label of 0.png: 1, before 0",
    ),
    "an experiment's flag": ("real.npy real.npy --method robust", "--method: belongs to an experiment"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_comparison_without_sense_is_refused_in_one_line(tmp_path, capsys, mistake):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 8, 8, 3), np.uint8)
    arrays = {"real": images, "three": images[:3], "grey": images[..., 0], "float": images.astype(np.float32)}
    arrays |= {"first": images.transpose(0, 3, 1, 2), "vectors": rng.normal(size=(9, 4))}
    arrays |= {"longer": rng.normal(size=(9, 5)), "nan": np.full((9, 4), np.nan)}
    arrays |= {"labels": np.arange(4), "nine": np.arange(9) % 2}
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    arrays["one"] = images[0]
    np.save("one.npy", images[0])
    np.savez("vectors.npz", arrays["vectors"])
    np.savez("flipped.npz", images)
    content = bytearray(Path("flipped.npz").read_bytes())
    content[len(content) // 2] ^= 1
    Path("flipped.npz").write_bytes(content)
    Path("short.csv").write_text("label\n" + "1\n" * 8)
    Path("blank.csv").write_text("1\n1\n\n" + "0\n" * 7)
    Path("two.csv").write_text("0.png,0\n0.png,1\n")
    Path("dir.json").mkdir()
    write_images(tmp_path / "ten", 10, 0)
    Path("empty").mkdir()
    write_images(tmp_path / "broken", 9, 0)
    for path in (Path("broken/5.png"),):
        path.write_bytes(path.read_bytes()[:100])
    for name in ("damaged.npy", "damaged.npz"):
        Path(name).write_bytes(b"nothing")
    command, text = MISTAKES[mistake]
    samples, reference, *flags = command.split()
    assert main(["evaluate", "--device", "cpu", "--samples", samples, "--reference", reference, *flags]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("nrcg: ") and text in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
