"""Cone projection against brute force."""

import math

import pytest
import torch

from nrcg.explain.cone import cone_projection


def brute_force(u, v, degrees, count=200_000):
    """The nearest of many points of a cone in the plane of u and v, where the nearest point lies."""
    along = v / v.norm()
    across = u - (u @ along) * along
    across = across / across.norm()
    angles = torch.linspace(-math.radians(degrees), math.radians(degrees), count, dtype=u.dtype)
    rays = torch.cos(angles)[:, None] * along + torch.sin(angles)[:, None] * across
    points = (rays @ u).clamp(min=0)[:, None] * rays
    return points[(points - u).norm(dim=1).argmin()]


@pytest.mark.parametrize("degrees", [0.0, 10.0, 30.0, 60.0, 90.0])
def test_the_nearest_point_of_the_cone(degrees):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn((40, 2, 2, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    v[:20] += 1.5 * u[:20]  # some within the cone, some beside it, some behind
    found = cone_projection(u, v, degrees)
    for a, b, point in zip(u.flatten(1), v.flatten(1), found.flatten(1), strict=True):
        torch.testing.assert_close(point, brute_force(a, b, degrees), rtol=0, atol=1e-4)
    cosine = (found * v).flatten(1).sum(1) / (found.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)).clamp(min=1e-12)
    moved = found.flatten(1).norm(dim=1) > 1e-9
    assert bool((cosine[moved] >= math.cos(math.radians(degrees)) - 1e-6).all())


def test_inside_nothing_changes_and_behind_nothing_is_left():
    v = torch.tensor([1.0, 0, 0, 0]).reshape(1, 1, 2, 2)
    inside = torch.tensor([1.0, 0.5, 0, 0]).reshape(1, 1, 2, 2)  # 27 degrees
    assert torch.equal(cone_projection(inside, v), inside)
    assert not cone_projection(-v, v).any()
    assert torch.equal(cone_projection(inside, torch.zeros_like(v)), inside)  # no axis, no cone
    assert not cone_projection(torch.zeros_like(v), v).any()


def test_each_sample_by_itself_however_small():
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn((6, 3, 4, 4), generator=generator) for _ in range(2))
    whole = cone_projection(u, v)
    for row in range(6):
        torch.testing.assert_close(cone_projection(u[row : row + 1], v[row : row + 1])[0], whole[row])
    torch.testing.assert_close(cone_projection(1e-25 * u, 1e-25 * v), 1e-25 * whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("degrees", [-1.0, 90.5, float("nan")])
def test_angles_out_of_range_are_refused(degrees):
    with pytest.raises(ValueError, match=r"is not in \[0, 90\] degrees"):
        cone_projection(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), degrees)
