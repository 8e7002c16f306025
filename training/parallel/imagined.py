"""Imagined processes: what one of several would hold and compute, without starting any."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from runtime.world import ONE, ProcessGroup, World
from training.parallel.config import OneProcess, Parallel


@contextmanager
def imagined(parallel: Parallel, device: torch.device) -> Iterator[World]:
    """A context with the first of the processes that would train together; it holds no less than any other. The others
    are not there: what they would send comes at once, in its size and without its meaning."""
    if isinstance(parallel, OneProcess):
        yield ONE
        return
    dist.init_process_group("fake", rank=0, world_size=parallel.count)
    try:
        yield _Imagined(parallel.count, device)
    finally:
        dist.destroy_process_group()


class _Imagined(ProcessGroup):
    def __init__(self, size: int, device: torch.device):
        self.rank = 0
        self.size = size
        self.device = device
        self._mesh = super().mesh()  # here, for it cannot be made of fake tensors

    def mesh(self) -> Any:
        return self._mesh
