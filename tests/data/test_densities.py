"""Distributions of the plane: points, density and entropy agree."""

import math

import numpy as np
import pytest

from nrcg.data.densities import DENSITIES


@pytest.mark.parametrize("name", DENSITIES)
def test_points_density_and_entropy_agree(name):
    density = DENSITIES[name]()
    points = density.draw(20_000, seed=1)
    assert points.shape == (20_000, 2) and np.array_equal(points, density.draw(20_000, seed=1))
    log_p = density.log_density(points)
    error = log_p.std() / len(points) ** 0.5
    assert abs(-log_p.mean() - density.entropy) < 4 * error + 1e-4
    # The density is that of the points: their share in a quarter of the plane, against the sum over a grid.
    step = 3.2 / 240
    centres = -1.6 + step * (np.arange(240) + 0.5)
    grid = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    p = np.exp(density.log_density(grid)) * step**2
    assert p.sum() == pytest.approx(1, abs=2e-3)
    for quarter in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        expected = p[(grid * quarter > 0).all(axis=1)].sum()
        share = (points * quarter > 0).all(axis=1).mean()
        assert abs(share - expected) < 4 * (expected / len(points)) ** 0.5 + 2e-3


def test_the_checkerboards_entropy_and_edges():
    board = DENSITIES["checkerboard"]()
    assert board.entropy == pytest.approx(math.log(2), abs=1e-3)
    dark, light, outside = [-0.75, -0.75], [-0.25, -0.75], [1.2, 0.1]
    np.testing.assert_allclose(board.log_density(np.array([dark, light, outside])), [-math.log(2), -np.inf, -np.inf])
