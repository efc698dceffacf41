"""The notebooks run from top to bottom, in a checkout and with the packages installed."""

import json
import os
from pathlib import Path

import pytest

from tests.docs import need

need("nbformat", "nbclient", "ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes of a notebook with its pictures


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["controlnet_from_nothing", "converting_weights", "several_controls"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    in_checkout = path.stem == "controlnet_from_nothing"
    if not in_checkout:  # elsewhere the packages are found as installed ones are
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    folder = path.parent if in_checkout else tmp_path
    there = set(path.parent.iterdir())
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    assert set(path.parent.iterdir()) == there  # nothing is left beside the notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_shows_its_results(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < LARGEST
    assert any(cell["outputs"] for cell in cells)
    assert not any(
        output["output_type"] == "error" or output.get("name") == "stderr"
        for cell in cells
        for output in cell["outputs"]
    )
