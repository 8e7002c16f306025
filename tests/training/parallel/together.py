"""Processes that train together, for tests: forked, so that none of them imports anything again."""

import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import train
from common import process, ranks
from common.conf_files import choices
from common.overrides import hydra_arguments
from generation import preview
from runtime.world import ProcessGroup
from tests.composition import request_of
from training.monitor import monitor
from training.run.composer import choice

# What two seconds of each process would go into, were it not there before they are forked.
IMPORTED = ("torch._dynamo", "torch.distributed.checkpoint", "training.parallel.fsdp")
IMPORTED += tuple(f"training.{name}" for name in ("dry_run", "measure", "optim.muon", "run.start", "session"))
TIMEOUT = 300  # seconds
GRACE = 20  # seconds that a process gets to end after SIGTERM


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def forking() -> BaseContext:
    """What starts processes that need import nothing again."""
    for module in IMPORTED:
        importlib.import_module(module)
    for name in choices("attention"):  # which a run's opening lines compare
        choice("attention", name)
    return multiprocessing.get_context("fork")


def together(count: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Call function(world, *given) in so many processes -> what each returns, by rank. Raises AssertionError with the
    traceback of one in which it raised."""
    context = forking()
    port, results = free_port(), [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=_in_process, args=(rank, count, port, results[rank][1], function, given))
        for rank in range(count)
    ]
    for started in processes:
        started.start()
    try:
        pipes = [mine for mine, _ in results]
        answers = [pickle.loads(mine.recv_bytes()) if mine.poll(TIMEOUT) else "no answer" for mine in pipes]
    finally:
        for started in processes:
            started.join(10)
            started.kill()
    for answer in answers:
        assert not isinstance(answer, str), answer
    return [answer[0] for answer in answers]


def _in_process(rank: int, count: int, port: int, result: Any, function: Callable[..., Any], given: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("cpu:gloo")
        result.send_bytes(pickle.dumps((function(ProcessGroup(), *given),)))  # not send: the sender is soon gone
        dist.destroy_process_group()
    except BaseException:
        result.send_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        result.close()
        os._exit(0)


class Ended(NamedTuple):
    """How a process of a run ended."""

    code: int  # -n where signal n ended it
    out: str
    err: str


class Training:
    """python train.py in several processes, as torchrun would start them, but forked from this one. As little is drawn
    and written at the end as by `tests.support.call`."""

    def __init__(
        self, folder: Path, words: Sequence[str], count: int = 2, start: Sequence[int] | None = None, arrange=None
    ):
        """folder: for their output, and to train in. count: 1 is as without torchrun. start: the ranks to start, all
        unless given. arrange(rank): called in each process first."""
        self.folder = folder
        context, port = forking(), free_port()
        with suppress(Exception):  # which each process meets itself
            request_of(hydra_arguments(words))
        self.processes = [
            context.Process(target=_train, args=(rank, count, port, folder, words, arrange))
            for rank in (range(count) if start is None else start)
        ]
        for rank, started in enumerate(self.processes):
            for end in ("out", "err"):  # of one that is ended before it writes, too
                (folder / f"{rank}.{end}").write_text("")
            started.start()

    def wait_for(self, path: Path) -> None:
        """Wait until the path is there."""
        end = time.monotonic() + TIMEOUT
        while not path.exists():
            assert time.monotonic() < end and any(one.is_alive() for one in self.processes), self.ended()
            time.sleep(0.01)

    def poll(self) -> int | None:
        """The exit code of the first; None while it runs."""
        return self.processes[0].exitcode

    def send(self, number: int, *of_ranks: int) -> None:
        for rank in of_ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def ended(self) -> list[Ended]:
        """Wait for all, and end the others where one fails, as torchrun does -> how each ended."""
        end = time.monotonic() + TIMEOUT
        while any(one.is_alive() for one in self.processes) and time.monotonic() < end:
            if any(one.exitcode for one in self.processes):
                self.send(signal.SIGTERM)
                end = min(end, time.monotonic() + GRACE)
                break
            time.sleep(0.05)
        for one in self.processes:
            one.join(max(0.1, end - time.monotonic()))
            one.kill()
            one.join()
        texts = [(self.folder / f"{rank}.out", self.folder / f"{rank}.err") for rank in range(len(self.processes))]
        return [
            Ended(one.exitcode, out.read_text(), err.read_text())
            for one, (out, err) in zip(self.processes, texts, strict=True)
        ]


def train_together(folder: Path, *words: str, **options: Any) -> list[Ended]:
    return Training(folder, words, **options).ended()


def _train(rank: int, count: int, port: int, folder: Path, words: Sequence[str], arrange: Callable | None) -> None:
    if count > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    for number, name in ((1, f"{rank}.out"), (2, f"{rank}.err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["train.py", *words]
    train.compose_request = request_of
    monitor.plot_loss = lambda folder: None
    preview.MAX_NEW_TOKENS = 4
    torch.set_num_threads(1)
    ranks.hush()
    process._owns_process = True
    code = 1
    try:
        if arrange is not None:
            arrange(rank)
        train.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
