"""What is written while training, and what must never stop it."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from data.errors import UserError
from tests.support import SMOKE, call
from tests.training.runs import rewind
from training.log import MetricsFile, TensorboardLogger, WandbLogger, Watch, read_metrics


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
    b'{"step": 2, "train_loss": true}',
    b'{"step": 2, "train_loss": [1]}',
    b'{"step": 2, "train_loss": 1%s}' % (b"0" * 400),
    b'{"step": 2, "train_loss": 1, "val_loss": 1, "val_tokens": false}',
    b'{"step": 1%s, "train_loss": 1}' % (b"0" * 30),
    b'{"step": 7, "train_loss": 1}',
    b"0" * 3_000_000,
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


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    watch, numbers = Watch(0, 100), {"train_bpb": 1.0, "tokens_per_second": 9.0, "mfu": None}
    for step in range(5, 101, 5):
        watch.step(row(step, **numbers), seconds_left=1)
    watch.stop()
    assert capsys.readouterr().err.count("  loss 3.000  bpb 1.000  9 tokens/s") == 10


def broken(*_, **__):
    raise RuntimeError("no key")


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_failing_wandb_is_a_warning(tmp_path, monkeypatch, caplog, fault):
    caplog.set_level("INFO")
    calls = []
    remote = SimpleNamespace(
        dir="w/offline-run-1/files",
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
    assert caplog.text.count("training goes on") == 1
    assert ("to upload the run: wandb sync w/offline-run-1\n" in caplog.text) == (fault != "init")
    if fault == "finish":
        assert calls == [({"step": 1, "train_loss": 2.0}, 1)]
        assert asked["mode"] == "offline" and asked["dir"] == tmp_path and asked["reinit"] == "create_new"


def test_wandb_runs_go_on_when_resumed_and_never_merge(tmp_path, monkeypatch):
    asked = []
    remote = SimpleNamespace(dir="w/offline-run-1/files", log=lambda row, step: None, finish=lambda: None)
    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **options: (asked.append(options), remote)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("one", "two", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        WandbLogger().open(tmp_path / name, {}).close()
    ids = [options["id"] for options in asked]
    assert ids[0] == ids[2] != ids[1] and all(options["resume"] == "allow" for options in asked)


def test_a_logger_that_fails_at_every_row_says_so_once(tmp_path, monkeypatch, caplog):
    remote = SimpleNamespace(dir="w/offline-run-1/files", log=broken, finish=lambda: None)
    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **_: remote)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbLogger().open(tmp_path, {})
    for step in range(1, 9):
        sink.write(row(step))
        sink.sync()
    sink.close()
    assert caplog.text.count("logger=wandb failed, training goes on without it: no key") == 1


@pytest.mark.parametrize("fault", [None, "start", "write"])
def test_tensorboard_gets_the_numbers_of_every_step(tmp_path, monkeypatch, caplog, fault):
    calls, flushed = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            if fault == "start":
                broken()
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            if fault == "write":
                broken()
            calls.append(scalar)

        def flush(self):
            flushed.append(len(calls))

        def close(self):
            flushed.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    sink = TensorboardLogger().open(tmp_path, {})
    sink.write(row(21, mfu=None))
    sink.sync()
    sink.write(row(22))
    sink.close()
    if fault:
        assert caplog.text.count("logger=tensorboard failed, training goes on without it: no key") == 1
    else:
        folder = str(tmp_path / "tensorboard")
        assert calls == [(folder, 21), ("train_loss", 3.0, 21), ("train_loss", 3.0, 22)] and flushed == [2, "closed"]


def test_tensorboard_that_is_not_installed_is_refused_before_a_run_begins(workplace, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=tensorboard needs .* python -m pip install tensorboard"):
        TensorboardLogger().refuse_missing()
    assert call("train", [*SMOKE, "logger=tensorboard"], monkeypatch) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not list(workplace.iterdir())


def test_tensorboard_shows_every_number_of_every_step_once_also_of_a_resumed_run(workplace, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [*SMOKE, "logger=tensorboard", "steps=12", "save_every=5"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    for name in ("whole", "killed"):
        shown = EventAccumulator(str(workplace / name / "tensorboard"))
        shown.Reload()
        rows = read_metrics(workplace / name / "metrics.jsonl")
        tags = {key for row in rows for key in row if row[key] is not None} - {"step"}
        assert set(shown.Tags()["scalars"]) == tags > {"train_loss", "val_loss", "lr", "grad_norm"}
        for tag in tags:
            found = [(event.step, event.value) for event in shown.Scalars(tag)]
            there = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in there]  # kept in float32
