"""Kills training runs with SIGKILL, resumes them, and compares each with the run that was left alone, bit for bit.

python -m benchmarks.kill                # 200 kills, about a quarter of an hour on two cores
python -m benchmarks.kill --kills 20 --seed 1
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.killing import STEPS, UNDER_FIRE, start, train_under_fire
from tests.training.runs import assert_same_run
from training.run.composer import choices

KILLS_PER_RUN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    attentions = choices("attention")
    draw, met, runs, begun = random.Random(args.seed), Counter(), 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        while met.total() < args.kills:
            attention = attentions[runs % len(attentions)]
            precision = ("bf16", "fp32")[runs // len(attentions) % 2]
            options = [*UNDER_FIRE, f"attention={attention}", f"precision={precision}"]
            whole = place / f"{attention}-{precision}"
            if not whole.exists():
                whole.mkdir()
                _finish(start([*options, "run_dir=run"], whole))
            folder = place / f"killed-{runs}"
            folder.mkdir()
            met += Counter(train_under_fire(options, folder, min(KILLS_PER_RUN, args.kills - met.total()), draw))
            assert_same_run(whole / "run", folder / "run", STEPS)
            runs += 1
            print(f"{met.total()} kills in {runs} runs, all equal so far", file=sys.stderr)
    print(f"{met.total()} kills in {runs} runs of {STEPS} steps, {time.perf_counter() - begun:.0f} s")
    for moment, count in met.most_common():
        print(f"{count:6} {moment}")
    print("every run ended with the weights, optimizer state and metrics of the run that was left alone, bit for bit")


def _finish(process: subprocess.Popen) -> None:
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)


if __name__ == "__main__":
    main()
