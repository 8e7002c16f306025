"""Starting the processes of a run: by train.py itself, and by torchrun."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common.invocation import ROOT
from tests.support import SMOKE, call, changed
from tests.training.parallel.together import train_together
from tests.training.runs import assert_same_run

TINY = [*SMOKE, "data.size=40", "steps=30", "save_every=5", "eval_every=10", "batch_tokens=512", "micro_batch_size=2"]
FSDP = [*TINY, "parallel=fsdp", "run_dir=run"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_train_starts_as_many_processes_as_it_is_told_or_the_run_had(workplace, monkeypatch):
    started = []
    monkeypatch.setattr("training.parallel.launch.launch", lambda count, words: started.append((count, words)) or 7)
    assert call("train", [*TINY, "parallel=ddp", "parallel.processes=4"], monkeypatch) == 7
    ended = train_together(workplace, *changed(TINY, "steps=1"), "parallel=ddp", "run_dir=run")
    assert [one.code for one in ended] == [0, 0], ended
    assert call("train", ["resume=run", "steps=2"], monkeypatch) == 7
    assert [count for count, _ in started] == [4, 2]
    assert call("train", ["resume=run", "steps=2", "parallel=none"], monkeypatch) == 0  # here
    assert len(started) == 2


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["parallel=ddp", "parallel.processes=3"], "which 3 processes cannot share evenly: choose 2 processes"),
        (["parallel=fsdp", "parallel.processes=2", "optim=adafactor"], "parallel=fsdp: this optimizer needs matrices"),
        (["parallel=ddp", "parallel.processes=2", "minutes=1"], "minutes=1 is measured in one process"),
        (["parallel=ddp", "parallel.processes=2", "init_from=nowhere"], "nowhere is not a run"),
    ],
)
def test_train_starts_no_process_where_all_would_refuse(workplace, monkeypatch, capsys, words, complaint):
    monkeypatch.setattr("training.parallel.launch.launch", lambda *_: pytest.fail("processes were started"))
    assert call("train", [*TINY, *words], monkeypatch) == 2
    err = capsys.readouterr().err
    assert complaint in err and len(err.splitlines()) == 1


def test_fsdp_in_one_process_saves_what_others_read_and_goes_on(workplace):
    def run(*words: str) -> None:
        [ended] = train_together(workplace, *words, count=1)
        assert ended.code == 0, ended

    words = [*changed(TINY, "steps=4", "save_every=2"), "parallel=fsdp"]
    run(*words, "run_dir=whole")
    run(*words, "run_dir=run")
    shutil.rmtree("run/checkpoints/step_00000004")
    run("resume=run")
    assert_same_run(workplace / "whole", workplace / "run", 4)
    run("resume=run", "steps=5", "parallel=none")


def start(words: list[str], *before: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *before, str(ROOT / "train.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def wait_for(path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def stopped(workplace, victim: str) -> str:
    """A run that is stopped midway, all of its processes gone -> what it wrote to stderr."""
    process = start([*FSDP, "parallel.processes=2"])
    wait_for(workplace / "run/checkpoints/step_00000005", process)
    workers = children(process.pid)
    number = signal.SIGTERM if victim == "SIGTERM" else signal.SIGKILL
    os.kill(workers[-1] if victim == "worker" else process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == {"SIGTERM": 143, "worker": 137, "agent": -9}[victim], err
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.05)
    return err


@pytest.mark.slow
def test_run_of_started_processes_stopped_in_any_way_goes_on_bit_for_bit(workplace):
    assert start([*FSDP[:-1], "run_dir=whole", "parallel.processes=2"]).wait() == 0
    said = {
        "SIGTERM": "saved; continue with",
        "worker": "error: rank 1 was ended by SIGKILL",
        "agent": "saved; continue",
    }
    for victim, words in said.items():
        assert words in stopped(workplace, victim)
        assert start(["resume=run"]).wait() == 0
        assert_same_run(workplace / "whole", workplace / "run", 30)
        shutil.rmtree("run")


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(workplace):
    assert start([*FSDP[:-1], "run_dir=whole", "parallel.processes=2"]).wait() == 0
    process = start(FSDP, *TORCHRUN, "--max-restarts=3")
    wait_for(workplace / "run/checkpoints/step_00000005", process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "validation" in out and "resuming run after step" in err
    assert_same_run(workplace / "whole", workplace / "run", 30)
