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

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.model.attention.laws")  # so that a law says what it found


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
