"""The figures: they are drawn, deterministic, alike in colour, and survive awkward numbers."""

import functools
import io
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image
from synthetic import COLUMNS, NAN, balls, forward_rows, metric_rows, write_results

from nrcg.csv_files import write_csv
from nrcg.data import pictures
from nrcg.errors import DataError
from nrcg.report import drawing, figures
from nrcg.report.columns import FORWARD_COLUMNS

NAMES = [
    "forward_accuracy",
    "logit_sensitivity",
    "gradient_sensitivity",
    "stabilizers",
    "accuracy_vs_scale",
    "fid_vs_scale",
    "cfid_vs_scale",
    "pareto",
    "best_samples",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    paths = write_results(tmp_path_factory.mktemp("results"))
    arguments = [paths[name] for name in ("forward_csv", "metrics_csv", "samples_dir", "figures_dir")]
    before = dict(matplotlib.rcParams)
    paths["written"] = figures.make_figures(*arguments, target="baseball", num_classes=3)
    assert dict(matplotlib.rcParams) == before
    return paths


def styles():
    return figures.method_styles(row["method"] for row in [*forward_rows(2), *metric_rows()])


def labels(figure):
    """Label -> colour of the lines in a figure's first panel."""
    return {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_a_picture(results, name):
    png, svg = results["figures_dir"] / f"{name}.png", results["figures_dir"] / f"{name}.svg"
    assert {png, svg} <= set(results["written"])
    pixels = np.asarray(Image.open(png).convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels @ np.array([1, 256, 65536]))) > 10  # not blank
    text = svg.read_text()
    assert text.rstrip().endswith("</svg>") and "<dc:date>" not in text


def test_nothing_but_the_figures_is_written(results):
    assert len(results["written"]) == 2 * len(NAMES) == len(list(results["figures_dir"].iterdir()))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_numbers_give_equal_files(kind):
    def draw():
        return figures.cfid_vs_scale(metric_rows(), styles(), target="baseball")

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):  # a matplotlibrc of the user's
        first = drawing.render(draw, kind)
    assert first == drawing.render(draw, kind)


def test_a_method_has_one_colour_and_no_two_share_one():
    found = styles()
    assert len({style.color for style in found.values()}) == len(found) == 8
    drawn = [
        labels(figures.stabilizers(forward_rows(4), found)),
        labels(figures.forward_accuracy(forward_rows(4), found, num_classes=3)),
        labels(figures.fid_vs_scale(metric_rows(), found)),
    ]
    for name in ("robust", "non-robust", r"non-robust + $\hat{x}_0$"):
        assert len({lines[name] for lines in drawn}) == 1
    own = figures.method_styles(["mine", "robust", "yours"])
    assert len({style.color for style in own.values()}) == 3


def test_figures_of_the_unstabilized_methods_leave_the_stabilizers_out():
    assert len(labels(figures.gradient_sensitivity(forward_rows(4), styles()))) == 3
    assert len(labels(figures.stabilizers(forward_rows(4), styles()))) == 6


def test_band_stays_positive_where_the_std_exceeds_the_mean():
    lower, upper = figures.log_band(np.array([1.0, 2.0]), np.array([3.0, 0.0]))
    np.testing.assert_allclose(lower, [0.25, 2.0])
    np.testing.assert_allclose(upper, [4.0, 2.0])


@pytest.mark.parametrize(
    ("scales", "expected"), [([1, 5], "linear"), ([1, 10], "log"), ([0, 0.1, 5], "symlog"), ([0], "linear")]
)
def test_scale_axis_is_logarithmic_over_a_decade(scales, expected):
    rows = [metric_rows()[1] | {"scale": float(scale)} for scale in scales]
    assert figures.fid_vs_scale(rows, styles()).axes[0].get_xscale() == expected


def test_axis_names_the_metric_and_unconditional_is_a_level():
    axes = figures.cfid_vs_scale(metric_rows(), styles(), target="baseball").axes[0]
    assert axes.get_ylabel() == "Fréchet distance, judge features (cfd_judge)"
    level = next(line for line in axes.lines if line.get_label() == "unconditional")
    assert list(level.get_ydata()) == [60.0, 60.0] and level.get_linestyle() == "--"


def test_awkward_numbers_and_names_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "DPI", 40)
    once = functools.cache(functools.partial(drawing.render, kind="png"))
    monkeypatch.setattr(drawing, "render", lambda draw, kind: once(draw))  # its SVG is drawn by the same function
    rows = [row | {"cfd_judge": NAN, "fd_judge": NAN, "accuracy_judge": NAN} for row in metric_rows()]
    rows[-1]["method"] = "my_$_method"
    write_csv(tmp_path / "m.csv", rows, COLUMNS)
    forward = [row | {"gradient_sensitivity_mean": 0.0, "logit_sensitivity_std": NAN} for row in forward_rows(3)]
    write_csv(tmp_path / "f.csv", forward, FORWARD_COLUMNS)
    written = figures.make_figures(
        tmp_path / "f.csv", tmp_path / "m.csv", tmp_path / "none", tmp_path / "out", target="5 $ bill", num_classes=3
    )
    assert len(written) == 18 and all(path.stat().st_size > 500 for path in written)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_each_image_and_leaves_the_rest_grey(channels):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 3, channels), np.uint8)
    grid = pictures.sample_grid(images, 3, 2)
    assert grid.shape == (2 * 6 + 2, 3 * 5 + 2, channels) and grid.dtype == np.uint8
    for index in range(5):
        top, left = 2 + index // 3 * 6, 2 + index % 3 * 5
        assert (grid[top : top + 4, left : left + 3] == index).all()
    assert (grid[8:12, 12:15] == grid[0, 0]).all() and grid[0, 0, 0] > 100


@pytest.mark.parametrize(
    ("images", "columns", "pad"),
    [
        (np.zeros((2, 4, 4, 3)), 2, 1),
        (np.zeros((4, 4, 3), np.uint8), 2, 1),
        (np.zeros((0, 4, 4, 3), np.uint8), 2, 1),
        (np.zeros((2, 4, 4, 3), np.uint8), 0, 1),
        (np.zeros((2, 4, 4, 3), np.uint8), 2, -1),
    ],
)
def test_grid_refuses_what_it_cannot_tile(images, columns, pad):
    with pytest.raises(ValueError, match=r"images|columns"):
        pictures.sample_grid(images, columns, pad)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_keeps_every_pixel(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pictures.save_png(tmp_path / "sub" / "a.png", array)
    assert (np.asarray(Image.open(tmp_path / "sub" / "a.png")).reshape(shape) == array).all()
    assert len(list((tmp_path / "sub").iterdir())) == 1


def test_png_refuses_other_arrays():
    with pytest.raises(ValueError, match="expected uint8"):
        pictures.png_bytes(np.zeros((4, 4)))


@pytest.mark.parametrize("content", [b"", b"no array", np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8, 3))])
def test_broken_samples_are_named(tmp_path, content):
    path = tmp_path / "robust" / "scale0.5" / "shard0000.npy"
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        pictures.load_samples(tmp_path, "robust", 0.5, 4)


def test_samples_are_the_first_of_the_best_scale(tmp_path):
    folder = tmp_path / "robust" / "scale20"
    folder.mkdir(parents=True)
    images = balls(20, 24, 3)
    np.save(folder / "shard0000.npy", images)
    assert (pictures.load_samples(tmp_path, "robust", 20.0, 12) == images[:12]).all()
    assert pictures.load_samples(tmp_path, "robust", 5.0, 12) is None
    strip = figures.best_samples(metric_rows(), tmp_path, target="baseball").axes
    assert len(strip) == 1 and "robust, s = 20" in strip[0].get_ylabel()
    assert (strip[0].images[0].get_array()[1:25, 1:25] == images[0]).all()


def test_training_figures_tolerate_gaps():
    rows = [{"epoch": float(epoch), "train_loss": 1 / epoch, "val_loss": NAN} for epoch in range(1, 9)]
    figure = figures.training_loss(rows)
    assert [line.get_label() for line in figure.axes[0].lines] == ["training"]
    tables = {"robust": [{"t": 2.0, "accuracy": 0.5}, {"t": 1.0, "accuracy": 1.0}]}
    line = figures.classifier_accuracy(tables).axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [100, 50]
    assert Image.open(io.BytesIO(drawing.render(lambda: figures.training_loss(rows), "png"))).size[0] > 500
