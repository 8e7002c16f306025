"""Training throughput: tokens per second of training alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingTimer:
    """A clock that pauses for evaluation, saving and previews. It counts in intervals, since what a GPU has done is
    known only where somebody waited for it: `close_interval` comes after reading a number from the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens = 0  # of all closed intervals, as the next ones
        self.seconds = 0.0
        self.data_seconds = 0.0  # waiting for batches
        self.step_data_seconds = 0.0  # the same, of the step in progress
        self.restart()

    def restart(self) -> None:
        """Begin an interval; the time since the last one does not count."""
        self.interval_tokens = 0
        self.interval_start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of this interval."""
        return time.perf_counter() - self.interval_start

    @property
    def tokens_per_second(self) -> float:
        """Mean throughput of all closed intervals."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def data_share(self) -> float:
        """The fraction of the time that was spent waiting for data."""
        return self.data_seconds / max(self.seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context around what is not training. Waits for the device first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.interval_start += time.perf_counter() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context around the wait for a step's batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.step_data_seconds += time.perf_counter() - start

    def step(self, tokens: int) -> float:
        """Count the tokens of a step -> the seconds it waited for its batch."""
        waited = self.step_data_seconds
        self.data_seconds += waited
        self.step_data_seconds = 0.0
        self.interval_tokens += tokens
        return waited

    def close_interval(self) -> float:
        """Tokens per second of the interval, and begin the next one."""
        tokens = self.interval_tokens
        seconds = self.elapsed
        self.tokens += tokens
        self.seconds += seconds
        self.restart()
        return tokens / max(seconds, 1e-9)
