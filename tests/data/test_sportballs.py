import numpy as np
import pytest
import torch
from PIL import Image

from nrcg.data import ball_textures, sportballs
from nrcg.errors import ConfigError

LARGE = {"image_size": 64, "classes": sportballs.CLASSES, "diameter": (0.3, 0.7)}
SMALL = {"image_size": 24, "classes": ("baseball", "basketball", "soccer"), "diameter": (0.45, 0.9)}
SETTINGS = pytest.mark.parametrize("setting", [LARGE, SMALL], ids=["64px", "24px"])


@pytest.mark.parametrize(
    "word, expected",
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word, expected):
    got = sportballs.philox4x32(np.full((4, 3), word, np.uint64), (word, word))
    assert got.T.tolist() == [expected] * 3


@SETTINGS
def test_an_image_depends_on_seed_and_index_alone(setting):
    images, labels = sportballs.render(5, np.arange(60), **setting)
    order = np.random.default_rng(0).permutation(60)
    for piece in (order, order[:7], [59], [3, 3, 0], np.arange(20, 47)):
        some, some_labels = sportballs.render(5, piece, **setting)
        np.testing.assert_array_equal(some, images[piece])
        np.testing.assert_array_equal(some_labels, labels[piece])
    other, _ = sportballs.render(6, np.arange(60), **setting)
    assert (other != images).any(axis=(1, 2, 3)).all()


def test_an_image_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = sportballs.render(0, np.arange(40), **LARGE)
        ball_textures.texture.cache_clear()  # textures too must not depend on it
        torch.set_num_threads(3)
        three, _ = sportballs.render(0, np.arange(40), **LARGE)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one, three)


def test_no_index_gives_no_image():
    images, labels = sportballs.render(0, [], **SMALL)
    assert images.shape == (0, 24, 24, 3) and labels.shape == (0,)


def test_far_indices_and_seeds_are_their_own_draws():
    """All 64 bits of both count."""
    indices = [0, 1, 2**32, 2**32 + 1, 2**62]
    rotations = [sportballs.attributes(s, indices, **LARGE).rotation for s in (0, 1, 2**32, 2**64 - 1)]
    assert len(np.unique(rotations)) == 20


def _uniform_draws(setting, n=20_000):
    """The five draws brought to [0, 1); the place is relative to the room that the ball leaves."""
    drawn = sportballs.attributes(11, np.arange(n), **setting)
    low, high = (setting["image_size"] * d for d in setting["diameter"])
    room = setting["image_size"] - drawn.diameter
    return {
        "label": drawn.label / len(setting["classes"]),
        "diameter": (drawn.diameter - low) / (high - low),
        "x": (drawn.x - drawn.diameter / 2) / room,
        "y": (drawn.y - drawn.diameter / 2) / room,
        "rotation": drawn.rotation / (2 * np.pi),
    }


@SETTINGS
def test_attributes_are_uniform_and_independent(setting):
    """Chi-square of every attribute and of every pair.

    Pairs are tables of K x K cells. A chi-square of k degrees of freedom has mean k and variance 2 k; the limit
    of 5 standard deviations above is passed by chance by one of some 150 seeds, over the 15 tests made here.
    """
    draws = _uniform_draws(setting)
    num_classes, n = len(setting["classes"]), 20_000
    bins = {k: num_classes if k == "label" else 8 for k in draws}
    cell = {k: np.floor(u * bins[k] + 1e-9).astype(int) for k, u in draws.items()}
    names = list(draws)
    for i, a in enumerate(names):
        assert draws[a].min() >= 0 and draws[a].max() < 1
        for b in names[i:]:
            size = bins[a] if a == b else bins[a] * bins[b]
            index = cell[a] if a == b else cell[a] * bins[b] + cell[b]
            expected = n / size
            chi2 = ((np.bincount(index, minlength=size) - expected) ** 2 / expected).sum()
            assert chi2 < size - 1 + 5 * np.sqrt(2 * (size - 1)), (a, b, chi2)


def test_neighbouring_images_are_uncorrelated():
    """The correlation of 20,000 independent pairs has a standard deviation of 0.007; 5 of them are allowed."""
    for name, draw in _uniform_draws(LARGE).items():
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.035, name


@SETTINGS
def test_the_ball_lies_where_the_attributes_say(setting):
    indices = np.arange(200)
    images, _ = sportballs.render(2, indices, **setting)
    drawn = sportballs.attributes(2, indices, **setting)
    size = setting["image_size"]
    assert (drawn.x - drawn.diameter / 2 >= 0).all() and (drawn.x + drawn.diameter / 2 <= size).all()
    assert (drawn.y - drawn.diameter / 2 >= 0).all() and (drawn.y + drawn.diameter / 2 <= size).all()
    pixel = np.arange(size) + 0.5
    away = np.hypot(pixel - drawn.x[:, None, None], pixel[:, None] - drawn.y[:, None, None])
    away -= drawn.diameter[:, None, None] / 2
    assert (images[away > 2] == 255).all()  # the soft edge ends within 2 pixels
    ring = (away > -0.5) & (away < 0)  # the outline makes every ball seen on white, all round
    assert images.min(axis=3)[ring].max() < 235


@SETTINGS
def test_edges_are_antialiased(setting):
    """A pixel cut by the rim lies between the rim's colour and white, the fuller the darker."""
    indices = np.arange(300)
    images, labels = sportballs.render(4, indices, **setting)
    drawn = sportballs.attributes(4, indices, **setting)
    pixel = np.arange(setting["image_size"]) + 0.5
    away = np.hypot(pixel - drawn.x[:, None, None], pixel[:, None] - drawn.y[:, None, None])
    away -= drawn.diameter[:, None, None] / 2
    for label in range(len(setting["classes"])):
        grey = images[labels == label].mean(axis=3)
        steps = [grey[np.abs(away[labels == label] - d) < 0.1].mean() for d in (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75)]
        assert np.all(np.diff(steps) > 2), steps
        assert np.unique(images[labels == label]).size > 150


def _pasted(name, drawn, i, size, fine=16):
    """The same image by the plain way: paste one rotated picture on a fine canvas, then average down."""
    colour = Image.fromarray(ball_textures.ball(name))
    axis = (np.arange(colour.width) + 0.5) / (colour.width / 2) - 1
    disc = np.hypot(axis, axis[:, None]) < 1
    colour.putalpha(Image.fromarray(np.where(disc, 255, 0).astype(np.uint8)))
    side = round(drawn.diameter[i] * fine)
    turned = colour.rotate(np.rad2deg(drawn.rotation[i]), Image.Resampling.BICUBIC)
    turned = turned.resize((side, side), Image.Resampling.BOX)
    canvas = Image.new("RGB", (size * fine, size * fine), "white")
    place = tuple(round(c * fine - side / 2) for c in (drawn.x[i], drawn.y[i]))
    canvas.paste(turned, place, turned)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX)).astype(float)


def test_images_agree_with_pasting_a_rotated_picture():
    """The two low-pass a little differently: 4 of 255 levels over the ball; a turn wrong by 0.3 makes it 43."""
    images, labels = sportballs.render(9, np.arange(24), **LARGE)
    drawn = sportballs.attributes(9, np.arange(24), **LARGE)
    assert set(labels) == {0, 1, 2, 3}
    for i, image in enumerate(images):
        plain = _pasted(sportballs.CLASSES[labels[i]], drawn, i, 64)
        box = (plain < 255).any(axis=2)
        assert np.abs(image - plain)[box].mean() < 8, i
        assert np.corrcoef(image[box].ravel(), plain[box].ravel())[0, 1] > 0.98, i


def test_classes_are_told_apart_by_colour_statistics_at_24_pixels():
    """Nearest class mean of the ball's mean colour and spread, fitted on one half, right for > 97 % of the other."""
    setting = {**SMALL, "classes": sportballs.CLASSES}
    images, labels = sportballs.render(1, np.arange(2000), **setting)
    ball = (images < 250).any(axis=3)[..., None]
    count = ball.sum(axis=(1, 2))
    mean = (images * ball).sum(axis=(1, 2)) / count
    spread = np.sqrt((((images - mean[:, None, None]) * ball) ** 2).sum(axis=(1, 2)) / count)
    features = np.concatenate([mean, spread], axis=1)
    centres = np.stack([features[:1000][labels[:1000] == k].mean(axis=0) for k in range(4)])
    nearest = np.linalg.norm(features[1000:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == labels[1000:]).mean() > 0.97


def test_labels_follow_the_order_of_classes_given():
    images, labels = sportballs.render(0, np.arange(50), **{**SMALL, "classes": ("soccer", "basketball")})
    reverse, _ = sportballs.render(0, np.arange(50), **{**SMALL, "classes": ("basketball", "soccer")})
    orange = [(x[..., 0].astype(int) - x[..., 2]).max() > 120 for x in images]
    assert orange == (labels == 1).tolist()
    assert (images != reverse).any(axis=(1, 2, 3)).all()


@SETTINGS
def test_a_ball_drawn_as_another_class_keeps_its_place_size_and_rotation(setting):
    images, labels = sportballs.render(5, np.arange(40), **setting)
    redrawn, all_soccer = sportballs.render(5, np.arange(40), **setting, label="soccer")
    soccer = setting["classes"].index("soccer")
    assert (all_soccer == soccer).all()
    np.testing.assert_array_equal(redrawn[labels == soccer], images[labels == soccer])
    drawn = sportballs.attributes(5, np.arange(40), **setting)
    pixel = np.arange(setting["image_size"]) + 0.5
    away = np.hypot(pixel[None, None] - drawn.x[:, None, None], pixel[None, :, None] - drawn.y[:, None, None])
    outside = away > drawn.diameter[:, None, None] / 2 + 1.5
    assert (redrawn != images)[outside].sum() == 0  # the canvas stays, the ball alone is another
    assert (redrawn != images)[labels != soccer].any(axis=(1, 2, 3)).all()
    with pytest.raises(ConfigError, match="label: 'tennis' is none of "):
        sportballs.render(5, [0], **setting, label="tennis")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"classes": ("baseball", "golf")}, "classes"),
        ({"classes": ()}, "classes"),
        ({"classes": ("soccer", "soccer")}, "classes"),
        ({"diameter": (0.5, 1.2)}, "diameter"),
        ({"diameter": (0.0, 0.5)}, "diameter"),
        ({"diameter": (0.6, 0.5)}, "diameter"),
        ({"image_size": 4}, "image_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"indices": [-1]}, "indices"),
        ({"indices": [0.5]}, "indices"),
        ({"indices": [[1]]}, "indices"),
    ],
)
def test_arguments_out_of_range_are_named(change, named):
    arguments = {"seed": 0, "indices": [0], **SMALL, **change}
    seed, indices = arguments.pop("seed"), arguments.pop("indices")
    with pytest.raises(ConfigError, match=f"^{named}: "):
        sportballs.render(seed, indices, **arguments)


def test_a_ball_may_fill_the_canvas():
    images, _ = sportballs.render(0, np.arange(8), **{**SMALL, "diameter": (1.0, 1.0)})
    assert (images[:, 0, 0] > 240).all() and (images[:, 12, 0] < 250).any(axis=1).all()
