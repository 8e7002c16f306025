"""The attentions that README.md and docs/own_attention.md add: their two files, put in place, obey the laws."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

USED = ("common", "conf", "data", "generation", "model", "runtime", "tests", "train.py", "training", "pyproject.toml")


PAGES = [
    ("README.md", "gated_gqa"),
    pytest.param("docs/own_attention.md", "gated_mqa", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("page", "attention"), PAGES)
def test_attention_of_the_page_obeys_the_laws(page, attention, tmp_path):
    for name in USED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (ROOT / page).read_text()
    files = re.findall(r"^`(\S+)`[^\n]*:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [path for path, _ in files] == [f"model/attention/{attention}.py", f"conf/attention/{attention}.yaml"]
    for path, content in files:
        (tmp_path / path).write_text(content)
    laws = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    found = subprocess.run(
        [*laws, "tests/model/attention/test_laws.py", "-k", f"{attention} and not Online and not Matmul"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 12
