"""Prefetching: a thread reads what the next step trains on while this one computes. What a step reads is a function of
the step, so there is nothing to save, and a run is the same as without it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from data.batches import Batch, TrainingBatches


class Prefetch:
    """The batches of steps that are asked for one after another, read one step ahead: in memory is one more step than
    without. A context manager, whose thread ends with its block. What cannot be read is an error of the step that needs
    it."""

    def __init__(self, batches: TrainingBatches, device: torch.device, steps: int):
        """steps: of the whole run, beyond which nothing is read."""
        self.batches = batches
        self.device = device
        self.steps = steps
        self.reader = ThreadPoolExecutor(1, "prefetch")
        self.ahead: dict[int, Future[Batch]] = {}  # the step that is read, if any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.reader.shutdown(cancel_futures=True)

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of a step, on the device."""
        if step not in self.ahead:
            self._begin(step)
        batch = self.ahead.pop(step).result()
        if step + 1 < self.steps:
            self._begin(step + 1)
        return batch.to(self.device).split(self.batches.at_a_time)

    def _begin(self, step: int) -> None:
        self.ahead = {step: self.reader.submit(self.batches.read, step)}
