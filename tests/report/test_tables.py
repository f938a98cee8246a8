"""Reading and writing result tables, the choice of the best scale, the table for the terminal."""

import math
from pathlib import Path

import pytest
from synthetic import COLUMNS, NAN, forward_rows, inception_rows, metric_rows

from nrcg import config
from nrcg.csv_files import read_csv, write_csv
from nrcg.errors import DataError
from nrcg.report import paper
from nrcg.report.best import at_edge, best_and_ties, best_per_method, best_rule, differ, pareto_front
from nrcg.report.columns import (
    FORWARD_COLUMNS,
    check_comparable,
    frechet_columns,
    headline_protocol,
    read_forward,
    read_metrics,
    sort_methods,
)
from nrcg.report.tables import format_count, format_number, format_percent, format_table

ROOT = Path(__file__).parents[2]


def sweep(*distances, method="robust", column="cfd_judge"):
    """Rows of one method at the scales 1, 2, 3, ... with the given class-conditional distances."""
    return [
        {"method": method, "scale": float(scale), "fd_judge": 5.0, column: distance}
        for scale, distance in enumerate(distances, 1)
    ]


def test_write_then_read_keeps_every_value(tmp_path):
    rows = [
        {"method": "robust", "scale": 0.1, "fd_judge": 1 / 3, "mlflow_run_id": "1e5"},
        {"method": 'a, "b"', "scale": 1e-12, "fd_judge": None, "mlflow_run_id": ""},
    ]
    path = tmp_path / "new" / "metrics.csv"
    write_csv(path, rows, ["method", "scale", "fd_judge", "mlflow_run_id"])
    first, second = read_csv(path)
    assert first == rows[0]  # the run id stays text, floats are exact
    assert second["method"] == 'a, "b"' and second["scale"] == 1e-12 and math.isnan(second["fd_judge"])
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, [{"t": 1}], ["t"])
    with pytest.raises(ValueError, match="surplus"):
        write_csv(path, [{"t": 2}, {"t": 3, "surplus": 4}], ["t"])
    assert read_csv(path) == [{"t": 1.0}]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("t,accuracy\n", "empty"),
        ("t\n1\n", "lacks the column accuracy"),
        ("t,accuracy\n1,0.5\n2\n", "line 3 has 1 of 2 fields"),
        ("t,accuracy\n1,high\n", "line 2: accuracy is no number: 'high'"),
        (b"t,accuracy\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "forward.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_csv(path, ("t", "accuracy"))
    text = str(error.value)
    assert words in text and str(path) in text and "\n" not in text


def test_readers_ask_for_their_columns(tmp_path):
    path = tmp_path / "some.csv"
    write_csv(path, [{"method": "robust", "t": 1}], ["method", "t"])
    with pytest.raises(DataError, match="gradient_sensitivity_std"):
        read_forward(path)
    write_csv(path, [dict.fromkeys(FORWARD_COLUMNS, 1)], FORWARD_COLUMNS)
    assert read_forward(path)[0]["t"] == 1
    columns = [name for name in COLUMNS if not name.startswith("fd_")]
    write_csv(path, [{name: row[name] for name in columns} for row in metric_rows()], columns)
    with pytest.raises(DataError, match=r"some\.csv: no Fréchet distance"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("columns", "expected", "network"),
    [
        (("fid", "cfid"), ("fid", "cfid"), "inception"),
        (("cfd_judge", "fd_judge"), ("fd_judge", "cfd_judge"), "judge"),
        (("fd_dinov2", "kd_dinov2", "cfd_dinov2"), ("fd_dinov2", "cfd_dinov2"), "dinov2"),
        (("fd_a", "fd_b", "cfd_b", "fid"), ("fd_b", "cfd_b"), "b"),
        (
            ("fd_judge", "cfd_judge", "fid_torcheval", "cfid_torcheval"),
            ("fid_torcheval", "cfid_torcheval"),
            "torcheval",
        ),
        (("fid_torcheval", "cfid_torcheval", "fid", "cfid", "fid_lo", "cfid_lo"), ("fid", "cfid"), "inception"),
        (("fd_x_lo", "cfd_x_lo", "fd_x", "cfd_x"), ("fd_x", "cfd_x"), "x"),
    ],
)
def test_frechet_columns_are_named_after_their_features(columns, expected, network):
    rows = [dict.fromkeys(columns, 1.0)]
    assert frechet_columns(rows) == expected
    assert headline_protocol(rows) == network


def test_no_frechet_columns():
    with pytest.raises(DataError, match="neither fid and cfid"):
        frechet_columns([{"method": "robust", "fid": 1.0}])
    with pytest.raises(DataError):
        frechet_columns([])


@pytest.mark.parametrize(
    ("distances", "best", "edge"),
    [
        ((3.0, 1.0, 2.0), 2.0, False),
        ((1.0, 2.0, 3.0), 1.0, True),
        ((3.0, 2.0, 1.0), 3.0, True),
        ((3.0, 1.0, NAN), 2.0, False),  # the scale beyond was tried, and it failed
        ((NAN, 2.0), 2.0, True),
        ((2.0, 2.0, 5.0), 1.0, True),  # a tie goes to the lower scale
        ((NAN, NAN), 1.0, False),
        ((4.0,), 1.0, False),
    ],
)
def test_best_scale_and_edge_of_the_sweep(distances, best, edge):
    rows = sweep(*distances)[::-1]  # the order of the rows does not matter
    assert best_per_method(rows)["robust"]["scale"] == best
    assert at_edge(rows, "robust") is edge


def test_methods_come_in_the_order_of_the_paper_and_own_ones_last():
    names = ["mine", "non_robust_x0_adam", "robust", "yours", "unconditional", "robust"]
    assert sort_methods(names) == ["unconditional", "robust", "non_robust_x0_adam", "mine", "yours"]
    rows = [row for name in names for row in sweep(1.0, method=name)]
    assert list(best_per_method(rows)) == sort_methods(names)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.5, "12.50"),
        (155.19, "155.2"),
        (12345.6, "12346"),
        (0.012345, "0.01235"),
        (1.5e-7, "1.500e-07"),
        (-2.0, "-2.000"),
        (NAN, "-"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_readable(value, text):
    assert format_number(value) == text


def test_percent_and_count():
    assert (format_percent(0.9105), format_percent(NAN)) == ("91.0", "-")
    assert (format_count(50176.0), format_count(NAN)) == ("50,176", "-")


def test_table_shows_each_method_once_at_its_best_scale():
    text = format_table(metric_rows())
    line = next(line for line in text.splitlines() if line.startswith("non_robust_x0_ema99"))
    assert line.split() == [
        "non_robust_x0_ema99",
        "25",
        "92.0",
        "99.0",
        "12.50",
        "25.00",
        "0.858",
        "0.684",
        "0",
        "2.40",
    ]
    assert "cfd_judge" in text.splitlines()[0]
    assert "robust: 20 is the highest scale tried" in text
    assert "155.19" in text and "18.52" in text  # the published rows
    assert "not comparable in value: features of the judge network" in text and "128 samples" in text


@pytest.mark.parametrize("method", ["robust", "a_method_with_a_very_long_name_that_would_not_fit_the_line" * 2])
@pytest.mark.parametrize("value", [NAN, 0.5, 123456.789, 1e-9])
def test_table_is_never_wider_than_110_characters(method, value):
    rows = [
        {key: value if isinstance(entry, float) and key != "scale" else entry for key, entry in row.items()}
        | {"method": method if row["method"] == "robust" else row["method"], "num_samples": 128.0}
        for row in metric_rows()
    ]
    assert max(len(line) for line in format_table(rows).splitlines()) <= 110


def test_table_with_inception_features_at_the_published_size_has_no_caveat():
    rows = [row | {"num_samples": 50176.0, "experiment": "celeba"} for row in inception_rows(metric_rows())]
    text = format_table(rows)
    assert "13.90" in text and "not comparable" not in text
    assert "published" not in format_table([row | {"experiment": "my_own"} for row in rows])


@pytest.mark.parametrize(
    ("experiment", "cfid"), [("quickstart", 18.52), ("sportballs", 18.52), ("celeba", 13.9), ("celebahq", 42.18)]
)
def test_published_rows(experiment, cfid):
    unconditional, guided = paper.published_rows(experiment)
    assert unconditional.method == "unconditional" and guided.cfid == cfid
    assert paper.published_rows("my_own") == ()


def test_differences_name_what_is_not_as_published():
    same = {
        "features": "torcheval",
        "num_samples": 50176,
        "image_size": 64,
        "num_steps": 400,
        "start": "standard_normal",
    }
    assert paper.differences("sportballs", **same) == []
    assert paper.differences("celebahq", **same) == [
        "50,176 samples instead of 1,024",
        "64 pixels a side instead of 256",
        "400 diffusion steps instead of 1,000",
    ]
    assert paper.differences("celeba", features="inception") == [
        "clean-fid's Inception and resizing instead of torcheval's"
    ]
    assert paper.differences("sportballs", source="sportballs") == ["images drawn anew, not the authors' own"]
    assert paper.differences("my_own", features="judge") == []
    assert paper.differences("celebahq", num_reference=28000) == [
        "28,000 reference images, each once, instead of 1,024 drawn with replacement"
    ]


TRAINED = [
    "classifiers with 0 steps of warm-up instead of 500",
    "classifiers' gradients clipped at norm 1.0 instead of never",
]
AVERAGED = "diffusion model's weights averaged (decay 0.9999) instead of the last ones"
ONE_NOISE = "forward analysis with one noise for an image instead of a new one at every step"
BALLS = "balls of [0.3, 0.7] of the canvas' width instead of [0.14, 0.39]"


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("sportballs", [AVERAGED, *TRAINED, ONE_NOISE, BALLS]),
        ("celeba", [AVERAGED, *TRAINED, ONE_NOISE]),
        ("celebahq", [*TRAINED, ONE_NOISE]),
    ],
)
def test_each_shipped_experiment_lists_where_config_yaml_is_not_the_released_code(experiment, expected):
    """Every key of the list stands in config.yaml; a changed value changes the list."""
    settings = config.load(ROOT / "config.yaml").experiments[experiment].model_dump(mode="json")
    assert paper.differences(experiment, settings=settings) == [*expected, *paper.ALWAYS]
    settings["classifiers"]["non_robust"]["optimizer"] |= {"warmup_steps": 500}
    assert TRAINED[0] not in paper.differences(experiment, settings=settings)


# --- intervals, rules, comparability ---------------------------------------------------------------------------------


def with_intervals(rows, column, half):
    return [row | {f"{column}_lo": row[column] - half, f"{column}_hi": row[column] + half} for row in rows]


@pytest.mark.parametrize("half, ties", [(1.0, []), (2.0, ["b"]), (4.0, ["b", "c"])])
def test_ties_are_what_the_intervals_do_not_tell_from_the_best(half, ties):
    """Distances 10, 12, 15: a difference d is supported where d > sqrt(2) * half."""
    rows = [row for name, value in zip("abc", (10.0, 12.0, 15.0), strict=True) for row in sweep(value, method=name)]
    rows = with_intervals(rows, "cfd_judge", half)
    lowest, found = best_and_ties(rows)
    assert lowest["method"] == "a" and [row["method"] for row in found] == ties
    assert differ(rows[0], rows[2], "cfd_judge") is ("c" not in ties)


def test_without_intervals_every_difference_counts():
    rows = sweep(10.0, method="a") + sweep(10.1, method="b")
    assert best_and_ties(rows)[1] == []


def test_table_marks_ties():
    rows = with_intervals(metric_rows(), "cfd_judge", 5.0)
    text = format_table(rows)
    line = next(line for line in text.splitlines() if line.startswith("robust "))
    assert "≈16.00" in line
    assert "intervals do not tell" in text and max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("rule", "column", "scale"),
    [("cfid", "cfd_judge", 2.0), ("fid", "fd_judge", 3.0), ("ckid", "ckd_judge", 1.0), ("accuracy_judge", None, 3.0)],
)
def test_the_best_scale_follows_the_rule(rule, column, scale):
    values = ((2.0, 9.0, 0.1, 0.5), (1.0, 8.0, 0.2, 0.6), (3.0, 7.0, 0.3, 0.9))
    names = ("cfd_judge", "fd_judge", "ckd_judge", "accuracy_judge")
    rows = [
        {"method": "robust", "scale": float(number), "best_by": rule, **dict(zip(names, row, strict=True))}
        for number, row in enumerate(values, 1)
    ]
    assert best_rule(rows)[0] == (column or rule)
    assert best_per_method(rows)["robust"]["scale"] == scale
    assert at_edge(rows, "robust") is (scale != 2.0)


def test_a_rule_needs_its_column():
    with pytest.raises(DataError, match="there is no column kd_judge"):
        best_rule([row | {"best_by": "kid"} for row in sweep(1.0)])
    with pytest.raises(DataError, match="'luck' is no rule"):
        best_rule([row | {"best_by": "luck"} for row in sweep(1.0)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocols": "judge: other weights"}, "features differ and cannot be compared: a has 'judge: w'"),
        ({"reference": "other images"}, "reference images differ"),
        ({"num_samples": 10.0}, "num_samples"),
        ({"num_pairwise": 10.0}, "num_pairwise"),
    ],
)
def test_rows_that_were_measured_otherwise_are_refused(change, words):
    row = {"method": "a", "protocols": "judge: w", "reference": "images", "num_samples": 9.0, "num_pairwise": 9.0}
    check_comparable([row, row | {"method": "b"}])
    with pytest.raises(DataError) as error:
        check_comparable([row, row | {"method": "b"} | change])
    assert words in str(error.value) and "b has" in str(error.value)


def test_pareto_front():
    """(accuracy, distance): the second is beaten by the third, the last has no distance."""
    points = [(0.2, 5.0), (0.5, 9.0), (0.6, 7.0), (0.9, 8.0), (0.9, 8.5), (1.0, NAN)]
    rows = [{"method": str(i), "accuracy_judge": a, "fd_judge": 1.0, "cfd_judge": d} for i, (a, d) in enumerate(points)]
    assert [row["method"] for row in pareto_front(rows)] == ["0", "2", "3"]


@pytest.mark.parametrize(
    "keep, message",
    [
        (lambda text: text[:-1], "cut off within its last line"),  # the last number may have lost digits
        (lambda text: text[: len(text) // 2], "(cut off within its last line|fields|is no number)"),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "non_robust_x0_adam lacks steps that other methods have"),
    ],
    ids=["last newline", "half", "last row"],
)
def test_a_forward_table_that_was_cut_off_is_refused(tmp_path, keep, message):
    path = tmp_path / "forward.csv"
    write_csv(path, forward_rows(steps=5), FORWARD_COLUMNS)
    assert len(read_forward(path)) == 6 * 5
    path.write_text(keep(path.read_text()))
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        read_forward(path)
