"""Whether a run can be trained by so many processes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.errors import UserError
from model.attention.base import divisors
from training.parallel.config import OneProcess
from training.run.config import Run
from training.run.parts import pop_part


def with_processes(run: Run, count: int, typed: Sequence[str]) -> Run:
    """The run as `count` processes train it, which its config.yaml shall say. typed: the overrides on the command line.
    Raises UserError where they cannot."""
    if isinstance(run.parallel, OneProcess):
        if count > 1:
            raise UserError(
                f"{count} processes were started, and parallel=none trains in one: add parallel=ddp or parallel=fsdp, "
                "or start train.py without torchrun"
            )
        return run
    wanted = run.parallel.processes
    if wanted not in (None, count) and _are_typed(typed):
        raise UserError(
            f"parallel.processes={wanted}, and torchrun started {count}: leave parallel.processes out, or start "
            "train.py without torchrun"
        )
    _check_share(run, count)
    obstacle = run.parallel.obstacle(run.precision, run.compile, run.optim)
    if obstacle:
        raise UserError(f"parallel={run.parallel.name}: {obstacle}")
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"processes": count})})


def processes_here(chosen: Mapping[str, Any], typed: Sequence[str]) -> int:
    """How many processes are to be started on this machine, of a choice of parallel=. Raises UserError where a run's
    own settings ask for more than it has cores and GPUs: they may be somebody else's."""
    parallel = pop_part({"parallel": chosen}, "parallel")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted, most = parallel.count, max(os.cpu_count() or 1, gpus)
    if wanted > most and not _are_typed(typed):
        raise UserError(
            f"the run was trained by {wanted} processes, and this machine has {most} cores or GPUs: add parallel="
            f"{parallel.name} parallel.processes={most}, or another number"
        )
    return wanted


def _are_typed(typed: Sequence[str]) -> bool:
    return any(word.lstrip("+~").startswith("parallel.processes=") for word in typed)


def _check_share(run: Run, count: int) -> None:
    if run.sequences % count == 0:
        return
    fitting = [n for n in divisors(run.sequences) if n <= count]
    more = -(-run.sequences // count) * count * run.model.context_length
    raise UserError(
        f"batch_tokens={run.batch_tokens} holds {run.sequences} sequences, which {count} processes cannot share "
        f"evenly: choose {fitting[-1]} processes, or batch_tokens={more}"
    )
