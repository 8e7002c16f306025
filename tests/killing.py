"""Real processes that train, and are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support import ROOT

STEPS = 300
UNDER_FIRE = ["experiment=smoke", "model.dropout=0.1", f"steps={STEPS}", "batch_tokens=256", "micro_batch_size=2"]
UNDER_FIRE += ["save_every=20", "eval_every=50", "eval_tokens=512", "tune_malloc=false"]
# Dies in the middle of writing its n-th checkpoint: when the n-th file of weights is whole and the manifest is not.
DIES_WRITING = """
import os, runpy, signal, sys, training.run.checkpoint as checkpoint
n, with_checksum = int(sys.argv.pop(1)), checkpoint.with_checksum
def counted(content):
    global n
    n -= 1
    if n == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return with_checksum(content)
checkpoint.with_checksum = counted
sys.argv[0] = "train.py"
runpy.run_path({program!r}, run_name="__main__")
"""


def start(arguments: Sequence[str], folder: Path, dies_at_checkpoint: int | None = None) -> subprocess.Popen:
    """`python train.py` in a folder, on one thread."""
    if dies_at_checkpoint is None:
        command = [sys.executable, ROOT / "train.py"]
    else:
        code = DIES_WRITING.format(program=str(ROOT / "train.py"))
        command = [sys.executable, "-c", code, str(dies_at_checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=folder, env=environment, preexec_fn=_hear_signals, **pipes)


def _hear_signals() -> None:
    """Whatever started the tests may ignore some, as nohup does, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def train_under_fire(options: Sequence[str], folder: Path, kills: int, draw: random.Random) -> list[str]:
    """Trains to the end in `folder`/run, with SIGKILLs on the way -> what each kill met. The first falls while the run
    is being made or soon after, the second inside a checkpoint write, the others at random moments, from the start of
    the process or from its first step on."""
    met = []
    run = folder / "run"
    while True:
        arguments = ["resume=run"] if (run / "config.yaml").exists() else [*options, "run_dir=run"]
        writing, before = len(met) == 1 < kills, _written(run)
        process = start(arguments, folder, dies_at_checkpoint=2 if writing else None)
        if not writing and len(met) < kills:
            if not met or draw.random() < 0.25:
                time.sleep(draw.uniform(0, 3))
            else:
                while process.poll() is None and _written(run) == before:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 0.7))
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=300)
        if process.returncode == -signal.SIGKILL:
            caught = writing or list(run.rglob(".writing-*"))
            met.append("while writing" if caught else "starting up" if _written(run) == before else "training")
        elif process.returncode == 0 or "is complete at step" in err:
            return met
        else:
            raise AssertionError(f"exit code {process.returncode}: {err}")


def _written(run: Path) -> int | None:
    """When the run last wrote down a step, as far as one did."""
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else None
