"""Processes that train together, for tests: forked, so that none of them imports anything again."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from runtime.world import ProcessGroup

TIMEOUT = 300  # seconds


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def together(count: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Call function(world, *given) in so many processes -> what each returns, by rank. Raises AssertionError with the
    traceback of one in which it raised."""
    context = multiprocessing.get_context("fork")
    port, results = free_port(), [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=_in_process, args=(rank, count, port, results[rank][1], function, given))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results[rank][0].recv() if results[rank][0].poll(TIMEOUT) else "no answer" for rank in range(count)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for answer in answers:
        assert not isinstance(answer, str), answer
    return [answer[0] for answer in answers]


def _in_process(rank: int, count: int, port: int, result: Any, function: Callable[..., Any], given: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("cpu:gloo")
        result.send((function(ProcessGroup(), *given),))
        dist.destroy_process_group()
    except BaseException:
        result.send(traceback.format_exc())
    finally:
        result.close()
        os._exit(0)
