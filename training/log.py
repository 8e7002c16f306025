"""What a run writes down while it trains: metrics.jsonl always, a logger by choice, and a line for whoever watches."""

import json
import logging
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from data.durable import write_whole
from data.errors import UserError
from model.config import Config

log = logging.getLogger("headroom")


class Sink:
    """Takes the rows of one run; this one lets them go."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Logger(Config, ABC):
    """Where metrics go besides metrics.jsonl."""

    @abstractmethod
    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        """Called once, when the run's folder exists."""


class NoLogger(Logger):
    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        return Sink()


class WandbLogger(Logger):
    """Weights & Biases. Offline unless asked, so it never prompts. Its failures never stop training."""

    project: str = "headroom"
    mode: Literal["online", "offline", "disabled"] = "offline"

    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        try:
            import wandb

            remote = wandb.init(
                project=self.project,
                mode=self.mode,
                dir=folder,
                name=folder.name,
                config=dict(config),
                reinit="create_new",  # one process may train several runs, which must not merge
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:
            log.warning(f"logger=wandb did not start, training goes on without it: {error}")
            return Sink()
        return WandbSink(remote)


class WandbSink(Sink):
    def __init__(self, remote: Any):
        self.remote = remote

    def write(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.remote.log(dict(row), step=row["step"]))

    def close(self) -> None:
        self._try(lambda: self.remote.finish())

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            log.warning(f"logger=wandb failed, training goes on: {error}")


class MetricsFile:
    """metrics.jsonl: one object per step, in order, each step once. A number that is not finite is null."""

    def __init__(self, path: Path, resume_after: int):
        """Rows after the step a run resumes from belong to a future that is computed anew: they are dropped."""
        self.path = path
        self.past = [row for row in read_metrics(path) if row["step"] <= resume_after]
        try:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in self.past).encode())
            self.file = open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        if len(self.past) < resume_after:
            log.warning(f"{path} has lost rows: it holds {len(self.past)} of the {resume_after} steps done")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been said
            self.file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with self._complaint():
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """All rows are on the disk when it returns."""
        with self._complaint():
            os.fsync(self.file.fileno())

    @contextmanager
    def _complaint(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; what was saved stands: make room, then resume"
            ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows written so far, in order, each step once; what is not a row is left out, such as a line that a kill cut
    short. Raises UserError where the file cannot be read."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_row(row) and row["step"] > (rows[-1]["step"] if rows else 0):
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    numbers = isinstance(row, dict) and all(value is None or isinstance(value, int | float) for value in row.values())
    return numbers and "train_loss" in row and type(row.get("step")) is int


class Watch:
    """The live line on a terminal; elsewhere, a plain line every tenth of the way. All on stderr."""

    def __init__(self, first_step: int, steps: int):
        columns = BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
        self.console = _Patient(stderr=True)
        self.live = self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task(f"step {first_step}/{steps}", total=steps, completed=first_step)
        self.steps, self.said = steps, first_step
        self.progress.start()

    def step(self, step: int, loss: float, bpb: float, tokens_per_second: float, seconds_left: float) -> None:
        left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
        line = (
            f"step {step}/{self.steps}  loss {loss:.3f}  bpb {bpb:.3f}  {tokens_per_second:,.0f} tokens/s  ETA {left}"
        )
        self.progress.update(self.task, completed=step, description=line)
        if not self.live and (step - self.said >= self.steps / 10 or step == self.steps):
            self.say(line)
            self.said = step

    def say(self, line: str) -> None:
        """Above the live line."""
        self.console.print(Text(line), soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()


class _Patient(Console):
    """Falls silent when nobody reads any more, where rich would end the process: `train.py | tee`, and Ctrl-C."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        let_go_of_stderr()


class _Stderr(logging.Handler):
    """Looks sys.stderr up at every message: a live line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def tell(line: str) -> None:
    """A line on stderr, to whoever still reads it."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        let_go_of_stderr()


def let_go_of_stderr() -> None:
    """Its reader is gone: what is written there is lost from here on, and no error, nor one as the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def to_stderr() -> None:
    """What the program announces goes to stderr, a plain line each."""
    log.handlers[:] = [_Stderr()]
    log.setLevel(logging.INFO)
    log.propagate = False
