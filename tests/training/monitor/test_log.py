"""Metrics, progress lines and loggers during training, whose failures must never stop it."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.invocation import installed
from tests.support import QUICK, SMOKE, call, configured
from tests.training.runs import rewind
from training.loggers.tensorboard import TensorboardLogger, TensorboardSink
from training.loggers.wandb import WandbLogger
from training.metrics_file import MetricsFile, read_metrics, unscored
from training.monitor.guard import Guard
from training.monitor.progress import ProgressLine


def row(step, **more):
    return {"step": step, "train_loss": 3.0, **more}


def test_metrics_file_when_resumed_drops_rows_of_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)) + '{"step"')
    file = MetricsFile(path, resume_after=2)
    file.write(row(3, again=True))
    file.sync()
    assert read_metrics(path) == [row(1), row(2), row(3, again=True)]


def test_metrics_file_writes_numbers_that_are_not_finite_as_null(tmp_path):
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


def test_metrics_file_with_a_damaged_row_warns_and_keeps_the_others(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    first, last = (json.dumps(row(step)).encode() for step in (1, 3))
    for damage in NOT_ROWS:
        caplog.clear()
        path.write_bytes(first + b"\n" + damage + b"\n" + last + b"\n")
        assert MetricsFile(path, resume_after=3).past == [row(1), row(3)], damage[:40]
        assert f"{path} has lost rows: it holds 2 of the 3 steps done" in caplog.text
        MetricsFile(path, resume_after=3).write(row(4))
        assert read_metrics(path) == [row(1), row(3), row(4)]


def test_progress_line_on_a_dumb_terminal_prints_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    watch, numbers = ProgressLine(0, 100), {"train_bpb": 1.0, "tokens_per_second": 9.0, "mfu": None}
    for step in range(5, 101, 5):
        watch.step(row(step, **numbers), seconds_left=1)
    watch.stop()
    assert capsys.readouterr().err.count("  loss 3.000  bpb 1.000  9 tokens/s") == 10


def test_progress_line_within_a_long_step_tells_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("training.monitor.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = ProgressLine(0, 9)
    for seconds, count in ((0.01, 50), (8.0, 12), (40.0, 3)):  # each part takes so long
        for index in range(count):
            watch.show_part_progress(3, "micro-batch", index, count)
            now[0] += seconds
    watch.stop()
    parts = ["5/12", "9/12", "2/3", "3/3"]  # at most one every 30 seconds
    assert capsys.readouterr().err.splitlines() == [f"step 3/9: micro-batch {part}" for part in parts]


def test_metrics_file_keeps_the_evaluation_before_training_apart(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    before = {"step": 0, "train_loss": None, "val_loss": 5.0}
    file = MetricsFile(path, resume_after=0)
    file.begin(before)
    file.write(row(1))
    file.write(row(2, unscored=True))
    file.close()
    resumed = MetricsFile(path, resume_after=2)
    assert (resumed.before, resumed.past) == (before, [row(1), row(2, unscored=True)]) and not caplog.text
    assert unscored(resumed.past, 2) and not unscored(resumed.past, 1)
    assert resumed.complete({"val_loss": 3.0}) == row(2, val_loss=3.0)
    resumed.write(row(3))
    assert read_metrics(path) == [before, row(1), row(2, val_loss=3.0), row(3)]
    assert Guard(resumed.past, 3).skipped == 0
    assert MetricsFile(path, resume_after=0).before is None and read_metrics(path) == []  # it is measured again


def broken(*_, **__):
    raise RuntimeError("no key")


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_wandb_that_fails_is_a_warning(tmp_path, monkeypatch, caplog, fault):
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

    fake = SimpleNamespace(Settings=dict, init=broken if fault == "init" else init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = configured(WandbLogger).open(tmp_path, {"steps": 3})
    sink.write({"step": 1, "train_loss": 2.0})
    sink.close()
    assert "training goes on" in caplog.text and "no key" in caplog.text
    assert caplog.text.count("training goes on") == 1
    assert (f"to upload the run: {installed('wandb', 'sync', 'w')}\n" in caplog.text) == (fault != "init")
    if fault == "finish":
        assert calls == [({"step": 1, "train_loss": 2.0}, 1)]
        assert asked["mode"] == "offline" and asked["dir"] == tmp_path and asked["reinit"] == "create_new"
        assert asked["settings"] == {"silent": True, "init_timeout": 30.0}  # no server is waited for for ever


@pytest.mark.parametrize(
    ("mode", "environment", "entry", "fine"),
    [
        ("online", {}, None, False),
        ("online", {}, "example.org", False),
        ("online", {}, "api.wandb.ai", True),
        ("online", {"WANDB_BASE_URL": "https://example.org"}, "example.org", True),
        ("online", {"WANDB_API_KEY": "key"}, None, True),
        ("offline", {}, None, True),
        ("disabled", {}, None, True),
    ],
)
def test_wandb_online_without_a_login_is_refused_before_a_run(tmp_path, monkeypatch, mode, environment, entry, fine):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if entry:
        (tmp_path / "netrc").write_text(f"machine {entry} login user password key\n")
    logger = configured(WandbLogger, mode=mode)
    if fine:
        logger.check_installed()
    else:
        with pytest.raises(UserError, match=r"mode=online needs a login, .* wandb login makes one, logger.mode=off"):
            logger.check_installed()


def test_wandb_run_when_resumed_continues_and_never_merges(tmp_path, monkeypatch, caplog):
    asked = []
    remote = SimpleNamespace(dir="one/wandb/offline-run-1/files", log=lambda row, step: None, finish=lambda: None)
    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **options: (asked.append(options), remote)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    for part in (1, 2):
        (tmp_path / f"one/wandb/offline-run-{part}").mkdir(parents=True)
    for name in ("one", "two", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        configured(WandbLogger).open(tmp_path / name, {}).close()
    ids = [options["id"] for options in asked]
    assert " wandb sync one/wandb; its 2 parts become one run there, in the order of their times\n" in caplog.text
    assert ids[0] == ids[2] != ids[1] and all(options["resume"] == "allow" for options in asked)


def test_logger_that_fails_at_every_row_warns_once(tmp_path, monkeypatch, caplog):
    remote = SimpleNamespace(dir="w/offline-run-1/files", log=broken, finish=lambda: None)
    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **_: remote)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = configured(WandbLogger).open(tmp_path, {})
    for step in range(1, 9):
        sink.write(row(step))
        sink.sync()
    sink.close()
    assert caplog.text.count("logger=wandb failed, training goes on without it: no key") == 1


@pytest.mark.parametrize("fault", [None, "start", "write"])
def test_tensorboard_receives_the_numbers_of_every_step(tmp_path, monkeypatch, caplog, fault):
    calls, flushed = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            if fault == "start":
                broken()
            calls.append((folder, purge_step))

        def add_text(self, *text):
            calls.append(text)

        def add_scalar(self, *scalar):
            if fault == "write":
                broken()
            calls.append(scalar)

        def flush(self):
            flushed.append(len(calls))

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    sink = configured(TensorboardLogger).open(tmp_path, {"steps": 3, "optim": {"lr": 0.1}})
    sink.write(row(21, mfu=None))
    sink.sync()
    sink.write(row(22))
    sink.close()
    if fault:
        assert caplog.text.count("logger=tensorboard failed, training goes on without it: no key") == 1
    else:
        folder = str(tmp_path / "tensorboard")
        text = ("config", "    steps: 3\n    optim:\n      lr: 0.1", 21)
        assert calls == [(folder, 21), text, ("train/loss", 3.0, 21), ("train/loss", 3.0, 22)]
        assert flushed == [3, 4]  # when it is synchronised, and closed


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_logger_that_is_not_installed_is_refused_before_a_run_begins(workplace, monkeypatch, capsys, logger):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == logger else real(name, *rest))
    assert call("train", [*SMOKE, f"logger={logger}"], monkeypatch) == 2
    needs = f"error: logger={logger} needs the package {logger}, which is not here: "
    err = capsys.readouterr().err
    assert needs in err and " -m pip install -e " in err and not list(workplace.iterdir())


def test_tensorboard_of_a_resumed_run_shows_every_number_once(workplace, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [*QUICK, "logger=tensorboard", "steps=12", "save_every=5"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    for name in ("whole", "killed"):
        shown = EventAccumulator(str(workplace / name / "tensorboard"))
        shown.Reload()
        rows = read_metrics(workplace / name / "metrics.jsonl")
        keys = {TensorboardSink.TAGS[key]: key for row in rows for key in row if row[key] is not None and key != "step"}
        assert set(shown.Tags()["scalars"]) == set(keys)
        assert {"train/loss", "train/bits_per_byte", "validation/loss", "optim/lr", "optim/grad_norm"} < set(keys)
        assert "config/text_summary" in shown.Tags()["tensors"]
        for tag, key in keys.items():
            found = [(event.step, event.value) for event in shown.Scalars(tag)]
            there = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in there]  # kept in float32
