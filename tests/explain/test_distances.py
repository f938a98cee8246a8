"""Distances and their proximal steps."""

import pytest
import torch
from toys import SmoothCNN

from nrcg import Classifier
from nrcg.explain.distances import PixelDistance, load_distance


@pytest.mark.parametrize("name, expected", [("l1", 0.75), ("l15", (0.5**1.5 + 1) / 2), ("l2", 0.625)])
def test_distances_by_hand(name, expected):
    x, original = torch.tensor([0.5, -1.0]).reshape(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    assert float(load_distance(name)(x, original)) == pytest.approx(expected)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0, 10.0])
def test_the_proximal_step_is_the_minimum(exponent, strength):
    """Against all of a fine grid of values, pixel by pixel."""
    generator = torch.Generator().manual_seed(0)
    x, original = (torch.rand((3, 1, 2, 2), generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    found = PixelDistance(exponent).prox(x, original, torch.full((3, 1, 1, 1), strength, dtype=torch.float64))
    grid = torch.linspace(-1.2, 1.2, 240_001, dtype=torch.float64)
    for z, y, centre in zip(found.flatten(), x.flatten(), original.flatten(), strict=True):
        cost = (grid - y) ** 2 / 2 + strength / 4 * (grid - centre).abs() ** exponent
        assert float(z) == pytest.approx(float(grid[cost.argmin()]), abs=2e-5)


def test_l1_leaves_what_hardly_moves_exactly():
    original = torch.rand(2, 3, 4, 4)
    x = original + 0.001
    x[0, 0, 0, 0] += 0.5
    found = PixelDistance(1.0).prox(x, original, torch.full((2, 1, 1, 1), 0.01 * 48))
    assert int((found != original).sum()) == 1


def test_features_are_compared_relative_to_the_images_own():
    classifier = Classifier(SmoothCNN(3))
    x, original = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    a, b = classifier.features(x), classifier.features(original)
    expected = (a - b).square().sum(1) / b.square().sum(1)
    torch.testing.assert_close(load_distance("features", classifier)(x, original), expected)
    assert float(load_distance("features", classifier)(original, original).detach().max()) == 0.0


def test_unknown_distances_are_refused():
    with pytest.raises(ValueError, match="distance: 'l3' is unknown; allowed: l1, l15, l2, features"):
        load_distance("l3")
    with pytest.raises(ValueError, match="needs a classifier"):
        load_distance("features")
    with pytest.raises(ValueError, match="exponent"):
        PixelDistance(3.0)
