"""Metrics of explanations against hand-computed values."""

import numpy as np
import pytest
import torch
from torch import nn

from nrcg import Classifier
from nrcg.evaluation.features import ClassifierExtractor
from nrcg.evaluation.frechet import FeatureStatistics, frechet_distance
from nrcg.evaluation.intervals import wilson_interval
from nrcg.evaluation.references import make_reference
from nrcg.explain import Explanations, evaluate_explanations, judged, nearest_images
from nrcg.explain.metrics import closeness_estimates, identity_estimates, split_frechet
from nrcg.explain.page import difference_map, explanations_page
from nrcg.explain.perceptual import Perceptual
from nrcg.explain.repeats import noise_estimates, seed_estimates
from nrcg.explain.transition import transition_scores


def explanations(count=8, **changes):
    rng = np.random.default_rng(0)
    originals, images = (rng.integers(0, 256, (count, 6, 6, 3), np.uint8) for _ in range(2))
    before = np.tile(np.float32([0.7, 0.2, 0.1]), (count, 1))
    after = np.tile(np.float32([0.2, 0.7, 0.1]), (count, 1))
    nothing = np.zeros(count)
    found = {
        "originals": originals,
        "images": images,
        "starts": originals,
        "targets": np.ones(count, np.int64),
        "before": before,
        "after": after,
        "tau": nothing + 0.5,
        "weight": nothing,
        "skipped": nothing > 0,
        "nonfinite": nothing > 0,
        "seconds": nothing + 0.25,
    }
    return Explanations(**found | changes)


class Brightness(nn.Module):
    """Three classes by the brightness of each channel; its features are linear in the image."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(3))

    def forward(self, x):
        return self.last(x.mean(dim=(2, 3)))


def test_validity_confidence_and_counts_by_hand():
    after = np.float32([[0.1, 0.8, 0.1]] * 5 + [[0.1, 0.3, 0.6]] * 2 + [[0.6, 0.3, 0.1]])
    skipped, nonfinite = np.zeros(8, bool), np.zeros(8, bool)
    skipped[0] = nonfinite[1] = True
    row = evaluate_explanations(explanations(after=after, skipped=skipped, nonfinite=nonfinite), labels=np.zeros(8))
    assert (row["num_images"], row["num_skipped"], row["num_nonfinite"], row["num_misclassified"]) == (8, 1, 1, 0)
    # Seven were made: three of the target and finite, two of another class, one of the old one.
    assert row["validity"] == pytest.approx(3 / 7) and row["flipped_elsewhere"] == pytest.approx(2 / 7)
    assert row["target_confidence_before"] == pytest.approx(0.2) and row["original_confidence_before"] == pytest.approx(
        0.7
    )
    assert row["target_confidence"] == pytest.approx((4 * 0.8 + 3 * 0.3) / 7)
    assert row["original_confidence"] == pytest.approx((6 * 0.1 + 0.6) / 7) and row["seconds"] == 0.25
    for name in ("validity", "flipped_elsewhere", "target_confidence", "l1", "changed", "total_variation"):
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]


def test_closeness_by_hand():
    original = np.full((2, 4, 4, 1), 100, np.uint8)
    image = original.copy()
    image[0, 0, 0] += 51  # one of 16 pixels by a fifth of the range
    image[1, :, :2] += 8  # eight pixels by eight levels: not more than 8
    found = closeness_estimates(explanations(originals=original, images=image))
    assert found["l1"].value == pytest.approx((0.2 / 16 + 8 / 255 / 2) / 2)
    assert found["l2"].value == pytest.approx(((0.04 / 16) ** 0.5 + (8 / 255) / 2**0.5) / 2)
    assert found["l15"].value == pytest.approx(((0.2**1.5 / 16) ** (2 / 3) + 8 / 255 / 2 ** (2 / 3)) / 2)
    assert found["changed"].value == pytest.approx(1 / 32)
    # Steps between neighbours: 12 a direction. A corner has one each way; the edge between halves has four.
    assert found["total_variation"].value == pytest.approx((2 * 0.2 / 12 + 4 * 8 / 255 / 12) / 2)


def test_split_frechet_by_hand():
    """Halves of one-dimensional features: (difference of means)^2 + (difference of deviations)^2, crosswise."""
    explained, originals = np.float64([1, 5, 3, 9, 2, 7])[:, None], np.float64([0, 2, 4, 8, 5, 3])[:, None]
    values = []
    for ours, real in ((explained[::2], originals[1::2]), (explained[1::2], originals[::2])):
        values.append((ours.mean() - real.mean()) ** 2 + (ours.std(ddof=1) - real.std(ddof=1)) ** 2)
    found = split_frechet(explained, originals)
    assert found.value == pytest.approx(np.mean(values), rel=1e-9) and found.influence.shape == (6,)
    assert found.influence.mean() == pytest.approx(0, abs=1e-12)
    # An unchanged set is not at distance 0: its halves differ.
    same = split_frechet(originals, originals).value
    halves = [FeatureStatistics.from_features(originals[start::2]) for start in (0, 1)]
    assert same == pytest.approx(frechet_distance(*halves), rel=1e-9) and same > 0


def test_the_influence_on_split_frechet_is_its_derivative():
    """Against a sample counted twice, to first order in 1 / n."""
    rng = np.random.default_rng(0)
    explained, originals = rng.normal(1, 2, (400, 2)), rng.normal(0, 1, (400, 2))
    found = split_frechet(explained, originals)
    for row in (0, 7):
        twice = np.concatenate([explained, explained[[row, row + 1]]])  # one more in each half
        half = [twice[start::2] for start in (0, 1)]
        half[1 - row % 2] = half[1 - row % 2][:-1]  # but in one alone
        values = [
            frechet_distance(
                FeatureStatistics.from_features(ours), FeatureStatistics.from_features(originals[other::2])
            )
            for ours, other in zip(half, (1, 0), strict=True)
        ]
        assert 400 * (np.mean(values) - found.value) == pytest.approx(found.influence[row], rel=0.1, abs=0.1)


def test_judges_references_and_seeds_add_their_columns():
    judge = Classifier(Brightness())
    extractor = ClassifierExtractor(judge)
    made, other = explanations(), explanations(images=np.random.default_rng(5).integers(0, 256, (8, 6, 6, 3), np.uint8))
    real = np.random.default_rng(1).integers(0, 256, (40, 6, 6, 3), np.uint8)
    reference = make_reference(extractor, real, np.arange(40) % 3, 1)
    row = evaluate_explanations(
        made,
        judges={"judge": judge},
        extractors=[extractor],
        references=[reference],
        bits_per_dim=np.arange(8.0),
        seeds=[other],
        perceptual=Perceptual(),
    )
    features = [extractor(one) for one in (made.images, made.originals, other.images)]
    apart = np.linalg.norm(features[0] - features[1], axis=1)
    assert row["feature_distance_judge"] == pytest.approx(apart.mean(), rel=1e-5)
    apart = np.linalg.norm(features[0] - features[2], axis=1)
    assert row["seed_diversity_judge"] == pytest.approx(apart.mean(), rel=1e-5)
    seen = judged(judge, made.originals, made.images, made.targets, "judge")
    assert row["validity_judge"] == pytest.approx((seen.found == 1).mean()) and row["bits_per_dim"] == 3.5
    for name in ("cfd_judge", "sfd_judge", "target_confidence_judge", "off_manifold"):
        assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"], name
    if "lpips" not in row:
        assert row["missing"].startswith("lpips: ")


class Bright(nn.Module):
    """Two classes, sharp enough to be a step: whether more than half of some pixels are bright."""

    def __init__(self, places=slice(None)):
        super().__init__()
        self.places = places

    def forward(self, x):
        bright = (x.mean(dim=1).flatten(1)[:, self.places] > 0).float().mean(dim=1)
        return torch.stack([0.5 - bright, bright - 0.5], dim=1) * 1e4


def scores(classifier, originals, images, **settings):
    own = np.zeros(len(images), int)
    return transition_scores(classifier, originals, images, own, own + 1, **settings)


def test_cout_by_hand():
    """Of 16 pixels, one more in each step; the decision turns once more than half are bright."""
    originals, images = np.zeros((3, 4, 4, 1), np.uint8), np.zeros((3, 4, 4, 1), np.uint8)
    images[0] = 255  # p(target) is 0 up to 7 pixels, 1 / 2 at 8, 1 from 9 on
    images[1, :3] = 255  # 12 bright ones, then four that do not change
    images[2, 0] = 255  # never
    # Of 16 intervals 7 lie at -1 and 7 at 1; those beside 8 at -1 / 2 and 1 / 2.
    np.testing.assert_allclose(scores(Bright(), originals, images), [0.0, 0.0, -1.0], atol=1e-6)


def test_cout_makes_the_largest_changes_first():
    originals, images = np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 1), np.uint8)
    images[0], images[1] = 10, 255
    images[:, 3, 3] = 200  # alone decides; changed first of all, or last
    corner = Bright(slice(15, 16))
    np.testing.assert_allclose(scores(corner, originals, images), [15 / 16, -15 / 16], atol=1e-6)
    # Three steps, of 5, 6 and 5 pixels: it turns within the first, or the last.
    np.testing.assert_allclose(scores(corner, originals, images, steps=3), [11 / 16, -11 / 16], atol=1e-6)


def test_cout_is_of_those_that_aim_at_another_class():
    made, judge = explanations(), Classifier(Brightness())
    row = evaluate_explanations(made, guide=judge)
    assert row["cout_lo"] <= row["cout"] <= row["cout_hi"]
    back = evaluate_explanations(explanations(targets=np.zeros(8, np.int64)), guide=judge)
    assert "cout" not in back and "cout: the class aimed at is the image's own" in back["missing"]


class FirstPixels:
    """Features: the first two pixels."""

    name, dim, protocol = "pixels", 2, "the first two"

    def __call__(self, images):
        return images[:, 0, :2, 0].astype(np.float32)


def test_identity_by_hand():
    originals, images = np.zeros((4, 2, 2, 1), np.uint8), np.zeros((4, 2, 2, 1), np.uint8)
    originals[:, 0, 0] = 10
    images[:, 0, :, 0] = [[20, 0], [0, 5], [30, 40], [0, 0]]  # cosines 1, 0, 0.6, and 0 of nothing
    found = identity_estimates(explanations(4, originals=originals, images=images), FirstPixels(), 0.5)
    assert found["identity_similarity_pixels"].value == pytest.approx(0.4)
    assert found["identity_verified_pixels"].value == 0.5
    assert found["identity_verified_pixels"].interval == wilson_interval(2, 4)


def test_seeds_by_hand():
    originals = np.zeros((2, 2, 2, 1), np.uint8)
    levels = [[51, 0], [102, 0], [0, 51]]  # of three seeds, for either image
    runs = []
    for place, level in enumerate(levels):
        images = originals + np.array(level, np.uint8).reshape(2, 1, 1, 1)
        after = np.float32([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1] if place else [0.1, 0.8, 0.1]])
        runs.append(explanations(2, originals=originals, images=images, before=np.eye(3)[[0, 0]], after=after))
    found = {name: one.value for name, one in seed_estimates(runs).items()}
    assert found["seed_validity"] == pytest.approx((1 + 1 / 3) / 2) and found["seed_always"] == 0.5
    # L1 between seeds, first image: 0.2, 0.2, 0.4; second: 0, 0.2, 0.2.
    assert found["seed_diversity_l1"] == pytest.approx((0.8 / 3 + 0.4 / 3) / 2)
    assert found["seed_spread_l1"] == pytest.approx((np.std([0.2, 0.4, 0], ddof=1) + np.std([0, 0, 0.2], ddof=1)) / 2)


def test_noise_by_hand():
    originals = np.full((4, 2, 2, 1), 100, np.uint8)
    images, noised, found = originals + 10, originals.copy(), originals + 10
    noised[:, 0, 0] += 3
    noised[:, 0, 1] -= 4  # each image by norm 5
    found[0, 1, 1] += 10  # twice as much
    found[1, 1, 1] += 5
    found[2] = 0
    called = np.eye(3, dtype=np.float32)
    plain = explanations(4, originals=originals, images=images, before=called[[0] * 4], after=called[[1] * 4])
    other = explanations(4, originals=noised, images=found, before=called[[0, 0, 2, 0]], after=called[[1, 2, 1, 1]])
    missing = []
    row = {name: one.value for name, one in noise_estimates(plain, other, missing).items()}
    # The third image is called otherwise with the noise: its explanation answers another question.
    assert row == {"noise_kept": 0.75, "noise_agreement": pytest.approx(2 / 3), "noise_ratio": pytest.approx(1.0)}
    assert not missing
    same = noise_estimates(plain, plain, missing)
    assert set(same) == {"noise_kept"} and missing[0].startswith("noise_ratio: no image that the noise changes")


def test_further_extractors_have_their_names_in_every_column():
    judge = Classifier(Brightness())
    extractors = [ClassifierExtractor(judge), ClassifierExtractor(judge, "other")]
    real = np.random.default_rng(1).integers(0, 256, (40, 6, 6, 3), np.uint8)
    references = [make_reference(one, real, np.arange(40) % 3, 1) for one in extractors]
    row = evaluate_explanations(explanations(), extractors=extractors, references=references)
    assert row["cfd_judge"] == row["cfd_other"] and row["precision"] == row["precision_other"]
    assert (row["num_reference"], row["num_reference_target"]) == (40, 13) and row["protocols"].count(" | ") == 1


def test_the_nearest_image_of_the_target_class():
    rng = np.random.default_rng(0)
    originals, images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8), rng.integers(0, 256, (30, 4, 4, 3), np.uint8)
    labels, targets = np.arange(30) % 3, np.array([0, 1, 2, 1, 0])
    found = nearest_images(originals, images, labels, targets)
    for image, original, target in zip(found, originals, targets, strict=True):
        apart = np.abs(images[labels == target].astype(int) - original).sum(axis=(1, 2, 3))
        assert np.array_equal(image, images[labels == target][apart.argmin()])


def test_difference_maps_are_white_where_nothing_changes():
    original = np.full((1, 3, 1), 100, np.uint8)
    image = np.array([100, 140, 80], np.uint8).reshape(1, 3, 1)
    assert difference_map(original, image).reshape(3, 3).tolist() == [[255, 255, 255], [255, 0, 0], [128, 128, 255]]
    assert (difference_map(original, original) == 255).all()


def test_the_page_escapes_and_stands_alone():
    made = explanations(classes=["<b>", '"cat"', "dog"])
    rows = [{"image": f"<i>{place}", "from": made.name(0), "p": 0.5} for place in range(8)]
    page = explanations_page(made, rows, title="<h1>", facts={"guide": "<script>"})
    for text in ("<i>", "<b>", "<script>alert", "<h1><"):
        assert text not in page.replace("<h1>&lt;h1&gt;", "")
    assert "&lt;script&gt;" in page and "http" not in page
