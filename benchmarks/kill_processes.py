"""Kills processes of runs that two train together (one of them, all, or the one that started them), resumes the runs,
and compares each with the run that was left alone, bit for bit.

python -m benchmarks.kill_processes               # 50 kills, half an hour on two busy cores
python -m benchmarks.kill_processes --kills 10 --seed 1
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
from collections.abc import Callable
from pathlib import Path

from benchmarks.compare_runs import same_run
from benchmarks.kill import finish, start, written

KILLS_PER_RUN = 5
STEPS = 120
UNDER_FIRE = ["experiment=smoke", "model.dropout=0.1", f"steps={STEPS}", "batch_tokens=512", "micro_batch_size=2"]
UNDER_FIRE += ["save_every=10", "eval_every=50", "eval_tokens=512", "tune_malloc=false", "data.size=100"]
PATIENCE = 120.0  # seconds in which all processes of a run must have ended after a kill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    draw, met, begun = random.Random(args.seed), Counter(), time.perf_counter()
    lasts: dict[str, float] = {}  # seconds, of each plan
    with tempfile.TemporaryDirectory() as name:
        place, runs = Path(name), 0
        while met.total() < args.kills:
            plan = ("fsdp", "ddp")[runs % 2]
            options = [*UNDER_FIRE, f"parallel={plan}", "parallel.processes=2", "run_dir=run"]
            whole, folder = place / plan, place / f"killed-{runs}"
            for one in (whole, folder):
                one.mkdir(exist_ok=True)
            if plan not in lasts:
                alone = time.perf_counter()
                finish(start(options, whole))
                lasts[plan] = time.perf_counter() - alone
            met += _under_fire(options, folder, min(KILLS_PER_RUN, args.kills - met.total()), lasts[plan], draw)
            if not same_run(whole / "run", folder / "run", STEPS):
                raise SystemExit(f"after {met.total()} kills a run differs from the one left alone, parallel={plan}")
            runs += 1
            print(f"{met.total()} kills in {runs} runs, all equal so far", file=sys.stderr)
    print(f"{met.total()} kills in {runs} runs of {STEPS} steps, {time.perf_counter() - begun:.0f} s")
    for victim, count in met.most_common():
        print(f"{count:6} {victim}")
    print("every run ended with the weights, optimizer state and metrics of the run that was left alone, bit for bit;")
    print("no process was left behind")


def _under_fire(options: list[str], folder: Path, kills: int, lasts: float, draw: random.Random) -> Counter:
    """Train to the end, with kills on the way -> the victims. lasts: seconds of a run, within which they fall."""
    met: Counter[str] = Counter()
    while True:
        resumed = (folder / "run/config.yaml").exists()
        process = start(["resume=run"] if resumed else options, folder)
        killed, workers = False, []
        if met.total() < kills:
            _wait_for_moment(process, folder / "run", lasts, draw)
            victim = draw.choice(sorted(VICTIMS))
            workers = _children(process.pid)
            if process.poll() is None and (workers or victim == "agent"):
                for pid in VICTIMS[victim](process.pid, workers, draw):
                    os.kill(pid, signal.SIGKILL)
                met[victim] += 1
                killed = True
        _, err = process.communicate(timeout=PATIENCE if killed else PATIENCE + 10 * lasts)
        _wait_for_end(workers)
        if process.returncode == 0 or "is complete at step" in err:
            return met


def _wait_for_moment(process: subprocess.Popen, run: Path, lasts: float, draw: random.Random) -> None:
    """Wait from the start of the processes, or from the first step on that they write, or until they have ended."""
    if draw.random() < 0.5:
        end = time.monotonic() + draw.uniform(0.0, lasts / 2)
    else:
        before = written(run)
        while process.poll() is None and written(run) == before:
            time.sleep(0.01)
        end = time.monotonic() + draw.uniform(0.0, lasts / 4)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def _one(_agent: int, workers: list[int], draw: random.Random) -> list[int]:
    return [draw.choice(workers)]


def _all(_agent: int, workers: list[int], _draw: random.Random) -> list[int]:
    return workers


def _agent(agent: int, _workers: list[int], _draw: random.Random) -> list[int]:
    return [agent]


VICTIMS: dict[str, Callable[[int, list[int], random.Random], list[int]]] = {"one": _one, "all": _all, "agent": _agent}


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def _wait_for_end(pids: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            raise SystemExit(f"processes were left behind: {pids}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
