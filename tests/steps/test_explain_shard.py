"""Explanations of an experiment's validation images: which images, which shard, which seed."""

import json
import shutil

import numpy as np
import pytest
from toys import BALLS, TINY_SIZE, toy_settings, write_balls, write_tiny_models

from nrcg import cli, config
from nrcg.csv_files import read_csv
from nrcg.data.arrays import open_split
from nrcg.steps.explain_shard import choose_images

WAYS = {"counterfactual": {"kind": "counterfactual", "search": "none"}, "nearest": {"kind": "nearest"}}
BLOCK = {
    "pairs": None,
    "num_images": 3,
    "num_seeds": 2,
    "noise": 0.1,
    "identities": ["judge"],
    "shard_size": 4,
    "batch_size": 2,
    "seed": 1,
    "methods": WAYS,
    "bits": False,
}
PAIRS = [["soccer", "baseball"], ["baseball", "soccer"]]


def settings(**changes):
    raw = toy_settings(explain=BLOCK | changes)
    return config.step_settings(config.parse(raw), "toy", "explain", "counterfactual")


def test_the_first_images_of_each_pair():
    labels = np.array([0, 2, 1, 2, 0, 2, 2, 0])
    chosen = choose_images(settings(pairs=PAIRS), labels, BALLS)
    assert chosen.rows.tolist() == [1, 3, 5, 0, 4, 7] and chosen.targets.tolist() == [0, 0, 0, 2, 2, 2]
    assert chosen.pair.tolist() == [0, 0, 0, 1, 1, 1] and chosen.pairs == ["soccer to baseball", "baseball to soccer"]
    others = choose_images(settings(), labels, BALLS)
    assert others.rows.tolist() == [1, 2, 3] and others.pairs == ["others to baseball"]


def test_the_runs_of_an_image_are_its_seeds_and_one_with_noise():
    assert settings().explain.num_runs == 3 and settings(noise=0.0, num_seeds=1).explain.num_runs == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    write_tiny_models(folder)
    write_balls(folder / "data", 24, 24, image_size=TINY_SIZE)
    (folder / "toy.yaml").write_text(json.dumps(toy_settings(explain=BLOCK | {"pairs": PAIRS})))
    return folder


def run(place, verb, *flags, way="counterfactual"):
    same = ["--config", str(place / "toy.yaml"), "--experiment", "toy", "--explainer", way]
    files = ["--data", str(place / "data"), "--ddpm", str(place / "ddpm"), "--classifiers", str(place / "classifiers")]
    return cli.main([verb, *same, *files, *flags])


def test_shards_hold_every_seed_and_are_measured_pair_by_pair(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NRCG_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    shards = [f"shard{number:04d}.npz" for number in range(2)]
    for number, out in enumerate(shards):
        assert run(place, "explain-shard", "--shard", f"{number:04d}", "--out", out) == 0
    with np.load(shards[0]) as first, np.load(shards[1]) as second:
        assert (len(first["rows"]), len(second["rows"])) == (4, 2)
        images, _ = open_split(place / "data", "val")
        np.testing.assert_array_equal(second["0.originals"], images[second["rows"]])
        assert (first["0.originals"] != first["noised.originals"]).any()
        assert (first["0.images"] != first["1.images"]).any()  # another seed, another explanation
    assert run(place, "evaluate-explanations", "--shards", *shards, "--out", "counterfactual.csv") == 0
    rows = read_csv("counterfactual.csv")
    assert [row["pair"] for row in rows] == ["soccer to baseball", "baseball to soccer"]
    assert all(row["num_images"] == 3 for row in rows)
    # Untrained, the guide calls all images one class: where that is aimed at, nothing is explained.
    made, skipped = sorted(rows, key=lambda row: row["num_skipped"])
    assert (made["num_skipped"], skipped["num_skipped"]) in ((0, 3), (0, 0))
    assert np.isfinite(made["validity_judge"]) and np.isfinite(made["validity_robust"])
    assert "validity_non_robust" not in made
    for name in ("seed_validity", "seed_diversity_l1", "noise_kept", "identity_similarity_judge", "cout"):
        assert made[f"{name}_lo"] <= made[name] <= made[f"{name}_hi"], name
    assert skipped["num_skipped"] == 0 or (np.isnan(skipped["validity"]) and "every image" in skipped["missing"])
    assert run(place, "explain-shard", "--shard", "5", "--out", "past.npz") == 1
    assert "shard 5 is past the last of 6 images" in capsys.readouterr().err
    shutil.copy(shards[0], "half.npz")
    assert run(place, "evaluate-explanations", "--shards", "half.npz", "--out", "a.csv") == 1
    assert "4 explanations where 6 are asked for" in capsys.readouterr().err
    assert run(place, "explain-shard", "--shard", "0", "--out", "a.npz", way="other") == 1
    assert "explainer 'other' is unknown; allowed: counterfactual, nearest" in capsys.readouterr().err


def test_the_nearest_training_images(place, tmp_path, monkeypatch):
    monkeypatch.setenv("NRCG_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    assert run(place, "explain-shard", "--shard", "0", "--out", "nearest.npz", way="nearest") == 0
    train, labels = open_split(place / "data", "train")
    with np.load("nearest.npz") as found:
        for image, original, target in zip(found["0.images"], found["0.originals"], found["0.targets"], strict=True):
            apart = np.abs(train[labels == target].astype(int) - original).mean(axis=(1, 2, 3))
            assert np.abs(image.astype(int) - original).mean() == apart.min()
