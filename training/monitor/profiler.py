"""Profiling: a trace of some training steps, with torch.profiler."""

import logging
import os
from pathlib import Path

import torch

from common.atomic_io import UNFINISHED

WARMUP = 3  # steps that are not shown: the first ones compile, fill allocators and wake threads
log = logging.getLogger("headroom")


class Profile:
    """Records `steps` steps after WARMUP of them, into a file of the run's folder in Chrome's trace format. It never
    stops training: what fails is a warning. 0 steps do nothing. A process that resumes a run records again."""

    def __init__(self, steps: int, folder: Path, device: torch.device, done: int, last: int):
        """done: steps before the first of this process. last: the number of the run's last one."""
        self.steps = steps
        self.folder = folder
        self.done = done
        self.last = last
        self.seen = 0
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        self.activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        self.recording: torch.profiler.profile | None = None

    def start(self) -> None:
        """Call before the first step. Warns where fewer steps are left than are to be recorded."""
        left = self.last - self.done
        recorded = max(0, left - WARMUP)
        if recorded < self.steps:
            log.warning(
                f"profile_steps={self.steps}: this process has {left} steps, the first {WARMUP} of which are not "
                f"recorded, so the trace will show {recorded or 'none'}"
            )
            self.steps = self.steps if recorded else 0

    def step(self) -> None:
        """Call before every step."""
        if self.seen == WARMUP + self.steps:
            self._write()
        if self.steps and self.seen == WARMUP:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
            try:
                self.recording = torch.profiler.profile(activities=self.activities, record_shapes=True)
                self.recording.start()
            except Exception as error:
                self._give_up(error)
        self.seen += 1

    def close(self) -> None:
        if self.steps and self.seen <= WARMUP:
            log.warning(f"profile_steps={self.steps}: this process ended within the {WARMUP} steps before; no trace")
        self._write()

    def _write(self) -> None:
        if self.recording is None:
            return
        recording = self.recording
        self.recording = None
        first = self.done + WARMUP + 1
        last = self.done + min(self.seen, WARMUP + self.steps)
        path = self.folder / f"trace_steps_{first}-{last}.json"
        writing = path.with_name(f"{UNFINISHED}{path.name}")
        try:
            recording.stop()
            recording.export_chrome_trace(str(writing))
            os.replace(writing, path)
        except Exception as error:
            self._give_up(error)
        else:
            log.info(f"profile of steps {first} to {last} in {path}: open it at ui.perfetto.dev or chrome://tracing")

    def _give_up(self, error: Exception) -> None:
        self.recording = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(f"profile_steps={self.steps} failed, training goes on: {reason}")
