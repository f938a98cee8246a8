"""Evaluation of samples: shards are joined and checked, rows hold every metric with its interval, references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nrcg import config
from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import calibration_error, predict, target_share
from nrcg.data.shards import read_samples
from nrcg.errors import DataError
from nrcg.evaluation.evaluate import classifier_quality, evaluate_features, evaluate_images
from nrcg.evaluation.frechet import FeatureStatistics, frechet_distance
from nrcg.evaluation.intervals import wilson_interval
from nrcg.evaluation.pairwise import fixed_choice, precision_recall
from nrcg.evaluation.references import ReferenceCollector, cached_reference, make_reference
from nrcg.files import sha256_file, write_record
from nrcg.layout import setting_folder
from nrcg.steps.evaluate import sample_settings
from nrcg.steps.reference import read_reference_record

SHARD = 4


def write_shard(folder: Path, number: int, count: int = SHARD, **changes) -> Path:
    """A shard whose images hold their sample's number."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard{number:04d}.npy"
    first = number * SHARD
    images = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    np.save(path, images)
    record = {
        "first_sample": first,
        "nonfinite": number,
        "seconds": 2.0,
        "peak_memory_mib": 100.0 + number,
        "sha256": sha256_file(path),
    }
    write_record(path.with_suffix(".json"), record | changes)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten samples in three shards, written last first."""
    for number in (2, 1, 0):
        write_shard(tmp_path, number, count=2 if number == 2 else SHARD)
    return tmp_path


def test_shards_are_joined_in_order(folder):
    samples = read_samples(folder, 10)
    assert samples.images.shape == (10, 2, 2, 3)
    assert samples.images.dtype == np.uint8
    assert samples.images[:, 0, 0, 0].tolist() == list(range(10))
    assert samples.nonfinite == 0 + 1 + 2
    assert samples.images_per_second == pytest.approx(10 / 6.0)
    assert samples.peak_memory_mib == 102.0


def test_shards_of_an_earlier_and_larger_run_are_not_read(folder):
    assert len(read_samples(folder, 8).images) == 8


def cut_off(folder: Path) -> None:
    path = folder / "shard0001.npy"
    path.write_bytes(path.read_bytes()[:-5])


def changed(folder: Path) -> None:
    np.save(folder / "shard0001.npy", np.zeros((SHARD, 2, 2, 3), np.uint8))


DAMAGES = {
    "checksum": (changed, "shard0001.npy: is not what its .json says"),
    "cut off": (cut_off, "shard0001.npy: damaged"),
    "empty": (lambda folder: (folder / "shard0001.npy").write_bytes(b""), "shard0001.npy: damaged"),
    "no record": (lambda folder: (folder / "shard0001.json").unlink(), "shard0001.npy: damaged or without its .json"),
    "broken record": (lambda folder: (folder / "shard0001.json").write_text("{"), "shard0001.npy: damaged"),
    "record of another kind": (lambda folder: (folder / "shard0001.json").write_text("[]"), "shard0001.npy: "),
    "record without a key": (lambda folder: (folder / "shard0001.json").write_text("{}"), "a key is missing"),
    "gap": (lambda folder: (folder / "shard0001.npy").unlink(), "its shards begin at samples [0, 8], expected [0, 4]"),
    "a short shard": (lambda folder: write_shard(folder, 1, count=3), "begin at samples [0, 4, 8], expected [0, 4, 7]"),
    "too few": (lambda folder: (folder / "shard0002.npy").unlink(), "hold 8 samples, expected 10"),
    "none": (lambda folder: [path.unlink() for path in folder.glob("*.npy")], "shard0000.npy: not found"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line_that_names_the_file(folder, damage):
    break_it, text = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(DataError) as caught:
        read_samples(folder, 10)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert text in message
    assert "\n" not in message


MADE_BY = {"method": "robust", "scale": 2.5, "settings": "0123", "weights_sha256": {"ddpm": "ab", "classifier": "cd"}}


@pytest.mark.parametrize(
    "key, other, words",
    [
        ("settings", "4567", "was made by other settings"),
        ("weights_sha256", {"ddpm": "ab", "classifier": "ce"}, "was made by other weights"),
        ("weights_sha256", {"ddpm": "ab"}, "was made by other weights"),
        ("method", "non_robust", "was made by another method"),
        ("scale", 5.0, "was made by another scale"),
    ],
)
def test_a_shard_of_another_run_is_refused(tmp_path, key, other, words):
    """It is whole, and belongs elsewhere: copied here, or left by other models."""
    for number in range(3):
        write_shard(tmp_path, number, count=2 if number == 2 else SHARD, **MADE_BY)
    assert len(read_samples(tmp_path, 10, MADE_BY).images) == 10
    path = write_shard(tmp_path, 1, **MADE_BY | {key: other})
    with pytest.raises(DataError) as caught:
        read_samples(tmp_path, 10, MADE_BY)
    assert str(caught.value).startswith(f"{path}: {words}")
    assert caught.value.path == path


@pytest.mark.parametrize("method", ["unconditional", "non_robust_x0_ema99"])
def test_an_evaluation_knows_the_fingerprint_of_its_samples(method):
    """The settings that draw the samples, found from those that evaluate them."""
    whole = config.load(Path(__file__).parents[2] / "config.yaml")
    drawn = config.step_settings(whole, "quickstart", "sample", method)
    evaluated = config.step_settings(whole, "quickstart", "evaluate", method)
    assert sample_settings(evaluated).fingerprint() == drawn.fingerprint()


@pytest.mark.parametrize(("scale", "name"), [(10.0, "scale10"), (2.5, "scale2.5"), (0.0, "scale0")])
def test_setting_folder(scale, name):
    assert setting_folder(Path("samples"), "robust", scale) == Path("samples/robust") / name


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 0."""

    def __init__(self, one_logit: bool):
        super().__init__()
        self.one_logit = one_logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))[:, None]
        return mean if self.one_logit else torch.cat([-mean, mean], dim=1)


def striped(count: int, seed: int, grey: int | None = None) -> np.ndarray:
    """(count, 8, 8, 3) uint8: noise around a grey level of each image."""
    rng = np.random.default_rng(seed)
    level = rng.integers(40, 216, (count, 1, 1, 1)) if grey is None else np.full((count, 1, 1, 1), grey)
    return np.clip(level + rng.integers(-30, 31, (count, 8, 8, 3)), 0, 255).astype(np.uint8)


class Moments:
    """(n, H, W, C) -> (n, 6): mean and deviation of each channel."""

    name, dim, protocol = "moments", 6, "mean and deviation"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1).astype(np.float32)


class Corners:
    """Another protocol: the corner pixels."""

    name, dim, protocol = "corners", 3, "first pixel"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, 0].astype(np.float32)


@pytest.fixture(scope="module")
def real():
    images = striped(240, 0)
    return images, (images.mean(axis=(1, 2, 3)) > 127.5).astype(int)


@pytest.fixture(scope="module")
def references(real):
    return [make_reference(extractor, *real, 1) for extractor in (Moments(), Corners())]


METRICS = ("precision", "recall", "density", "coverage")


def test_a_row_holds_every_protocol_and_interval(references):
    judge, guide = Classifier(Brightness(False)), Classifier(Brightness(True))
    row = evaluate_images(striped(90, 1), references, [Moments(), Corners()], target=1, judge=judge, guide=guide)
    names = [name.removesuffix("_lo") for name in row if name.endswith("_lo")]
    assert names == [
        *("accuracy_guide", "accuracy_judge", "accuracy_gap"),
        *("fd_moments", "kd_moments", *(f"{name}_all" for name in METRICS)),
        *("cfd_moments", "ckd_moments", *METRICS, "off_manifold", "diversity"),
        *("fd_corners", "kd_corners", *(f"{name}_all_corners" for name in METRICS)),
        *("cfd_corners", "ckd_corners", *(f"{name}_corners" for name in METRICS)),
        *("off_manifold_corners", "diversity_corners"),
    ]
    for name in names:
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"], name
        assert row[f"{name}_lo"] < row[f"{name}_hi"], name
    assert (row["num_samples"], row["num_reference"], row["num_pairwise"]) == (90, 240, 90)
    assert row["accuracy_guide"] == row["accuracy_judge"]
    assert row["protocols"] == "moments: mean and deviation | corners: first pixel"


def test_cfid_compares_with_the_target_class_alone(real, references):
    """Fresh images of the target class: near to it, far from the whole."""
    samples = striped(200, 2)
    samples = samples[samples.mean(axis=(1, 2, 3)) > 127.5]
    row = evaluate_images(samples, references[:1], [Moments()])
    assert row["cfd_moments_hi"] < row["fd_moments_lo"]
    assert row["recall"] > row["recall_all"] and row["coverage"] > row["coverage_all"]
    assert row["num_reference_target"] == real[1].sum()
    features, target = Moments()(samples), Moments()(real[0][real[1] == 1])
    expected = frechet_distance(*(FeatureStatistics.from_features(x) for x in (features, target)))
    assert row["cfd_moments"] == pytest.approx(expected, rel=1e-9)


def test_samples_may_come_in_any_pieces(references):
    """One array, an iterator of shards: the same row."""
    samples, extractors = striped(70, 1), [Moments(), Corners()]
    whole = evaluate_images(samples, references, extractors)
    pieces = evaluate_images(iter(np.split(samples, [10, 11, 50])), references, extractors)
    assert whole == pieces


def test_without_a_target_there_is_one_comparison(real):
    reference = make_reference(Moments(), real[0])
    row = evaluate_images(real[0], [reference], [Moments()])
    assert not any(name.startswith(("cfd", "ckd", "accuracy")) or "_all" in name for name in row)
    assert abs(row["fd_moments"]) < 1e-6
    assert [row[name] for name in METRICS] == [1.0, 1.0, 1.0, 1.0]
    assert row["diversity"] == pytest.approx(1.0)


def test_diversity_is_that_of_the_samples_in_the_class(real):
    """Held against held-out images; the judge's choice leaves out the dark half, and one grey level is less diverse."""
    held_out = striped(400, 5)
    held_out = held_out[held_out.mean(axis=(1, 2, 3)) > 127.5]
    reference = make_reference(Moments(), *real, 1, held_out=held_out)
    judge = Classifier(Brightness(False))
    fresh = evaluate_images(striped(300, 6), [reference], [Moments()], target=1, judge=judge)
    assert fresh["diversity_lo"] < 1 < fresh["diversity_hi"]
    narrow = np.concatenate([striped(60, 7, grey=170), striped(60, 8, grey=60)])
    assert evaluate_images(narrow, [reference], [Moments()], target=1, judge=judge)["diversity_hi"] < 0.3


def test_another_protocol_than_the_references_is_refused(references):
    class Changed(Moments):
        protocol = "mean and deviation, of larger images"

    with pytest.raises(DataError, match=r"made by moments \(mean and deviation\), .* larger images\): they cannot be"):
        evaluate_images(striped(20, 1), references[:1], [Changed()])


@pytest.mark.parametrize("count, words", [(1, "at least 2 samples, got 1"), (5, "more than k = 5 images a side")])
def test_too_few_samples(references, count, words):
    with pytest.raises(DataError, match=words):
        evaluate_images(striped(count, 1), references[:1], [Moments()])


@pytest.mark.parametrize("one_logit", [False, True])
@pytest.mark.parametrize("count", [8, 600])
def test_accuracy_is_the_targets_share(one_logit, count):
    """A quarter of the images is bright; 600 images take three batches."""
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[::4] = 255
    logits = predict(Classifier(Brightness(one_logit)), images)
    assert logits.shape == (count, 1 if one_logit else 2)
    assert (target_share(logits, 1), target_share(logits, 0)) == (0.25, 0.75)


def test_classifier_quality(real):
    """Brightness decides the labels, so all are right; its confidence is low near the middle."""
    found = classifier_quality(Classifier(Brightness(False)), *real)
    value, low, high = found["clean_accuracy"]
    assert value == high == 1.0 and low == pytest.approx(wilson_interval(240, 240)[0])
    value, low, high = found["ece"]
    logits = predict(Classifier(Brightness(False)), real[0])
    assert value == calibration_error(logits, real[1]) and low <= value <= high and value > 0.1


# --- references ------------------------------------------------------------------------------------------------------


def test_sorted_images_are_compared_like_mixed_ones():
    """Of two sets of two modes each, one after the other and in opposite order, a part is compared in pairs."""
    rng = np.random.default_rng(0)
    low, high = (rng.normal(mean, 1, (2, 400, 6)) for mean in (-20, 20))
    collected = ReferenceCollector(Moments(), num_pairwise=200)
    for rows in (low[0], high[0]):
        collected.add(rows)
    row = evaluate_features([np.concatenate([high[1], low[1]])], [collected.finish()])
    assert row["num_pairwise"] == 200
    assert min(row["precision"], row["recall"], row["coverage"]) > 0.8
    assert row["off_manifold"] < 0.05


def test_more_samples_than_reference_images_all_count():
    samples, real = np.random.default_rng(0).normal(size=(300, 6)), np.random.default_rng(1).normal(size=(60, 6))
    collected = ReferenceCollector(Moments())
    collected.add(real)
    row = evaluate_features([samples], [collected.finish()])
    assert row["num_pairwise"] == 300
    assert (row["precision"], row["recall"]) == precision_recall(real, samples)


def test_a_reference_without_spread_leaves_the_diversity_out():
    collected = ReferenceCollector(Moments())
    collected.add(np.ones((20, 6)))
    row = evaluate_features([np.random.default_rng(0).normal(size=(30, 6))], [collected.finish()])
    assert np.isnan(row["diversity"])
    assert row["precision"] == 0


def test_a_reference_is_read_in_blocks_and_capped(real, monkeypatch):
    monkeypatch.setattr("nrcg.evaluation.references._IMAGES", 50)
    images, labels = real
    found = make_reference(Moments(), images, labels, 1, num_pairwise=30)
    features = Moments()(images)
    for part, rows in ((found.everything, features), (found.target, features[labels == 1])):
        whole = FeatureStatistics.from_features(rows)
        assert part.statistics.n == len(rows)
        np.testing.assert_allclose(part.statistics.cov, whole.cov, rtol=1e-9)
        np.testing.assert_array_equal(part.features, rows[fixed_choice(len(rows), 30)])
        np.testing.assert_allclose(part.factor @ part.factor.T, whole.cov, atol=1e-9 * whole.cov.max())
    row = evaluate_images(striped(50, 1), [found], [Moments()])
    assert (row["num_pairwise"], row["num_samples"]) == (30, 50)


@pytest.mark.parametrize("labels, error", [(None, ValueError), (np.zeros(239), ValueError), (np.zeros(240), DataError)])
def test_a_reference_needs_labels_and_images_of_the_target(real, labels, error):
    with pytest.raises(error):
        make_reference(Moments(), real[0], labels, 1)


def test_the_cache_gives_back_what_was_made(real, tmp_path):
    made = []

    def make():
        made.append(make_reference(Moments(), *real, 1, described="mine"))
        return made[-1]

    key = {"name": "moments", "protocol": "p", "sha256": "0"}
    first, second = (cached_reference(tmp_path, key, make) for _ in range(2))
    assert len(made) == 1 and len(list(tmp_path.iterdir())) == 1
    assert second.identity == first.identity and second.distance == first.distance
    samples = striped(40, 3)
    assert evaluate_images(samples, [first], [Moments()]) == evaluate_images(samples, [second], [Moments()])
    cached_reference(tmp_path, key | {"sha256": "1"}, make)
    assert len(made) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:1000])  # damaged: made anew
    cached_reference(tmp_path, key, make)
    assert len(made) == 3


@pytest.mark.parametrize("text", [None, "{", "[]", '{"classifiers": {"judge": {"ece": [1], "clean_accuracy": [1]}}}'])
def test_a_broken_record_of_the_references_is_named(text, tmp_path):
    path = tmp_path / "reference.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"reference\.json: no record of the references"):
        read_reference_record(path)
