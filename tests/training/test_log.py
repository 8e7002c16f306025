"""What is written while training, and what must never stop it."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from training.log import MetricsFile, WandbLogger, read_metrics


def test_metrics_of_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step"')
    MetricsFile(path, resume_after=2).write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, resume_after=0).write({"step": 1, "train_loss": math.nan, "grad_norm": math.inf, "skipped": True})
    assert json.loads(path.read_text(), parse_constant=broken) == {
        **{"step": 1, "train_loss": None, "grad_norm": None, "skipped": True}
    }


@pytest.mark.parametrize("damage", [b'{"step": 2, "train', b"\x80", b"[]", b'{"step": 3}', b"7", b"[" * 100_000])
def test_lost_rows_are_said(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert MetricsFile(path, resume_after=3).past == [{"step": 1}]
    assert f"{path} has lost rows: it holds 1 of the 3 steps done" in caplog.text


def broken(*_, **__):
    raise RuntimeError("no key")


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_failing_wandb_is_a_warning(tmp_path, monkeypatch, caplog, fault):
    calls = []
    remote = SimpleNamespace(
        log=broken if fault == "log" else lambda row, step: calls.append((row, step)),
        finish=broken if fault == "finish" else lambda: calls.append("finish"),
    )
    asked = {}

    def init(**options):
        asked.update(options)
        return remote

    fake = SimpleNamespace(Settings=lambda **_: None, init=broken if fault == "init" else init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbLogger().open(tmp_path, {"steps": 3})
    sink.write({"step": 1, "train_loss": 2.0})
    sink.close()
    assert "training goes on" in caplog.text and "no key" in caplog.text
    if fault == "finish":
        assert calls == [({"step": 1, "train_loss": 2.0}, 1)]
        assert asked["mode"] == "offline" and asked["dir"] == tmp_path and asked["reinit"] == "create_new"
