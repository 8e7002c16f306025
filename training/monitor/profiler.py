"""Profiling: a trace of some training steps, with torch.profiler: which operations ran, when, and for how long."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from common.atomic_io import UNFINISHED

SKIPPED = 3  # steps that are not shown: the first ones compile, fill allocators and wake threads
log = logging.getLogger("headroom")


class Profile:
    """Records `steps` steps after SKIPPED of them, into a file of the run's folder in Chrome's trace format. It never
    stops training: what fails is a warning. 0 steps do nothing. A process that resumes a run records again."""

    def __init__(self, steps: int, folder: Path, device: torch.device, done: int, last: int):
        """done: steps before the first of this process. last: the number of the run's last one."""
        self.steps = steps
        self.folder = folder
        self.device = device
        self.done = done
        self.last = last
        self.begun = 0  # steps of this process
        self.profiler: torch.profiler.profile | None = None

    def start(self) -> None:
        """Call before the first step. Warns where fewer steps are left than are to be recorded."""
        left = self.last - self.done
        recorded = max(0, left - SKIPPED)
        if recorded < self.steps:
            log.warning(
                f"profile_steps={self.steps}: this process has {left} steps, the first {SKIPPED} of which are not "
                f"recorded, so the trace will show {recorded or 'none'}"
            )
            self.steps = self.steps if recorded else 0

    def step(self) -> None:
        """Call before every step."""
        if self.steps and not self.begun:
            self._attempt(self._start_profiler)
        elif self.profiler is not None:
            self._attempt(self.profiler.step)
        self.begun += 1

    def close(self) -> None:
        if self.steps and self.begun <= SKIPPED:
            log.warning(f"profile_steps={self.steps}: this process ended within the {SKIPPED} steps before; no trace")
        if self.profiler is not None:
            self._attempt(self.profiler.stop)

    def _start_profiler(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=self.steps, repeat=1)
        self.profiler = torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write, record_shapes=True
        )
        self.profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        """Called by the profiler: before the step that follows the last one shown, or at the end."""
        first = self.done + SKIPPED + 1
        last = self.done + min(self.begun, SKIPPED + self.steps)
        path = self.folder / f"trace_steps_{first}-{last}.json"
        unfinished = path.with_name(f"{UNFINISHED}{path.name}")
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
        log.info(f"profile of steps {first} to {last} in {path}: open it at ui.perfetto.dev or chrome://tracing")

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.profiler = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning(f"profile_steps={self.steps} failed, training goes on: {reason}")
