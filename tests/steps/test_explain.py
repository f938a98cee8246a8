"""`nrcg explain`: pictures, table and page of anybody's images, kept part by part."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from toys import BALLS, TINY_SIZE, write_tiny_classifier, write_tiny_pipeline

from nrcg import cli
from nrcg.explain import repeats
from nrcg.steps import explain

FOLDERS = ("explanations", "differences")


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_tiny_pipeline(tmp_path / "ddpm")
    write_tiny_classifier(tmp_path / "guide")
    write_tiny_classifier(tmp_path / "judge", seed=2)
    images = np.random.default_rng(0).integers(0, 256, (7, TINY_SIZE, TINY_SIZE, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.chdir(tmp_path)
    return images


def run(*flags, out="out", images="images.npy"):
    command = ["explain", "--ddpm", "ddpm", "--classifier", "guide", "--images", images, "--out", out]
    try:
        return cli.main([*command, *map(str, flags)])
    except SystemExit as exit_:
        return exit_.code


def table(out="out"):
    with open(f"{out}/explanations.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_table_and_page(here, tmp_path, capsys):
    assert run("--judge", "judge", "--batch-size", "3", "--bits") == 0
    rows = table()
    assert len(rows) == 7 and {row["status"] for row in rows} <= {"flipped", "failed"}
    for place, row in enumerate(rows):
        image = np.asarray(Image.open(f"out/explanations/{place:05d}.png"))
        assert float(row["l1"]) == pytest.approx(np.abs(image - here[place].astype(float)).mean() / 255)
        assert row["from"] in BALLS and row["target"] in BALLS and row["from"] != row["target"]
        assert Image.open(f"out/differences/{place:05d}.png").size == (TINY_SIZE, TINY_SIZE)
    record = json.loads((tmp_path / "out/explanations.json").read_text())
    flipped = sum(row["status"] == "flipped" for row in rows)
    assert record["metrics"]["validity"] == pytest.approx(flipped / 7)
    for name in ("validity_judge", "l1", "l15", "l2", "changed", "sfd_judge", "bits_per_dim", "seconds"):
        assert record["metrics"][f"{name}_lo"] <= record["metrics"][name] <= record["metrics"][f"{name}_hi"], name
    page = (tmp_path / "out/explanations.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 7 and not re.search(r'(src|href)="(?!data:)', page)
    assert f"{flipped} of 7 counterfactual explanations succeeded" in capsys.readouterr().out


def test_everything_printed_is_escaped(here, tmp_path):
    name = '<script>alert("1")</script>&.png'.replace("/", "_")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(here[0]).save(tmp_path / "pictures" / name)
    assert run(images="pictures") == 0
    page = (tmp_path / "out/explanations.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(&quot;1&quot;)" in page
    assert table()[0]["image"] == name


def test_images_of_other_sizes_and_modes_are_converted(here, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (30, 20), 99).save(tmp_path / "pictures/grey.png")
    Image.new("RGBA", (8, 9), (255, 0, 0, 0)).save(tmp_path / "pictures/clear.png")
    assert run("--tau", "0", images="pictures") == 0
    for place, row in enumerate(table()):
        grey = {"grey.png": 99, "clear.png": 255}[row["image"]]
        assert (np.asarray(Image.open(f"out/explanations/{place:05d}.png")) == grey).all()


def tree(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_killed_run_goes_on_with_the_same_bytes(here, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "PART", 3)
    assert run() == 0
    whole = tree(tmp_path / "out")
    done = []
    make = repeats.explain_images

    def counted(*arguments, **settings):
        done.append(settings["samples"][0])
        return make(*arguments, **settings)

    monkeypatch.setattr(repeats, "explain_images", counted)
    assert run() == 0 and done == [] and tree(tmp_path / "out") == whole
    part = tmp_path / "out/parts/part00001.npz"
    part.write_bytes(part.read_bytes()[:50])  # cut off
    for folder in FOLDERS:
        (tmp_path / "out" / folder / "00004.png").unlink()
    assert run() == 0 and done == [3]
    again = tree(tmp_path / "out")
    timed = {name for name in whole if name.suffix in (".csv", ".json", ".html", ".npz")}
    assert all(again[name] == whole[name] for name in whole.keys() - timed)
    assert run("--tau", "0.9") == 0 and done == [3, 0, 3, 6]  # other settings
    images = here.copy()
    images[0] = 0
    np.save("images.npy", images)
    assert run("--tau", "0.9") == 0 and done == [3, 0, 3, 6, 0]  # one other image, in the first part


@pytest.fixture
def real(here, tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (30, TINY_SIZE, TINY_SIZE, 3), np.uint8)
    np.save(tmp_path / "real.npy", images)
    (tmp_path / "real.csv").write_text("\n".join(BALLS[place % 3] for place in range(30)) + "\n")
    return images


def metrics(out="out"):
    with open(f"{out}/explanations.json") as file:
        return json.load(file)["metrics"]


def test_distances_to_real_images_are_those_of_an_evaluation(here, real, tmp_path, capsys):
    assert run() == 0
    called = {row["from"] for row in table()}
    target = next(name for name in BALLS if name not in called)  # none is skipped
    flags = ("--judge", "judge", "--target", target, "--reference", "real.npy")
    assert run(*flags, "--reference-labels", "real.csv") == 0
    said, row = capsys.readouterr().out, metrics()
    same = ["evaluate", "--samples", "out/explanations", "--reference", "real.npy", "--reference-labels", "real.csv"]
    assert cli.main([*same, "--classifier", "judge", "--target", target, "--out", "row.json"]) == 0
    there = json.loads((tmp_path / "row.json").read_text())
    for name in ("fd_judge", "cfd_judge", "ckd_judge", "precision", "off_manifold"):
        assert row[name] == pytest.approx(there[name], rel=1e-5), name
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]
    assert (row["num_reference"], row["num_reference_target"]) == (30, 10) and "real.npy" in row["reference"]
    assert re.search(r"^cfd_judge +[0-9.]+ +[0-9.]+ to [0-9.]+$", said, re.MULTILINE)
    # Without labels, or without one class aimed at, all images are compared, and that is said.
    assert run(*flags) == 0
    assert "cfd_judge" not in metrics() and metrics()["fd_judge"] == pytest.approx(row["fd_judge"])
    assert "note: --reference: without labels all of its images are compared" in capsys.readouterr().err
    assert run("--judge", "judge", "--reference", "real.npy", "--reference-labels", "real.csv") == 0
    assert "cfd_judge" not in metrics() and "there is not one class aimed at" in capsys.readouterr().err


def test_real_images_of_another_size_are_resized_where_asked(here, real, tmp_path, capsys):
    large = real.repeat(2, axis=1).repeat(2, axis=2)
    np.save("large.npy", large)
    flags = ("--judge", "judge", "--reference", "large.npy")
    assert run(*flags) == 1
    said = capsys.readouterr().err
    assert "large.npy: holds an image of 16 x 16 x 3, the model's are 8 x 8 x 3; --resize-reference resizes" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()  # before anything is explained
    assert run(*flags, "--resize-reference") == 0
    assert metrics()["reference"].startswith("large.npy, resized to 8 first")


def test_seeds_noise_and_identity(here, tmp_path):
    same = ("--tau", "0.5", "--weight", "1", "--search", "none", "--judge", "judge")
    assert run(*same, "--num-seeds", "2", "--noise", "0.1", "--identity", "judge", "--identity-threshold", "0") == 0
    row, names = metrics(), {path.name for path in (tmp_path / "out/explanations").iterdir()}
    assert names == {f"{place:05d}{ending}.png" for place in range(7) for ending in ("", "_seed1")}
    assert all(float(one["seed_validity"]) in (0, 0.5, 1) for one in table())
    columns = ("seed_validity", "seed_always", "seed_diversity_l1", "seed_spread_l1", "seed_diversity_judge")
    for name in (*columns, "noise_kept", "identity_similarity_judge", "identity_verified_judge", "cout"):
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"], name
    assert (tmp_path / "out/explanations.html").read_text().count("data:image/png;base64,") == 4 * 7
    # The second seed is the next one's first.
    second = [(tmp_path / f"out/explanations/{place:05d}_seed1.png").read_bytes() for place in range(7)]
    assert run(*same, "--seed", "1", out="next") == 0
    assert second == [(tmp_path / f"next/explanations/{place:05d}.png").read_bytes() for place in range(7)]
    assert metrics("next")["l1"] > 0 and "seed_validity" not in metrics("next")


def test_a_target_that_is_the_prediction_is_said_skipped_and_counted(here, tmp_path, capsys):
    assert run() == 0
    own = [row["from"] for row in table()]
    assert run("--target", own[0]) == 0
    said = capsys.readouterr().err
    count = own.count(own[0])
    assert f"note: {count} of 7 images skipped: the guide calls them the target already" in said
    rows = table()
    assert [row["status"] == "skipped" for row in rows] == [name == own[0] for name in own]
    assert len(list((tmp_path / "out/explanations").iterdir())) == 7
    # All of them: nothing to measure, nothing lost.
    np.save("images.npy", here[[place for place, name in enumerate(own) if name == own[0]]])
    assert run("--target", own[0]) == 0
    assert {row["status"] for row in table()} == {"skipped"}


def test_images_that_are_called_otherwise_than_their_label_are_counted(here, tmp_path, capsys):
    assert run() == 0
    own = [row["from"] for row in table()]
    labels = [*own[:-1], next(name for name in BALLS if name != own[-1])]
    (tmp_path / "labels.csv").write_text("\n".join(labels) + "\n")
    assert run("--labels", "labels.csv") == 0
    assert "note: 1 of 7 images are called otherwise than their label" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/explanations.json").read_text())["metrics"]["num_misclassified"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kind", "contrafactual"), "argument --kind: invalid choice: 'contrafactual'"),
        (("--distance", "l3"), "argument --distance: invalid choice: 'l3'"),
        (("--tau", "1.5"), "tau: 1.5 is not in [0, 1]"),
        (("--cone-angle", "95"), "cone_angle: 95.0 is not in [0, 90] degrees"),
        (("--target", "tennis"), "target 'tennis' is no class of the classifier; allowed: baseball"),
        (("--stabilizer", "emma"), "stabilizer 'emma' is unknown"),
        (("--images", "nowhere"), "nowhere: no such file or folder"),
        (("--robust", "nowhere"), "nowhere"),
        (("--reference", "nowhere"), "nowhere: no such file or folder"),
        (("--reference", "images.npy", "--features", "judge"), "--features judge: give the judge by --judge"),
        (("--features", "judge"), "--features: says how real images are compared; give --reference"),
        (("--reference", "few.npy"), "--reference: few.npy holds 5 images; 6 or more are needed"),
        (
            ("--reference", "images.npy", "--reference-labels", "one.csv", "--target", "baseball"),
            "--target: images.npy holds 0 of the class 'baseball', 6 or more are needed; its labels: soccer",
        ),
        (("--identity", "judge"), "--identity judge: give the judge by --judge"),
        (("--num-seeds", "0"), "argument --num-seeds: 0 is not a whole number >= 1"),
        (("--noise", "1.5"), "argument --noise: 1.5 is not in 0..1"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_lost(here, tmp_path, capsys, flags, words):
    np.save("few.npy", here[:5])
    (tmp_path / "one.csv").write_text("soccer\n" * 7)
    assert run() == 0
    before = tree(tmp_path / "out")
    capsys.readouterr()
    assert run(*flags) != 0
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert tree(tmp_path / "out") == before
