"""Progress of a run on stderr: a live line on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from common.console import clock
from common.errors import escaped
from common.streams import print_stderr
from training.metrics_file import MetricRow

LIVE_AFTER = 1.0  # seconds into a step, after which the live line shows how far it is
PLAIN_EVERY = 30.0  # seconds, after each of which a plain line does
MIN_WIDTH_WITH_BAR = 80  # columns; a narrower terminal has room for the numbers only
BAR_WIDTH = 20
DROPPED_IN_TURN = ("mfu", "bpb", "speed")  # where the line is too narrow for all


def progress_text(row: MetricRow, steps: int, seconds_left: float, width: int | None = None) -> str:
    """Step, loss, speed and remaining time in one line, without the less important numbers where they do not fit into
    `width` columns."""
    parts = {
        "step": f"step {row['step']}/{steps}",
        "loss": f"loss {row['train_loss']:.3f}",
        "bpb": f"bpb {row['train_bpb']:.3f}",
        "speed": f"{row['tokens_per_second']:,.0f} tokens/s",
    }
    if row["mfu"] is not None:
        parts["mfu"] = f"MFU {row['mfu']:.1%}"
    parts["eta"] = f"ETA {clock(seconds_left)}"
    for name in DROPPED_IN_TURN:
        if width is None or len("  ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())


class ProgressLine:
    """The live line on a terminal that can move its cursor; elsewhere, a plain line every tenth of the way. It is shown
    from `start` to `stop`."""

    def __init__(self, first_step: int, steps: int):
        self.steps = steps
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        wide = self.console.width >= MIN_WIDTH_WITH_BAR
        columns = [BarColumn(bar_width=BAR_WIDTH)] if wide else []
        columns += [TaskProgressColumn(), TextColumn("{task.description}")]
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.text_width = self.console.width - len("100% ") - (BAR_WIDTH + 1 if wide else 0)
        self.description = f"step {first_step}/{steps}"
        self.task = self.progress.add_task(self.description, total=steps, completed=first_step)
        self.last_plain_step = first_step
        self.last_report = time.monotonic()

    def start(self) -> None:
        self.progress.start()

    def stop(self) -> None:
        self.progress.stop()

    def print_last_line(self, line: str) -> None:
        """Print a line where the live one was, which ends."""
        self.stop()
        print_stderr(line)

    def step(self, row: MetricRow, seconds_left: float) -> None:
        """Call with the row of the last step done, its speed the one by which that many seconds are left."""
        step = row["step"]
        self.description = progress_text(row, self.steps, seconds_left, self.text_width if self.live else None)
        self.progress.update(self.task, completed=step, description=self.description)
        if not self.live and (step - self.last_plain_step >= self.steps / 10 or step == self.steps):
            self.print_line(self.description)
            self.last_plain_step = step

    def show_part_progress(self, step: int, what: str, index: int, count: int) -> None:
        """Call before part `index`, of 0 to count - 1, of a step: shows how far it is, unless it is quick."""
        now = time.monotonic()
        if index == 0:
            self.last_report = now
            self.progress.update(self.task, description=self.description)
            return
        done = f"{what} {index + 1}/{count}"
        if self.live and now - self.last_report >= LIVE_AFTER:
            self.progress.update(self.task, description=f"{self.description}  {done}")
        elif not self.live and now - self.last_report >= PLAIN_EVERY:
            self.last_report = now
            self.print_line(f"step {step}/{self.steps}: {done}")

    def print_line(self, line: str) -> None:
        """Print a line above the live one."""
        self.print_text(escaped(line))

    def print_text(self, text: str) -> None:
        """Print a text of several lines above the live one."""
        self.console.print(Text(escaped(text, keep="\t\n")), soft_wrap=True)
