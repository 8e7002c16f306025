"""docs/cluster/train.sbatch: begins a run, resumes it, and passes a signal on, with shell scripts in the place of
Slurm's commands and torchrun. It has not run on a cluster."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "cluster" / "train.sbatch"
LONG = 60  # seconds, on a busy machine
SETTINGS = ("parallel=fsdp", "data.path=a b.txt")
STAND_INS = {
    "scontrol": """
        case $1 in
            show) printf 'node1\\nnode2\\n' ;;
            *) echo "$*" >> scontrol.log ;;
        esac
    """,
    "srun": """
        shift  # --kill-on-bad-exit
        set -m  # the step is a group of processes, and each of them gets a signal
        "$@" &
        trap 'kill -USR1 -- -$!' USR1
        trap 'kill -KILL -- -$!' TERM
        wait $!
        wait $!  # again, where a signal ended the waiting
    """,
    "torchrun": """
        printf '%s\\n' "$@" >> torchrun.log
        for word in "$@"; do case $word in run_dir=*|resume=*) run=${word#*=} ;; esac; done
        mkdir -p "$run" && touch "$run/config.yaml"
        saved() {
            until [ -e let_it_save ]; do sleep 0.01; done
            touch "$run/saved" && exit "${SAVED:-143}"
        }
        ending=
        trap 'echo TERM >> signals.log; [ -z "$ending" ] || exit 130; ending=yes' TERM
        touch started
        until [ -n "$ending" ] || [ -n "${CODE:-}" ] || [ -e end ]; do sleep 0.01; done
        [ -z "$ending" ] || saved
        exit "${CODE:-0}"
    """,
}


@pytest.fixture
def checkout(tmp_path):
    """A folder that the job is submitted from, with the stand-ins in bin/."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text("#!/bin/bash\n" + text)
        program.chmod(0o755)
    return tmp_path


def submit(checkout: Path, script: Path = SCRIPT, **environment: str) -> subprocess.Popen:
    """Start the script as Slurm does, on two nodes."""
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(script), "runs/large one", *SETTINGS]
    return subprocess.Popen(command, cwd=checkout, env=os.environ | slurm | {"PATH": path} | environment)


def logged(checkout: Path, name: str) -> list[str]:
    file = checkout / f"{name}.log"
    return file.read_text().splitlines() if file.exists() else []


def words_of_training(checkout: Path) -> list[str]:
    """What follows train.py in the last command of torchrun."""
    words = logged(checkout, "torchrun")
    return words[len(words) - words[::-1].index("train.py") :]


def stop(checkout: Path, job: subprocess.Popen, number: int = signal.SIGTERM) -> int:
    """Send the script a signal, twice, while it trains, the second time while it saves -> its exit code."""
    wait_until((checkout / "started").exists)
    job.send_signal(number)
    wait_until(lambda: logged(checkout, "signals"))
    job.send_signal(number)
    time.sleep(0.05)  # for it to arrive, which it must not
    (checkout / "let_it_save").touch()
    return job.wait(timeout=LONG)


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_script_is_readable_by_bash_and_asks_slurm_for_a_signal_and_the_queue():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    options = re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), re.M)
    assert {"signal=B:TERM@120", "requeue", "open-mode=append", "ntasks-per-node=1"} <= {*options}


def test_script_begins_the_run_with_its_settings_on_all_nodes(checkout):
    assert submit(checkout, CODE="0").wait(timeout=LONG) == 0
    assert words_of_training(checkout) == ["run_dir=runs/large one", *SETTINGS]
    assert {"--nnodes=2", "--nproc-per-node=gpu", "--rdzv-endpoint=node1:24567"} <= {*logged(checkout, "torchrun")}
    assert logged(checkout, "scontrol") == []


def test_script_resumes_a_run_that_has_begun(checkout):
    (checkout / "runs/large one").mkdir(parents=True)
    (checkout / "runs/large one/config.yaml").touch()
    assert submit(checkout, CODE="0", PER_NODE="4").wait(timeout=LONG) == 0
    assert words_of_training(checkout) == ["resume=runs/large one"]
    assert "--nproc-per-node=4" in logged(checkout, "torchrun")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_script_passes_a_signal_on_once_waits_for_the_save_and_goes_back_into_the_queue(checkout, number):
    assert stop(checkout, submit(checkout), number) == 0
    assert logged(checkout, "signals") == ["TERM"]
    assert (checkout / "runs/large one/saved").exists()
    assert logged(checkout, "scontrol") == ["requeue 1234567"]

    assert submit(checkout, CODE="0").wait(timeout=LONG) == 0
    assert words_of_training(checkout) == ["resume=runs/large one"]
    assert logged(checkout, "scontrol") == ["requeue 1234567"]


PLANTED = {  # a fault: what of the script is replaced, and by what
    "srun kills at a SIGTERM": ('kill -USR1 "$!"', 'kill -TERM "$!"'),
    "the processes do not ignore what is for the shell": ("    trap '' USR1", "    :"),
    "the shell of a node does not pass it on": ('kill -TERM "$!"', ":"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_script_with_a_planted_fault_does_not_save(checkout, fault):
    before, after = PLANTED[fault]
    faulty = checkout / "faulty.sbatch"
    assert SCRIPT.read_text().count(before) == 1
    faulty.write_text(SCRIPT.read_text().replace(before, after))
    job = submit(checkout, faulty)
    wait_until((checkout / "started").exists)
    (checkout / "let_it_save").touch()
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (checkout / "end").touch()
    job.wait(timeout=LONG)
    assert not (checkout / "runs/large one/saved").exists()


def test_script_of_a_run_that_fails_keeps_out_of_the_queue(checkout):
    assert submit(checkout, CODE="2").wait(timeout=LONG) == 2
    assert logged(checkout, "scontrol") == []


def test_script_of_a_run_that_is_complete_when_the_signal_comes_keeps_out_of_the_queue(checkout):
    assert stop(checkout, submit(checkout, SAVED="0")) == 0
    assert logged(checkout, "signals") == ["TERM"]
    assert logged(checkout, "scontrol") == []


def test_script_without_a_folder_says_what_to_give(checkout):
    refused = subprocess.run(["bash", SCRIPT], cwd=checkout, capture_output=True, text=True)
    assert refused.returncode != 0 and "give the folder of the run" in refused.stderr
