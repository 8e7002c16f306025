"""What is written while training, and what must never stop it."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from training.log import MetricsFile, WandbLogger, read_metrics


def row(step, **more):
    return {"step": step, "train_loss": 3.0, **more}


def test_metrics_of_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)) + '{"step"')
    file = MetricsFile(path, resume_after=2)
    file.write(row(3, again=True))
    file.sync()
    assert read_metrics(path) == [row(1), row(2), row(3, again=True)]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, resume_after=0).write({"step": 1, "train_loss": math.nan, "grad_norm": math.inf, "skipped": True})
    assert json.loads(path.read_text(), parse_constant=broken) == {
        **{"step": 1, "train_loss": None, "grad_norm": None, "skipped": True}
    }


NOT_ROWS = [
    b'{"step": 2, "train',
    b"\x80",
    b"[]",
    b"7",
    b"[" * 100_000,
    b'{"step": 2}',
    b'{"step": 1, "train_loss": 9}',
    b'{"step": true, "train_loss": 1}',
    b'{"step": 2, "train_loss": "x"}',
]


@pytest.mark.parametrize("damage", NOT_ROWS)
def test_a_row_that_is_lost_is_said_and_the_others_stay(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    first, last = (json.dumps(row(step)).encode() for step in (1, 3))
    path.write_bytes(first + b"\n" + damage + b"\n" + last + b"\n")
    assert MetricsFile(path, resume_after=3).past == [row(1), row(3)]
    assert f"{path} has lost rows: it holds 2 of the 3 steps done" in caplog.text
    MetricsFile(path, resume_after=3).write(row(4))
    assert read_metrics(path) == [row(1), row(3), row(4)]


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
