"""The comparison of ways to explain: the Pareto front, the section of the report."""

import math

import numpy as np
import pytest

from nrcg import cli
from nrcg.csv_files import read_csv, write_csv
from nrcg.report.explanations import front, realism_column
from nrcg.report.studies import explanations_study


def row(method, l1, distance, validity=0.9):
    found = {"method": method, "pair": "others to cat", "kind": "counterfactual", "num_images": 8, "num_skipped": 1}
    for name, value in (("validity", validity), ("validity_judge", validity / 2), ("l1", l1), ("cfd_judge", distance)):
        found |= {name: value, f"{name}_lo": value * 0.9, f"{name}_hi": value * 1.1}
    return found


ROWS = [row("near", 0.05, 40.0), row("worse", 0.06, 50.0), row("real", 0.12, 1.0), row("far", 0.2, 9.0)]


def test_the_front_holds_what_no_other_beats_in_both():
    assert realism_column(ROWS) == "cfd_judge"
    assert [one["method"] for one in front(ROWS, "cfd_judge")] == ["near", "real"]
    assert front([row("nan", 0.1, math.nan)], "cfd_judge") == []
    twins = [row("a", 0.1, 2.0), row("b", 0.1, 2.0)]  # neither beats the other
    assert [one["method"] for one in front(twins, "cfd_judge")] == ["a", "b"]


def test_tables_are_joined_and_drawn(tmp_path, capsys):
    tables = []
    for one in ROWS:
        tables.append(str(tmp_path / f"{one['method']}.csv"))
        write_csv(tables[-1], [one], list(one))
        images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"{one['method']}.npz", originals=images, images=255 - images)
    assert cli.main(["explanations-table", "--tables", *tables, "--out", str(tmp_path / "out")]) == 0
    assert [one["method"] for one in read_csv(tmp_path / "out/explanations.csv")] == [one["method"] for one in ROWS]
    study = explanations_study(tmp_path / "out")
    assert study.lines[0][0] == ("near, others to cat", "") and study.lines[0][1] == ("0.900", "0.810 – 0.990")
    assert "7 validation images" in study.paragraphs[0] and len(study.figures) == 2
    (tmp_path / "far.npz").write_bytes(b"")
    assert cli.main(["explanations-table", "--tables", *tables, "--out", str(tmp_path / "out")]) == 1
    assert "far.npz: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["validity_judge", "cfd_judge"])
def test_what_was_not_measured_is_left_out(tmp_path, missing):
    kept = [{key: value for key, value in one.items() if not key.startswith(missing)} for one in ROWS]
    write_csv(tmp_path / "a.csv", kept, list(kept[0]))
    images = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", originals=images, images=images)
    assert cli.main(["explanations-table", "--tables", str(tmp_path / "a.csv"), "--out", str(tmp_path)]) == 0
    assert not any(missing in title for title in explanations_study(tmp_path).columns)
