"""How far a run is, for whoever watches: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from common.console import clock, percent
from common.errors import escaped

LIVE_AFTER = 1.0  # seconds into a step, after which the live line tells how far it is
PLAIN_EVERY = 30.0  # seconds, after each of which a plain line does


class ProgressLine:
    """The live line on a terminal that can move its cursor; elsewhere, a plain line every tenth of the way. All on
    stderr."""

    def __init__(self, first_step: int, steps: int):
        columns = BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task(f"step {first_step}/{steps}", total=steps, completed=first_step)
        self.steps, self.said = steps, first_step
        self.description, self.told = f"step {first_step}/{steps}", time.monotonic()
        self.progress.start()

    def step(self, row: Mapping[str, Any], seconds_left: float) -> None:
        """row: as in metrics.jsonl."""
        step = row["step"]
        line = (
            f"step {step}/{self.steps}  loss {row['train_loss']:.3f}  bpb {row['train_bpb']:.3f}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  MFU {percent(row['mfu'])}  ETA {clock(seconds_left)}"
        )
        self.description = line
        self.progress.update(self.task, completed=step, description=line)
        if not self.live and (step - self.said >= self.steps / 10 or step == self.steps):
            self.say(line)
            self.said = step

    def within(self, step: int, what: str, index: int, count: int) -> None:
        """Call before part `index`, of 0 to count - 1, of a step: how far it is, unless it is quick."""
        now = time.monotonic()
        if index == 0:
            self.told = now
            self.progress.update(self.task, description=self.description)
            return
        done = f"{what} {index + 1}/{count}"
        if self.live and now - self.told >= LIVE_AFTER:
            self.progress.update(self.task, description=f"{self.description}  {done}")
        elif not self.live and now - self.told >= PLAIN_EVERY:
            self.told = now
            self.say(f"step {step}/{self.steps}: {done}")

    def say(self, line: str) -> None:
        """Above the live line."""
        self.show(escaped(line))

    def show(self, text: str) -> None:
        """The same for a text of several lines."""
        self.console.print(Text(escaped(text, keep="\t\n")), soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()
