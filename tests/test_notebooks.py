"""The notebooks of docs/ run from top to bottom, with little training and few steps of diffusion."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "guide" else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NRCG_NOTEBOOK_STEPS", "15")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # T = 100 would be two minutes of sampling
        for whole, few in (("num_train_timesteps=100", "num_train_timesteps=5"), ("randint(100,", "randint(5,")):
            cell.source = cell.source.replace(whole, few)
        cell.source = cell.source.replace("num_inference_steps=20", "num_inference_steps=3")
    client = NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # an exception in a cell is one here
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "accuracy on test digits" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_ran(path):
    """Whoever reads it on the web sees pictures and numbers."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 4
    assert not any(out.output_type == "error" for out in outputs)
    assert path.stat().st_size < 300_000
