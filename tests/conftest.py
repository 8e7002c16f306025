"""One thread per test process (they run side by side), and no network: what a test needs, it makes."""

import os
import tempfile

os.environ |= {
    "XDG_STATE_HOME": tempfile.mkdtemp(prefix="headroom-tests-"),  # what signs the runs of these tests
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}

import logging
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.model.attention.laws")  # so that a law says what it found


TIERS = {  # of files and folders; all else is unit
    "laws": [
        *("model/attention", "model/test_flat_model.py", "model/test_kernels.py", "model/test_stats.py"),
        "compatibility",
    ],
    "system": [
        *("ablation/sweep", "ablation/test_false_alarms.py", "ablation/test_probes.py", "benchmarks", "fuzz"),
        *("test_commands.py", "test_docs.py", "test_docs_commands.py", "test_notebook.py", "test_planted_faults.py"),
        *(f"training/{part}" for part in ("monitor/test_log.py", "run", "test_faults.py", "test_training.py")),
    ],
}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(tier_of(item.path.relative_to(here)))


def tier_of(path: Path) -> str:
    """Of a file under tests/."""
    inside = [tier for tier, places in TIERS.items() if any(path.is_relative_to(place) for place in places)]
    return inside[0] if inside else "unit"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, so that runs/ and cache/ land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def heard():
    """Let log messages reach caplog again after a program in this process sent them to stderr."""
    yield
    logger = logging.getLogger("headroom")
    logger.handlers[:] = []
    logger.propagate = True
    logger.setLevel(logging.NOTSET)  # sample.py leaves WARNING


@pytest.fixture(autouse=True)
def compiled_alone():
    """PyTorch refuses to compile one function more than eight times in a process, however many models it is of."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
