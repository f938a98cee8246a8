"""A distribution whose density is known, learned at toy size: table, models, page."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from toys import ROOT

from nrcg import cli, config
from nrcg.csv_files import read_csv
from nrcg.diffusion.mlp import PointMLP
from nrcg.errors import ConfigError, DataError
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.steps.density import measure_density

SMALL = {"num_steps": 120, "batch_size": 64, "num_train": 2000, "num_test": 40, "num_drawn": 30, "width": 32}
SMALL |= {"predicts": ["epsilon", "v_prediction"], "weightings": ["simple"], "num_blocks": 1}
SMALL |= {"schedule": {"num_train_timesteps": 40, "beta_start": 2.5e-3, "beta_end": 0.5}}


def settings(name, **changes):
    raw = config.read_yaml(ROOT / "config.yaml")
    raw["densities"] |= SMALL | changes
    return config.step_settings(config.parse(raw), config.DENSITIES, "density", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("densities")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRCG_TRACKING", "off")
        for name in ("two_moons", "checkerboard"):
            measure_density(
                settings(name), out=folder / f"{name}.csv", models=folder / name, device=torch.device("cpu")
            )
    return folder


def test_the_table_holds_bound_and_ode_beside_the_truth(folder):
    rows = {row["objective"]: row for row in read_csv(folder / "two_moons.csv")}
    assert set(rows) == {"epsilon-simple", "v_prediction-simple", "exact"}
    for name, row in rows.items():
        assert row["bound"] - row["true"] == pytest.approx(row["bound_gap"], abs=1e-9)
        assert row["bound_gap_lo"] < row["bound_gap"] < row["bound_gap_hi"]
        assert row["bound_gap"] > rows["exact"]["bound_gap"] or name == "exact"
    assert rows["exact"]["bound_gap"] > 0 and abs(rows["exact"]["flow_gap"]) < 0.4
    # A checkerboard has no closed form of its denoiser, and no density outside its squares that points could have.
    assert {row["objective"] for row in read_csv(folder / "checkerboard.csv")} == {
        "epsilon-simple",
        "v_prediction-simple",
    }


def test_the_networks_open_in_diffusers_and_draw_the_same_points(folder):
    pipe = DDPMPipeline.from_pretrained(folder / "two_moons/v_prediction-simple")
    assert isinstance(pipe.unet, PointMLP) and pipe.scheduler.config.prediction_type == "v_prediction"
    ours = GuidedDDPMPipeline.from_pretrained(folder / "two_moons/v_prediction-simple")
    drawn = ours(30, batch_size=30, seed=0, on_step=lambda done: None).samples.flatten(1)
    with np.load(folder / "two_moons.npz") as points:
        np.testing.assert_allclose(points["v_prediction-simple"].clip(-1, 1), drawn.numpy(), atol=1e-5)


def test_the_page_and_the_figures(folder, capsys):
    tables = [str(folder / f"{name}.csv") for name in ("two_moons", "checkerboard")]
    assert cli.main(["densities-table", "--tables", *tables, "--out", str(folder / "all")]) == 0
    assert len(read_csv(folder / "all/densities.csv")) == 5
    page = (folder / "all/report.html").read_text()
    assert "two_moons: the tightest bound is that of " in page and page.count("data:image/") == 2
    (folder / "checkerboard.npz").write_bytes(b"PK")
    assert cli.main(["densities-table", "--tables", *tables, "--out", str(folder / "all")]) == 1
    assert "checkerboard.npz: damaged" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match="density 'moons' is unknown; allowed: eight_gaussians, checkerboard, two_moons"
    ):
        settings("moons")
    monkeypatch.setenv("NRCG_TRACKING", "off")
    wild = settings(
        "two_moons", optimizer={"learning_rate": 1e30, "warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 1e30}
    )
    with pytest.raises(DataError, match=r"the loss is not finite; lower densities\.optimizer\.learning_rate"):
        measure_density(wild, out=tmp_path / "a.csv", models=tmp_path / "m", device=torch.device("cpu"))
