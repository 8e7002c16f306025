"""Faults of runs that several processes train: nothing is lost, and one line says what happened."""

import os
import shutil
import signal
import socket
import sys

import pytest

from tests.support import QUICK, changed
from tests.training.parallel.together import Training, train_together
from tests.training.runs import assert_same_run

TINY = [*QUICK, "steps=8", "save_every=2", "eval_every=4", "micro_batch_size=1", "model.dropout=0.1"]


def line_of(ended) -> str:
    """What the one process that spoke of the fault said."""
    lines = [one.err.splitlines() for one in ended]
    errors = [line for of_one in lines for line in of_one if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert all(one.code for one in ended) and not any("Traceback" in one.err for one in ended), ended
    return errors[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders with a run of each plan that nothing disturbed."""
    folders = {}
    for plan in ("ddp", "fsdp"):
        folder = folders[plan] = tmp_path_factory.mktemp(plan)
        ended = train_together(folder, *TINY, "run_dir=run", f"parallel={plan}")
        assert [one.code for one in ended] == [0, 0], ended
        assert "validation" in ended[0].out and ended[1].out == ended[1].err == ""
    return folders


@pytest.mark.parametrize("plan", ["ddp", "fsdp"])
def test_run_stopped_by_sigterm_is_saved_and_goes_on_bit_for_bit(whole, tmp_path, plan):
    words = [*TINY, "run_dir=run", f"parallel={plan}"]
    training = Training(tmp_path, words)
    training.wait_for(tmp_path / "run/checkpoints/step_00000002")
    training.send(signal.SIGTERM, 1)  # to one of them, and all stop
    assert [one.code for one in training.ended()] == [143, 143]
    assert not (tmp_path / "run/checkpoints/step_00000008").exists()
    assert [one.code for one in train_together(tmp_path, "resume=run")] == [0, 0]
    assert_same_run(whole[plan] / "run", tmp_path / "run", 8)


@pytest.mark.parametrize("plan", ["ddp", "fsdp"])
def test_run_whose_process_is_killed_goes_on_bit_for_bit(whole, tmp_path, plan):
    training = Training(tmp_path, [*TINY, "run_dir=run", f"parallel={plan}"])
    training.wait_for(tmp_path / "run/checkpoints/step_00000004")
    training.send(signal.SIGKILL, 1)
    ended = training.ended()
    assert ended[1].code == -signal.SIGKILL and ended[0].code == 2
    assert "another process of the run has ended" in line_of(ended)
    assert [one.code for one in train_together(tmp_path, "resume=run")] == [0, 0]
    assert_same_run(whole[plan] / "run", tmp_path / "run", 8)


def test_process_that_hangs_is_named_with_its_step(tmp_path):
    training = Training(tmp_path, changed(TINY, "steps=1000", "run_dir=run", "parallel=ddp", "parallel.timeout=5"))
    training.wait_for(tmp_path / "run/checkpoints/step_00000002")
    training.send(signal.SIGSTOP, 1)
    training.processes[0].join(60)
    training.send(signal.SIGKILL, 1)
    line = line_of(training.ended())
    assert "rank 1, at step " in line and "parallel.timeout=5 seconds" in line


def with_other_settings(rank: int) -> None:
    sys.argv += ["seed=5"] * rank


def test_processes_that_disagree_are_told(tmp_path):
    ended = train_together(tmp_path, *TINY, "run_dir=run", "parallel=ddp", arrange=with_other_settings)
    assert "the processes disagree: rank 1 differs from rank 0 in seed=5, not 0:" in line_of(ended)
    assert not (tmp_path / "run").exists()


def test_batch_that_processes_cannot_share_is_refused(tmp_path):
    ended = train_together(tmp_path, *changed(TINY, "batch_tokens=320", "parallel=ddp"))
    assert "holds 5 sequences, which 2 processes cannot share evenly: choose 1 processes" in line_of(ended)


def test_processes_without_parallel_are_refused(tmp_path):
    assert "add parallel=ddp or parallel=fsdp" in line_of(train_together(tmp_path, *TINY))


def test_process_that_never_comes_is_said(tmp_path):
    ended = train_together(tmp_path, *TINY, "parallel=ddp", "parallel.timeout=1", start=[0])
    assert "not all of the 2 processes came" in line_of(ended)


def test_port_in_use_is_said(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()

        def use(rank: int) -> None:
            os.environ["MASTER_PORT"] = str(held.getsockname()[1])

        ended = train_together(tmp_path, *TINY, "parallel=ddp", "parallel.timeout=5", start=[0], arrange=use)
    assert "is in use" in line_of(ended)


@pytest.mark.parametrize("word", ["compile=true", "optim=adafactor"])
def test_what_fsdp_cannot_do_is_refused(tmp_path, word):
    line = line_of(train_together(tmp_path, *TINY, word, "parallel=fsdp"))
    assert line.startswith("error: parallel=fsdp: ") and "parallel=ddp" in line


def test_sharded_run_resumed_in_one_process_says_that_bits_differ(whole, tmp_path):
    shutil.copytree(whole["fsdp"] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    [ended] = train_together(tmp_path, "resume=run", "parallel=none", count=1)
    assert ended.code == 0 and "ran with processes 2 of parallel=fsdp, this process has None" in ended.err
