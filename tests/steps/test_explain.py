"""`nrcg explain`: pictures, table and page of anybody's images, kept part by part."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from toys import BALLS, TINY_SIZE, write_tiny_classifier, write_tiny_pipeline

from nrcg import cli
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
    make = explain.explain_images

    def counted(*arguments, **settings):
        done.append(settings["samples"][0])
        return make(*arguments, **settings)

    monkeypatch.setattr(explain, "explain_images", counted)
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
    ],
)
def test_mistakes_are_one_line_and_nothing_is_lost(here, tmp_path, capsys, flags, words):
    assert run() == 0
    before = tree(tmp_path / "out")
    capsys.readouterr()
    assert run(*flags) != 0
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert tree(tmp_path / "out") == before
