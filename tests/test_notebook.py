"""The notebook: its code cells run in order, in a process of their own, without Jupyter."""

import json
import os
import subprocess
import sys

from tests.support import ROOT

NOTEBOOK = ROOT / "docs" / "from_python.ipynb"


def notebook_cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_notebook_is_of_format_4_and_holds_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])  # since 4.5 each has one
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {} and all(isinstance(line, str) for line in cell["source"])
    for cell in notebook_cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell.keys() == {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}


def test_notebook_code_cells_run_in_order_and_end_in_a_trained_model(tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in notebook_cells("code"))
    code += "\n\nassert len(rows) == run.steps and rows[-1]['val_loss'] < rows[9]['val_loss']"
    code += "\nassert len(text) == 30 and 0 < score.loss < rows[0]['train_loss']"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 30: " in result.stdout and "bits per byte" in result.stdout
