"""The notebook and the page on the use from Python: their code runs in a process of its own, without Jupyter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    printed = printed_by(code, tmp_path)
    assert "step 30: " in printed and "bits per byte" in printed


@pytest.mark.slow
def test_code_of_the_page_runs_in_order(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "from_python.md").read_text(), re.M | re.S)
    code = "\n\n".join(blocks) + "\nassert (run.steps, run.model.attention.kv_lora_rank) == (30, 16)"
    code += "\nassert logits.shape == (1, 14, 257) and 0 < score.bpb < 8"
    assert "runs/first" in printed_by(code, tmp_path)


def printed_by(code: str, folder: Path) -> str:
    """What a new process prints that runs the code in the folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
