"""Starting the processes of a run on this machine, as torchrun does, with PyTorch's elastic agent in this process."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable

from common import process
from common.invocation import ROOT
from common.streams import print_stderr

SECONDS_TO_SAVE = "120"  # after a signal, until processes are killed


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(processes: int, words: list[str]) -> int:
    """Run train.py in so many processes, with these words of the command line -> its exit code. Signals are passed on
    to them, and this process waits until they have saved."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)  # older releases of PyTorch give 30
    if process.in_sweep:
        os.environ[process.PARENT] = str(os.getpid())
    with tempfile.TemporaryDirectory() as of_agent:  # where it would keep logs; without one it makes one, and leaves it
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any port that is free
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(of_agent),
        )
        return _exit_code(lambda: elastic_launch(config, sys.executable)(str(ROOT / "train.py"), *words))


def _exit_code(run: Callable[[], object]) -> int:
    """Run what an agent starts -> the exit code of the program. Says which process a signal ended, if any."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print_stderr(f"error: rank {rank} was ended by {name}; the other processes were stopped")
        return 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
