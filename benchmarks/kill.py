"""Kills training runs with SIGKILL, resumes them, and compares each with the run that was left alone, bit for bit.

python -m benchmarks.kill                # 200 kills, about a quarter of an hour on two cores
python -m benchmarks.kill --kills 20 --seed 1
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare_runs import same_run
from common.conf_files import choices
from common.invocation import ROOT

KILLS_PER_RUN = 10
TRAIN = ROOT / "train.py"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    met: Counter[str] = Counter()
    runs = 0
    begun = time.perf_counter()
    attentions = choices("attention")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        while met.total() < args.kills:
            attention, precision = attentions[runs % len(attentions)], ("bf16", "fp32")[runs // len(attentions) % 2]
            options = [*UNDER_FIRE, f"attention={attention}", f"precision={precision}"]
            whole = place / f"{attention}-{precision}"
            if not whole.exists():
                whole.mkdir()
                finish(start([*options, "run_dir=run"], whole))
            folder = place / f"killed-{runs}"
            folder.mkdir()
            met += Counter(train_under_fire(options, folder, min(KILLS_PER_RUN, args.kills - met.total()), draw))
            if not same_run(whole / "run", folder / "run", STEPS):
                raise SystemExit(
                    f"after {met.total()} kills a run differs from the one left alone: {' '.join(options)}"
                )
            runs += 1
            print(f"{met.total()} kills in {runs} runs, all equal so far", file=sys.stderr)
    print(f"{met.total()} kills in {runs} runs of {STEPS} steps, {time.perf_counter() - begun:.0f} s")
    for moment, count in met.most_common():
        print(f"{count:6} {moment}")
    print("every run ended with the weights, optimizer state and metrics of the run that was left alone, bit for bit")


def finish(process: subprocess.Popen) -> None:
    """Wait for a process that is left alone. Exits with its stderr where it fails."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)


def start(arguments: Sequence[str], folder: Path, dies_at_checkpoint: int | None = None) -> subprocess.Popen:
    """Start `python train.py` in a folder, on one thread."""
    if dies_at_checkpoint is None:
        command = [sys.executable, TRAIN]
    else:
        code = DIES_WRITING.format(program=str(TRAIN))
        command = [sys.executable, "-c", code, str(dies_at_checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=folder, env=environment, preexec_fn=_default_signals, **pipes)


def _default_signals() -> None:
    """Restore default signal handlers: a parent that ignores some, as nohup does, hands that on to its children."""
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
        writing, before = len(met) == 1 < kills, written(run)
        process = start(arguments, folder, dies_at_checkpoint=2 if writing else None)
        if not writing and len(met) < kills:
            if not met or draw.random() < 0.25:
                time.sleep(draw.uniform(0, 3))
            else:
                while process.poll() is None and written(run) == before:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 0.7))
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=300)
        if process.returncode == -signal.SIGKILL:
            caught = writing or list(run.rglob(".writing-*"))
            met.append("while writing" if caught else "starting up" if written(run) == before else "training")
        elif process.returncode == 0 or "is complete at step" in err:
            return met
        else:
            raise AssertionError(f"exit code {process.returncode}: {err}")


def written(run: Path) -> int | None:
    """When the run last wrote a row of metrics; None before the first."""
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else None


if __name__ == "__main__":
    main()
