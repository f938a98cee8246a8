"""Explanations of images end to end on toy models: limits, kinds, searches, independence of the batch."""

import numpy as np
import pytest
import torch
from torch import nn
from toys import BALLS, TINY_SIZE, TINY_STEPS, SmoothCNN, write_tiny_pipeline

from nrcg import EMA, Classifier, ClassifierGuidance, GuidedDDPMPipeline, explain
from nrcg.config.explaining import KINDS, settings_of
from nrcg.data.arrays import to_uint8, to_unit
from nrcg.errors import DataError
from nrcg.explain.engine import work_of
from nrcg.explain.repeats import NOISED, noise_estimates, repeats_of
from nrcg.explain.search import bisect, middle_size, middle_step

COUNT = 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path_factory.mktemp("ddpm")))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, TINY_SIZE, TINY_SIZE, 3), np.uint8)


def guide(seed=0):
    return Classifier(SmoothCNN(3, seed=seed), classes=BALLS)


def make(pipe, images, kind="counterfactual", target=None, samples=None, **changes):
    run = {"batch_size": changes.pop("batch_size", 4), "robust": changes.pop("robust", None)}
    settings = settings_of(kind, **{"search": "none", "tau": 0.5, "scale": 2.0} | changes)
    return explain.explain_images(
        pipe, guide(), images, target, settings, samples=samples, on_step=lambda done: None, **run
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("adversarial", "prototype")])
def test_tau_zero_returns_the_images(pipe, images, kind):
    found = make(pipe, images, kind, tau=0.0)
    assert np.array_equal(found.images, images) and not found.tau.any()
    assert np.array_equal(found.before, found.after)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("distance", ["l1", "l15", "l2"])
def test_a_large_weight_returns_the_images_to_the_grey_level(pipe, images, sampler, distance):
    """By the implicit step, whatever the scale: an explicit one would blow up."""
    pipe.use_sampler(sampler)
    found = make(pipe, images, distance=distance, weight=1e12, scale=100.0, tau=1.0)
    pipe.use_sampler("ddpm")
    assert np.array_equal(found.images, images) and (found.tau == 1.0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_prototype_is_guided_sampling_bit_for_bit(pipe, images, precision):
    settings = {"start": "standard_normal", "scale": 3.0, "stabilizer": "ema:0.9", "betas_per_step": True, "seed": 5}
    classifier = guide()
    found = explain.explain_images(
        pipe, classifier, images, "soccer", settings_of("prototype", **settings), batch_size=4, precision=precision
    )
    guidance = ClassifierGuidance(classifier, "soccer", 3.0, stabilizer=EMA(0.9))
    plain = pipe(COUNT, 4, 5, guidance, start="standard_normal", precision=precision, on_step=lambda done: None)
    assert np.array_equal(found.images, to_uint8(plain.samples))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pull": "gradient", "normalize": True},
        {"search": "tau", "rounds": 2},
        {"search": "weight", "rounds": 2},
        {"kind": "affirmative"},
        {"kind": "semifactual"},
        {"kind": "adversarial"},
        {"skip_above": 0.5},
    ],
    ids=str,
)
def test_nothing_depends_on_the_batch_or_on_the_other_images(pipe, images, changes):
    whole = make(pipe, images, batch_size=COUNT, **changes)
    small = make(pipe, images, batch_size=1, **changes)
    rows = [3, 1]
    some = make(pipe, images[rows], samples=rows, batch_size=2, **changes)
    # float32 rounds by the batch; a grey level or two at most.
    assert np.abs(whole.images.astype(int) - small.images).max() <= 2
    assert np.abs(whole.images[rows].astype(int) - some.images).max() <= 2
    assert np.array_equal(whole.tau, small.tau) and np.array_equal(whole.weight, small.weight)


def test_other_seeds_and_numbers_give_other_explanations(pipe, images):
    first = make(pipe, images, weight=1.0)
    assert not np.array_equal(first.images, make(pipe, images, weight=1.0, seed=1).images)
    assert not np.array_equal(first.images, make(pipe, images, weight=1.0, samples=range(10, 10 + COUNT)).images)


def test_runs_are_seeds_and_the_images_with_noise(pipe, images):
    settings = settings_of("counterfactual", search="none", tau=0.5, scale=2.0, weight=1.0, seed=3)
    runs, classifier = repeats_of(settings, num_seeds=2, noise=0.1), guide()
    assert [(one.name, one.settings.seed, one.noise) for one in runs] == [
        *(("0", 3, 0.0), ("1", 4, 0.0), (NOISED, 3, 0.1)),
    ]
    aims = explain.aims_of(classifier, images, None, "counterfactual")
    numbers = list(range(5, 5 + COUNT))
    first, second, noised = (one.explain(pipe, classifier, images, aims, samples=numbers) for one in runs)
    assert np.array_equal(first.images, make(pipe, images, samples=numbers, weight=1.0, seed=3).images)
    assert np.array_equal(second.images, make(pipe, images, samples=numbers, weight=1.0, seed=4).images)
    # An image's noise is its number's, of the deviation asked for, and the aim that of the image without it.
    assert np.array_equal(runs[2].images(images[2:], numbers[2:]), noised.originals[2:])
    assert np.array_equal(noised.targets, aims)
    grey = np.full((64, TINY_SIZE, TINY_SIZE, 3), 128, np.uint8)
    apart = runs[2].images(grey, range(64)).astype(float) - 128
    assert abs(apart.mean()) < 1 and apart.std() == pytest.approx(25.5, rel=0.03)


def test_with_tau_zero_the_noise_stays_as_it_is(pipe, images):
    runs = repeats_of(settings_of("counterfactual", search="none", tau=0.0), noise=0.05)
    aims = explain.aims_of(guide(), images, None, "counterfactual")
    plain, noised = (one.explain(pipe, guide(), images, aims, samples=range(COUNT)) for one in runs)
    assert noise_estimates(plain, noised, [])["noise_ratio"].value == pytest.approx(1.0)


def test_targets_are_runner_ups_or_one_class_and_what_is_called_so_already_is_skipped(pipe, images):
    found = make(pipe, images)
    order = np.argsort(-found.before, axis=1)
    assert np.array_equal(found.targets, order[:, 1]) and not found.skipped.any()
    one = make(pipe, images, target="basketball")
    assert (one.targets == 1).all() and np.array_equal(one.skipped, found.own == 1)
    assert np.array_equal(one.images[one.skipped], images[one.skipped])
    assert not one.succeeded[one.skipped].any()


def test_kinds_aim_at_what_they_say(pipe, images):
    for kind in ("semifactual", "affirmative"):
        assert np.array_equal(make(pipe, images, kind).targets, make(pipe, images).own)
    back = make(pipe, images, "affirmative", weight=1.0)
    there = make(pipe, images, weight=1.0)
    assert np.array_equal(back.starts, there.images) and np.array_equal(back.originals, images)


def test_semifactuals_are_farther_than_without_their_weight(pipe, images):
    plain = make(pipe, images, "semifactual", weight=0.0)
    away = make(pipe, images, "semifactual")
    distance = [np.abs(one.images.astype(float) - images).mean() for one in (plain, away)]
    assert distance[1] > distance[0]


@pytest.mark.parametrize("search", ["tau", "weight"])
def test_a_search_keeps_the_least_change_that_succeeds(pipe, images, search):
    """Whatever succeeded without a search still does, at a tau no larger, or a weight no smaller."""
    settings = {"scale": 200.0, "weight": 1.0, "tau": 1.0}
    plain, found = make(pipe, images, **settings), make(pipe, images, search=search, **settings)
    assert plain.succeeded.any() and np.array_equal(found.succeeded, plain.succeeded)
    better = found.tau <= plain.tau if search == "tau" else found.weight >= plain.weight
    assert better.all()
    again = make(pipe, images, **settings | {search: float(getattr(found, search)[0])}) if search == "tau" else None
    if again is not None:
        assert np.array_equal(again.images[0], found.images[0])


def test_bisection_finds_the_border():
    border = np.array([3, 17, 64, 100])
    seen = []

    def succeeds(places, values):
        seen.append(len(places))
        return values >= border[places]

    found = bisect(np.zeros(4, int), np.full(4, 64), succeeds, middle_step, rounds=10)
    assert found.tolist() == [3, 17, 64, 64] and seen[0] == 4 and seen[1] == 3
    sizes = bisect(
        np.full(2, -64.0), np.full(2, -1.0), lambda at, tried: tried > np.array([-9.0, -2.0])[at], middle_size, 20
    )
    np.testing.assert_allclose(sizes, [-9.0, -2.0], rtol=1e-4)


class Corner(nn.Module):
    """Two classes by the brightness of one pixel: a guide that pixels fool. Or of all: a judge that they do not."""

    def __init__(self, whole: bool):
        super().__init__()
        self.whole = whole

    def forward(self, x):
        brightness = x.mean(dim=(1, 2, 3)) if self.whole else x[:, 0, 0, 0]
        return torch.stack([-brightness, brightness], dim=1) * 20


def test_an_adversarial_example_flips_the_guide_and_not_the_judge(pipe):
    dark = np.full((4, TINY_SIZE, TINY_SIZE, 3), 60, np.uint8)
    for attack in ("sign", "gradient"):
        settings = settings_of("adversarial", attack=attack)
        found = explain.explain_images(pipe, Classifier(Corner(False)), dark, 1, settings)
        judge = explain.judged(Classifier(Corner(True)), dark, found.images, found.targets, "judge")
        assert found.succeeded.all() and not judge.succeeded.any()
        assert np.count_nonzero(found.images[0] != dark[0]) == 1


def test_an_attack_keeps_to_its_budget():
    x, classifier = to_unit(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)), guide()
    for method in ("sign", "gradient"):
        found = explain.attack(classifier, x, 2, method=method, budget=0.05, step=0.02, steps=9, skip_above=1.0)
        change = (found - x) / 2
        size = change.abs().amax() if method == "sign" else change.square().mean(dim=(1, 2, 3)).sqrt().max()
        assert 0.01 < float(size) <= 0.05 + 1e-6 and found.abs().max() <= 1


def test_a_cone_needs_a_robust_classifier_and_changes_the_way(pipe, images):
    plain = make(pipe, images, weight=1.0, scale=20.0)
    cone = make(pipe, images, weight=1.0, scale=20.0, robust=guide(seed=3))
    assert not np.array_equal(plain.images, cone.images)
    same = make(pipe, images, weight=1.0, scale=20.0, robust=guide())
    assert np.abs(plain.images.astype(int) - same.images).max() <= 1  # a gradient lies in the cone around itself


@pytest.mark.parametrize(
    ("kind", "search"),
    [("counterfactual", "none"), ("counterfactual", "tau"), ("affirmative", "weight"), ("adversarial", "none")],
)
def test_work_covers_the_steps(pipe, images, kind, search):
    said, settings = [], settings_of(kind, search=search)
    explain.explain_images(pipe, guide(), images, None, settings, on_step=said.append)
    assert said == sorted(said) and 0 < said[-1] <= work_of(settings, pipe) * COUNT
    assert work_of(settings_of("counterfactual", tau=0.5, search="none"), pipe) == TINY_STEPS // 2


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("contrafactual", {}, "kind: 'contrafactual' is unknown; allowed: counterfactual, affirmative, semifactual"),
        ("counterfactual", {"tau": 1.5}, r"tau: 1.5 is not in \[0, 1\]"),
        ("counterfactual", {"tau": -0.1}, r"tau: -0.1 is not in \[0, 1\]"),
        ("counterfactual", {"distance": "lpips"}, "distance: 'lpips' is unknown; allowed: l1, l15, l2, features"),
        ("counterfactual", {"cone_angle": 120.0}, r"cone_angle: 120.0 is not in \[0, 90\] degrees"),
        ("counterfactual", {"scale": float("nan")}, "scale: nan is not a finite number >= 0"),
        ("counterfactual", {"weight": float("inf")}, "weight: inf is not a finite number"),
        ("counterfactual", {"pull": "proximal", "weight": -1.0}, "pull proximal cannot; pull gradient can"),
        ("counterfactual", {"pull": "proximal", "distance": "features"}, "has no proximal step; give gradient"),
        ("counterfactual", {"start": "data_mean"}, "start: data_mean is noise alone, which needs tau 1"),
        ("adversarial", {"search": "tau"}, "search: an adversarial example has neither tau nor weight"),
        ("adversarial", {"budget": 2.0}, r"budget: 2.0 is not in \(0, 1\]"),
        ("counterfactual", {"tua": 0.5}, "tua: no such setting; allowed: kind, tau, "),
    ],
)
def test_settings_out_of_range_are_one_clear_line(kind, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        settings_of(kind, **changes)
    assert "\n" not in str(caught.value)


def test_images_and_targets_that_do_not_fit_are_refused(pipe, images):
    with pytest.raises(DataError, match="the model's are uint8, 8 x 8 x 3"):
        make(pipe, images[:, :4])
    with pytest.raises(ValueError, match="target 'tennis' is no class of the classifier; allowed: baseball"):
        make(pipe, images, target="tennis")
    with pytest.raises(ValueError, match=r"target: 6 classes in 0\.\.2 are needed"):
        make(pipe, images, target=[0, 1, 3, 0, 0, 0])
