"""Runs whose batches are read a step ahead: the same run as without, and no thread left, however it ends."""

import os
import shutil
import signal
import threading

import pytest

import training.step
from tests.support import SMOKE, call
from tests.training.runs import assert_same_run
from training.session import Session

# Dropout, accumulation, documents apart, and an epoch's end on the way.
OPTIONS = [*SMOKE, "model.dropout=0.1", "micro_batch_size=4", "document_mask=true", "batch_tokens=512"]
OPTIONS += ["data.size=12", "steps=12", "save_every=5", "eval_every=5", "eval_tokens=256"]


@pytest.fixture
def in_step(monkeypatch):
    """Call it with a function that is called once, within the step of a run after six others."""

    def arrange(happens) -> None:
        left, train_step = [happens], training.step.train_step

        def step(state, *arguments):
            if state.step == 6 and left:
                left.pop()()
            return train_step(state, *arguments)

        monkeypatch.setattr(training.step, "train_step", step)

    return arrange


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_run_with_prefetch_is_the_run_without(whole, workplace, monkeypatch):
    read = []

    def next_batches(session):
        read.append(session.state.step)
        return session.prefetch.batches.of_step(session.state.step, session.state.device)

    monkeypatch.setattr(Session, "next_batches", next_batches)
    assert call("train", [*OPTIONS, "run_dir=run"], monkeypatch) == 0
    assert read == list(range(12))
    assert_same_run(whole, workplace / "run", step=12)


def test_run_reads_ahead_while_it_trains_and_leaves_no_thread(whole, monkeypatch, in_step):
    seen = []
    in_step(lambda: seen.extend(readers()))
    assert call("train", [*OPTIONS, "run_dir=run"], monkeypatch) == 0
    assert len(seen) == 1 and not readers()


@pytest.mark.parametrize(("times", "code"), [(1, 130), (2, 130)], ids=["stopped", "stopped at once"])
def test_run_that_is_stopped_leaves_no_thread_and_resumes_equal(whole, workplace, monkeypatch, in_step, times, code):
    in_step(lambda: [signal.raise_signal(signal.SIGINT) for _ in range(times)])
    assert call("train", [*OPTIONS, "run_dir=run"], monkeypatch) == code
    assert not readers()
    assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(whole, workplace / "run", step=12)


def test_shard_cut_short_amid_a_run_is_one_line_and_leaves_no_thread(whole, workplace, monkeypatch, capsys, in_step):
    (shard,) = workplace.glob("cache/*/train_00000.tokens")
    in_step(lambda: os.truncate(shard, 5000))
    capsys.readouterr()
    assert call("train", [*OPTIONS, "run_dir=run"], monkeypatch) == 2
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "train_00000.tokens has changed while it was in use" in error and "Traceback" not in said
    assert not readers()
    shutil.rmtree(shard.parent)
    assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(whole, workplace / "run", step=12)
