"""docs/phantom.ipynb, run as it is, in a folder of its own."""

import json
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "phantom.ipynb"


def test_notebook_runs_from_patients_to_segmentations(tmp_path, monkeypatch):
    for variable in [name for name in os.environ if name.startswith("nnUNet_")]:  # it sets what it needs
        monkeypatch.delenv(variable)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nothing in the user's home
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]  # committed without
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Next, e.g.: nnUNetv2_train 500 2d 0 -tr nnUNetTrainerSemiCML" in printed
    results = tmp_path / "phantom_notebook" / "T1_segmentations"
    measured = json.loads((results / "summary.json").read_text())["metric_per_case"]
    assert len(measured) == len([*results.glob("*.nii.gz")]) == 3
