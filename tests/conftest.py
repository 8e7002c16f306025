"""One thread per test process (they run side by side), and no network: what a test needs, it makes. PyTorch, which
reads the number of threads from here, is not imported: the process that hands out the tests does without. Programs
that tests start keep what Python compiled of the sources, even where the environment says otherwise: it takes each of
them a second or more."""

import functools
import gc
import os
import sys
import tempfile

if "torch" in sys.modules:  # which has counted its threads already
    sys.modules["torch"].set_num_threads(1)

os.environ |= {
    "XDG_STATE_HOME": tempfile.mkdtemp(prefix="headroom-tests-"),  # what signs the runs of these tests
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "",
}

import logging
from pathlib import Path

import pytest

os.fsync = lambda file: None  # no test loses power, and to wait for the disk thousands of times takes its time
gc.set_threshold(10_000)  # reference counting frees nearly all; cycles are looked for less often

pytest.register_assert_rewrite("tests.model.attention.laws")  # so that a law says what it found


looked_through = 0  # how many modules there were when garbage was last told from what stays
TIERS = {  # of files and folders; all else is unit, but for what runs programs, in a workplace
    "laws": [
        *(f"model/test_{part}.py" for part in ("flat_model", "flex", "kernels", "loss", "moe", "stats")),
        *(f"generation/test_{part}.py" for part in ("compiled_step", "decode", "prefill", "self_speculation")),
        *("model/attention", "generation/test_speculative.py", "compatibility"),
        *(f"training/test_{part}.py" for part in ("activations", "mtp")),
    ],
    "system": [
        *("ablation/sweep", "benchmarks", "fuzz"),
        *(f"ablation/test_{part}.py" for part in ("false_alarms", "probes", "report")),
        *(f"test_{part}.py" for part in ("commands", "docs", "docs_commands", "notebook", "planted_faults")),
        *(f"training/test_{part}.py" for part in ("determinism", "faults", "step_memory", "training")),
        *("training/monitor/test_log.py", "training/parallel", "training/run"),
    ],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if tier := tier_of(item.path):
            item.add_marker("system" if tier == "unit" and "workplace" in item.fixturenames else tier)


@functools.cache
def tier_of(path: Path) -> str | None:
    """Of a file under tests/."""
    here = Path(__file__).parent
    if not path.is_relative_to(here):
        return None
    inside = [tier for tier, places in TIERS.items() if any(path.is_relative_to(here / place) for place in places)]
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
def imported_for_good():
    """What is imported stays, and is kept from collections of garbage, which would take long: some predictions of
    memory ask for one."""
    yield
    global looked_through
    if len(sys.modules) > looked_through + 100:
        looked_through = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def compiled_alone():
    """PyTorch refuses to compile one function more than eight times in a process, however many models it is of."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
