"""Sections beside the paper's comparison: verdicts say what the intervals support, and no more."""

import json
import math

import numpy as np
import pytest

from nrcg.csv_files import write_csv
from nrcg.errors import DataError
from nrcg.report.objectives import best_objectives, questions, save_objective_figures, verdicts
from nrcg.report.studies import likelihood_study, objectives_study


def row(predicts, weighting, bits, accuracy, width=0.05):
    found = {"objective": f"{predicts}-{weighting}", "predicts": predicts, "weighting": weighting, "scale": 2.0}
    for name, value in (
        ("bits_per_dim", bits),
        *(("fd_judge", bits * 10), ("cfd_judge", bits * 5), ("accuracy_judge", accuracy)),
        ("gradient_sensitivity", 1 / bits),
    ):
        found |= {name: value, f"{name}_lo": value - width, f"{name}_hi": value + width}
    return found | {"val_loss": bits / 100, "mlflow_run_id": ""}


ROWS = [
    row("epsilon", "simple", 3.0, 0.90),
    row("epsilon", "vlb", 2.97, 0.91),
    row("v_prediction", "simple", 3.4, 0.40),
    row("v_prediction", "vlb", math.nan, math.nan),
]


def test_the_best_and_those_that_cannot_be_told_from_it():
    asked = {question.title: question for question in questions(ROWS)}
    best, ties = best_objectives(ROWS, asked["likelihood"])
    assert best["objective"] == "epsilon-vlb" and [tie["objective"] for tie in ties] == ["epsilon-simple"]
    best, ties = best_objectives(ROWS, asked["guided accuracy"])  # the highest
    assert best["objective"] == "epsilon-vlb" and [tie["objective"] for tie in ties] == ["epsilon-simple"]
    assert best_objectives(ROWS[3:], asked["likelihood"]) == (None, [])
    said = verdicts(ROWS)
    first = "Best for likelihood: epsilon-vlb, bits per dimension 2.97; the 95 % intervals do not tell it from "
    assert said[0] == f"{first}epsilon-simple."
    assert said[1].endswith("fd_judge of unguided samples 29.7; the 95 % intervals tell it from the 3 others.")
    assert said[5].endswith("; without an interval.")


def test_the_section_of_objectives(tmp_path):
    write_csv(tmp_path / "objectives.csv", ROWS, list(ROWS[0]))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    save_objective_figures(ROWS, {one["objective"]: images for one in ROWS}, tmp_path)
    study = objectives_study(tmp_path)
    assert study.name == "objectives" and len(study.lines) == 4 and len(study.figures) == 2
    assert study.lines[1][:2] == [("epsilon-vlb", ""), ("2.97", "2.92 – 3.02")]
    assert study.lines[1][4] == ("91.0 %", "86.0 – 96.0")
    (tmp_path / "samples.png").unlink()
    with pytest.raises(DataError, match="no such figure"):
        objectives_study(tmp_path)


def test_the_section_of_a_likelihood(tmp_path):
    record = {"bits_per_dim": [3.21, 0.05], "num_images": 1200, "num_steps": 10, "flow_bits_per_dim": [3.0, 0.1]}
    (tmp_path / "likelihood.json").write_text(json.dumps(record))
    (tmp_path / "bits_per_dim.png").write_bytes(b"png")
    (text,) = likelihood_study(tmp_path).paragraphs
    assert "of 1,200 validation images is 3.210 ± 0.050 bits per dimension" in text
    assert "10 stratified terms of each image" in text and "By the probability-flow ODE it is 3.000 ± 0.100." in text
    (tmp_path / "likelihood.json").write_text("{}")
    with pytest.raises(DataError, match="no record of a likelihood"):
        likelihood_study(tmp_path)
