"""What a sweep will take: a timed step of each variant, and from it the seconds of a run.

The steps are timed in a process of its own, which ends before the first run begins: on a GPU it would hold memory that
the runs need, and on a CPU buffers.
"""

if __name__ == "__main__":
    from common import process

    process.start()

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.cli import one_line_errors
from common.console import level_of_log, to_stderr
from common.invocation import ROOT
from common.process import PARENT
from data.shards.prepare import prepare
from training.minutes import seconds_per_step
from training.run.config import Run
from training.run.start import compose_start

STARTUP = 5.0  # seconds of a process before its first step and after its last one
FORWARD = 1 / 3  # of the time of training a token, that of scoring one


class Pace(NamedTuple):
    """How fast a variant trains here."""

    step: float  # seconds
    val_tokens: int  # of the whole validation set

    def seconds(self, run: Run, done: int = 0) -> float:
        """Of the whole run, its evaluations and the start of its process included, without the steps done."""
        left = run.steps - done
        evaluations = left // run.eval_every if run.eval_every else 0
        scored = min(run.eval_tokens, self.val_tokens) * evaluations + self.val_tokens
        return STARTUP + self.step * (left + FORWARD * scored / run.batch_tokens)


def paces_of(variants: Mapping[str, Sequence[str]]) -> dict[str, Pace]:
    """Time a step of each variant. variants: the overrides of a run of each. Where that fails, the process says why,
    and this one ends with its exit code."""
    if not variants:
        return {}
    process = subprocess.Popen(
        [sys.executable, "-m", "ablation.sweep.pace"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C is for the sweep, which ends this
        env=os.environ | {PARENT: str(os.getpid()), "PYTHONPATH": str(ROOT)},
    )
    try:
        out, _ = process.communicate(json.dumps(variants))
    finally:
        process.kill()
    if process.returncode:
        sys.exit(process.returncode)
    return {variant: Pace(*pace) for variant, pace in json.loads(out).items()}


def main() -> None:
    with one_line_errors():
        to_stderr()
        found = {}
        for variant, overrides in json.load(sys.stdin).items():
            run = compose_start(*overrides)
            with level_of_log(logging.WARNING):  # what is logged on the way, each run says again
                corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
                found[variant] = Pace(seconds_per_step(run, corpus), len(corpus.val))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
