"""docs/own_attention.md: its two files, put in place, are an attention that obeys the laws."""

import os
import re
import shutil
import subprocess
import sys

from tests.support import ROOT

USED = ("common", "conf", "data", "generation", "model", "runtime", "tests", "train.py", "training", "pyproject.toml")


def test_attention_of_the_guide_obeys_the_laws(tmp_path):
    for name in USED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (ROOT / "docs/own_attention.md").read_text()
    files = re.findall(r"^`(\S+)`[^\n]*:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [path for path, _ in files] == ["model/attention/gated_mqa.py", "conf/attention/gated_mqa.yaml"]
    for path, content in files:
        (tmp_path / path).write_text(content)
    laws = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    found = subprocess.run(
        [*laws, "tests/model/attention/test_laws.py", "-k", "gated_mqa and not Online and not Matmul"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 12
