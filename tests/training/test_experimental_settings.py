"""Choices that have never run on their hardware say so, once, and docs/status.md lists just these."""

import importlib.util
import re

import pytest
import torch

from common.errors import UserError
from common.experimental import warn_experimental
from runtime.device import choose_device
from runtime.precision import choose_precision
from tests.support import ROOT, SMOKE, call, composed_run
from training.experimental_settings import EXPERIMENTS, SETTINGS, warn_experimental_settings

CUDA = torch.device("cuda")
STATUS = (ROOT / "docs" / "status.md").read_text()


@pytest.fixture(autouse=True)
def never_warned():
    warn_experimental.cache_clear()


def choose_fp8(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    choose_precision("fp8", CUDA)


def choose_mps(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    choose_device("mps")


def settings(*overrides: str):
    return lambda monkeypatch: warn_experimental_settings(composed_run(*SMOKE, *overrides), CUDA, overrides)


CHOICES = {
    "precision=fp8": choose_fp8,
    "device=mps": choose_mps,
    "kernel.flash=FA3": settings("kernel=sdpa", "kernel.flash=FA3"),
    "kernel.flash=FA4": settings("kernel=sdpa", "kernel.flash=FA4"),
    "kernel.backend=cudnn": settings("kernel=sdpa", "kernel.backend=cudnn"),
    "autotune=true": settings("compile=true", "autotune=true"),
    "kernel=flex": settings("kernel=flex"),
    "mlp=moe": settings("mlp=moe"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_experimental_choice_warns_once(choice, monkeypatch, caplog):
    for _ in range(2):
        CHOICES[choice](monkeypatch)
    line = f"{choice} is experimental: never run on its hardware, see docs/status.md"
    assert [record.getMessage() for record in caplog.records if "experimental" in record.getMessage()] == [line]


def test_status_page_lists_the_choices_that_warn():
    """Those of the runtime, too, which warn by themselves."""
    runtime = [path.read_text() for path in (ROOT / "runtime").glob("*.py")]
    warned = {choice for text in runtime for choice in re.findall(r'warn_experimental\("(.+?)"\)', text)} | {*SETTINGS}
    assert warned == CHOICES.keys()
    table = STATUS.partition("## Choices that warn")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {choice for row in rows for choice in re.findall(r"`(.+?)`", row)} == warned | {*EXPERIMENTS}


def test_device_cuda_without_a_gpu_is_one_error_and_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda: PyTorch sees 0 CUDA devices here: choose device=cpu or auto"):
        choose_device("cuda")
    assert not caplog.text


def test_experimental_experiment_warns_before_it_needs_anything(workplace, monkeypatch, capsys):
    (experiment,) = EXPERIMENTS
    monkeypatch.setattr("training.dry_run.dry_run", lambda *_, **__: None)
    call("train", [experiment, "dry_run=true"], monkeypatch)
    assert f"{experiment} is experimental: never run on its hardware" in capsys.readouterr().err


def test_experimental_warning_is_not_given_for_other_choices(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == CUDA
    choose_device("cpu")
    choose_precision("bf16", torch.device("cpu"))
    for options in (["compile=true", "autotune=true"], ["kernel=flex"]):
        warn_experimental_settings(composed_run(*SMOKE, *options), torch.device("cpu"), SMOKE)
    warn_experimental_settings(composed_run(*SMOKE, "kernel=sdpa", "kernel.backend=flash"), CUDA, SMOKE)
    assert "experimental" not in caplog.text
