"""The balls of SportBalls: each pattern on the sphere, and its textures on the pixel grid of one size bucket.

`master` evaluates a pattern at high resolution, once per ball; `texture` low-passes it to the pixels of a diameter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pattern = Callable[[Array], Array]


def _tilted(p: Array, x_degrees: float, y_degrees: float) -> Array:
    """Points (3, ...) on the sphere in the coordinates of a ball that is tilted about x, then about y."""
    a, b = np.deg2rad([x_degrees, y_degrees])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    return np.einsum("ij,j...->i...", about_y @ about_x, p)


def _paint(shape: tuple[int, ...], base: tuple[int, int, int]) -> Array:
    return np.broadcast_to(np.array(base, float), (*shape, 3)).copy()


def _around(p: Array, axis: tuple[float, float, float]) -> tuple[Array, Array]:
    """Angle of each point from `axis` and its azimuth around it, radians."""
    n = np.array(axis) / np.linalg.norm(axis)
    u = np.cross(n, [0.0, 1.0, 0.0])
    u /= np.linalg.norm(u)
    height, e1, e2 = (np.einsum("i,i...->...", axis_, p) for axis_ in (n, u, np.cross(n, u)))
    return np.arccos(np.clip(height, -1, 1)), np.arctan2(e2, e1)


def _baseball(p: Array) -> Array:
    """Off-white leather; two seams, each a red line crossed by slanted stitches."""
    colour = _paint(p.shape[1:], (250, 244, 228))
    for side in (-1.0, 1.0):
        angle, azimuth = _around(p, (side * 0.93, 0.0, 0.36))
        off = angle - np.deg2rad(46)
        slanted = azimuth + side * np.abs(off) * 1.1  # the stitches are little arrows along the seam
        stitch = (np.abs(off) < 0.15) & (np.abs(np.mod(slanted * 26 / (2 * np.pi), 1.0) - 0.5) < 0.19)
        colour[stitch | (np.abs(off) < 0.04)] = (206, 32, 44)
    return colour


def _basketball(p: Array) -> Array:
    """Orange; two great circles and two side arcs in near-black."""
    q = _tilted(p, 18, -14)
    seam = (np.abs(q[0]) < 0.045) | (np.abs(q[1]) < 0.045)
    for side in (-1.0, 1.0):
        angle, _ = _around(q, (side, 0.0, 0.12))
        seam |= np.abs(angle - np.deg2rad(50)) < 0.045
    colour = _paint(p.shape[1:], (240, 122, 34))
    colour[seam] = (52, 26, 14)
    return colour


def _soccer_faces() -> tuple[Array, Array]:
    """Scaled normals of the truncated icosahedron's 12 pentagons and 20 hexagons.

    A ray p leaves the solid through the face with the largest normal . p / (distance of the face).
    """
    g = (1 + 5**0.5) / 2
    signs = [(a, b) for a in (-1, 1) for b in (-1, 1)]
    corners = [np.roll([0, a, b * g], k) for k in range(3) for a, b in signs]
    faces = [np.roll([0, a / g, b * g], k) for k in range(3) for a, b in signs]
    faces += [np.array([a, b, c]) for a, b in signs for c in (-1, 1)]
    # (a, g) and (1/g, g) are dual in opposite orders of the axes.
    faces = [f[::-1] for f in faces]
    pentagons, hexagons = (np.array([v / np.linalg.norm(v) for v in s]) for s in (corners, faces))
    return pentagons / 0.9393, hexagons / 0.9150


def _soccer(p: Array) -> Array:
    """White hexagons parted by grey seams, black pentagons."""
    q = _tilted(p, 40, 10)
    pentagons, hexagons = _soccer_faces()
    black = np.max([np.einsum("i,i...->...", n, q) for n in pentagons], axis=0)
    first = np.full(q.shape[1:], -2.0)
    second = first.copy()
    for n in hexagons:
        height = np.einsum("i,i...->...", n, q)
        second = np.maximum(second, np.minimum(first, height))
        first = np.maximum(first, height)
    colour = _paint(p.shape[1:], (252, 252, 252))
    colour[first - second < 0.04] = (120, 122, 130)
    colour[black > first - 0.02] = (24, 24, 30)
    return colour


def _volleyball(p: Array) -> Array:
    """Three faces of a swirled cube, each of three curved panels: yellow, white and blue."""
    a = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], float)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    swirl = 0.9 * (1 - np.clip(p[2], 0, 1))
    x, y = p[0] * np.cos(swirl) - p[1] * np.sin(swirl), p[0] * np.sin(swirl) + p[1] * np.cos(swirl)
    q = np.einsum("ji,j...->i...", a, np.stack([p[2], x, y]))
    face = np.argmax(q, axis=0)
    top = np.take_along_axis(q, face[None], 0)[0]
    across = np.take_along_axis(q, (face[None] + 1) % 3, 0)[0]
    other = np.take_along_axis(q, (face[None] + 2) % 3, 0)[0]
    place = np.arctan2(across, top) / (np.pi / 4)  # -1 .. 1 over the face
    colour = np.array([(250, 204, 36), (250, 250, 250), (34, 82, 190)], float)[
        np.digitize(place, [-0.08, 0.42]).clip(0, 2)
    ]
    edge = np.minimum(np.abs(place + 0.08), np.abs(place - 0.42)) < 0.04
    colour[edge | (top - np.maximum(across, other) < 0.05)] = (22, 40, 92)
    return colour


_PATTERNS: dict[str, Pattern] = {
    "baseball": _baseball,
    "basketball": _basketball,
    "soccer": _soccer,
    "volleyball": _volleyball,
}
CLASSES: tuple[str, ...] = tuple(_PATTERNS)
_MASTER = 512  # samples across a ball before filtering
TEXELS = 2  # texels per canvas pixel, each way
_BLUR = 0.35  # standard deviation of the prefilter, canvas pixels; bilinear sampling adds a little
MARGIN = 3  # pixels of a patch beyond the ball's diameter, room for its soft edge
BUCKETS = 2.0 ** (np.arange(0, 14 * 8 + 1) / 8)  # diameters in pixels at which textures are made


@cache
def _master(name: str) -> NDArray[np.uint8]:
    """(512, 512, 3) darkness (255 - colour on white) of the ball, which touches all four sides."""
    axis = (np.arange(_MASTER) + 0.5) / (_MASTER / 2) - 1
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    z = np.sqrt(np.clip(1 - radius**2, 0, 1))
    inside = radius < 1
    limb = np.where(inside, radius, 1)
    colour = _PATTERNS[name](np.stack([x, y, z]) / np.maximum(radius, 1))
    # Seen from the light: bright in the middle, darker to the limb, so that white balls have an outline.
    colour *= (1 - 0.30 * limb**4)[..., None]
    colour[radius > 0.955] *= 0.62
    return np.rint(np.where(inside[..., None], 255 - colour, 0)).clip(0, 255).astype(np.uint8)


def ball(name: str) -> NDArray[np.uint8]:
    """(512, 512, 3) uint8 RGB: the ball `name` on white, unrotated, touching all four sides."""
    return 255 - _master(name)


@lru_cache(maxsize=256)
def texture(name: str, bucket: int):
    """(3, T, T) float32 tensor: the ball on white, filtered for diameters up to `BUCKETS[bucket]`, plus 0.5.

    The half turns the later cast to uint8, which cuts off, into rounding. Weights and samples are whole
    numbers, so the sums below are exact and do not depend on the matrix library or on its threads.
    """
    import torch

    side = texture_side(bucket)
    step = _MASTER / (BUCKETS[bucket] * TEXELS)  # master samples per texel
    centre = (np.arange(side) - (side - 1) / 2) * step + (_MASTER - 1) / 2
    sigma = max(_BLUR * TEXELS * step, 0.4)
    weight = np.exp(-0.5 * ((np.arange(_MASTER)[None] - centre[:, None]) / sigma) ** 2)
    weight = np.rint(weight * (65536 / (sigma * np.sqrt(2 * np.pi))))
    dark = np.stack([weight @ plane @ weight.T for plane in _master(name).transpose(2, 0, 1).astype(np.float64)])
    return torch.from_numpy((255.5 - np.clip(dark / 65536.0**2, 0, 255)).astype(np.float32))


def texture_side(bucket: int) -> int:
    return int(np.ceil((BUCKETS[bucket] + MARGIN + 1) * TEXELS))
