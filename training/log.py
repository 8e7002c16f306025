"""What a run writes down while it trains: metrics.jsonl always, a logger by choice, and a line for whoever watches."""

import functools
import json
import logging
import math
import netrc
import os
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from common.atomic_io import exists, open_regular, read_regular, write_whole
from common.errors import UserError, escaped, reason
from common.invocation import installed, refuse_no_package
from common.paths import refuse_unreadable
from common.settings import FrozenSettings
from common.streams import tell

log = logging.getLogger("headroom")
LONGEST = 200  # characters of an error that is no line of ours
MOST_STEPS = 2**40  # of a run
LONGEST_ROW = 2**20  # bytes; what is longer is no row of metrics
LARGEST_METRICS = 2**34  # bytes
LARGEST_NUMBER = 1e100  # in a row
WANDB_SECONDS = 30.0  # to wait for a server that does not answer
UNSCORED = "unscored"  # in a row: true where its validation score is still to come
LIVE_AFTER = 1.0  # seconds into a step, after which the live line tells how far it is
PLAIN_EVERY = 30.0  # seconds, after each of which a plain line does


class Sink:
    """Takes the rows of one run; this one lets them go."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def sync(self) -> None:
        """Before a checkpoint: what is lost later, a resumed run writes again."""

    def close(self) -> None: ...


class Logger(FrozenSettings, ABC):
    """Where metrics go besides metrics.jsonl."""

    def refuse_missing(self) -> None:
        """Called before a run begins. Raises UserError where a package that this logger needs is not installed."""
        return

    @abstractmethod
    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        """Called once, when the run's folder exists."""


class NoLogger(Logger):
    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        return Sink()


class WandbLogger(Logger):
    """Weights & Biases. Offline unless asked; the mode is always stated and a login looked for before, so that it never
    prompts. Its failures never stop training."""

    project: str = "headroom"
    mode: Literal["online", "offline", "disabled"] = "offline"

    def refuse_missing(self) -> None:
        if self.mode != "disabled":
            refuse_no_package("wandb", "logger=wandb")
        if self.mode == "online" and not _wandb_login():
            raise UserError(
                "logger.mode=online needs a login, and there is no WANDB_API_KEY and no netrc entry: "
                f"{installed('wandb', 'login')} makes one, logger.mode=offline needs none"
            )

    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        return Patient("wandb", lambda: self._start(folder, config))

    def _start(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        import wandb

        remembered = folder / "wandb-id.txt"
        if not exists(remembered):
            write_whole(remembered, secrets.token_hex(4).encode())
        remote = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=folder,
            name=folder.name,
            # A run that is resumed goes on in the run it has there.
            id=read_regular(remembered, LONGEST).decode().strip(),
            resume="allow",
            config=dict(config),
            reinit="create_new",  # one process may train several runs, which must not merge
            settings=wandb.Settings(silent=True, init_timeout=WANDB_SECONDS),
        )
        if self.mode == "offline":
            kept = Path(remote.dir).parent.parent  # a folder for each process that trained the run, of one id
            parts = len(list(kept.glob("offline-run-*")))
            several = f"; its {parts} parts become one run there, in the order of their times" if parts > 1 else ""
            log.info(f"logger=wandb is offline; to upload the run: {installed('wandb', 'sync', str(kept))}{several}")
        return WandbSink(remote)


def _wandb_login() -> bool:
    """Whether there are credentials where wandb looks for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    servers = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, RuntimeError, netrc.NetrcParseError):
            found = netrc.netrc(path.expanduser())
            if any(found.authenticators(urlsplit(server).netloc) for server in servers):
                return True
    return False


class WandbSink(Sink):
    def __init__(self, remote: Any):
        self.remote = remote

    def write(self, row: Mapping[str, Any]) -> None:
        self.remote.log(_known(row), step=row["step"])

    def close(self) -> None:
        self.remote.finish()


class TensorboardLogger(Logger):
    """Event files in the run's folder. Their failures never stop training."""

    def refuse_missing(self) -> None:
        refuse_no_package("tensorboard", "logger=tensorboard", "tensorboard")

    def open(self, folder: Path, config: Mapping[str, Any]) -> Sink:
        return Patient("tensorboard", lambda: TensorboardSink(folder / "tensorboard", config))


class TensorboardSink(Sink):
    """Scalars in groups, named in words, and the run's settings as a text."""

    TAGS: ClassVar = {
        "tokens": "train/tokens",
        "train_loss": "train/loss",
        "train_bpb": "train/bits_per_byte",
        "val_loss": "validation/loss",
        "val_bpb": "validation/bits_per_byte",
        "val_tokens": "validation/tokens",
        **{key: f"optim/{key}" for key in ("lr", "muon_lr", "grad_norm", "skipped", "max_logit", "clipped_heads")},
        **{key: f"speed/{key}" for key in ("tokens_per_second", "flops_per_second", "mfu", "data_seconds")},
        "memory_bytes": "memory/bytes",
    }  # others, such as attention/layer_0/entropy, are in a group already

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(exist_ok=True)
        self.config = config
        self.start, self.writer = functools.partial(SummaryWriter, str(folder)), None

    def write(self, row: Mapping[str, Any]) -> None:
        if self.writer is None:  # what an earlier process wrote from this step on, it wrote for nothing
            self.writer = self.start(purge_step=row["step"])
            lines = yaml.safe_dump(dict(self.config), sort_keys=False).splitlines()
            self.writer.add_text("config", "\n".join(f"    {line}" for line in lines), row["step"])  # Markdown's code
        for key, value in _known(row).items():
            if key not in ("step", UNSCORED):
                self.writer.add_scalar(self.TAGS.get(key, key), float(value), row["step"])

    def sync(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Patient(Sink):
    """Another sink, whose first failure is one warning, and the end of it."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        self.name, self.sink = name, Sink()
        self.sink = self._try(start) or self.sink

    def write(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.sink.write(row))

    def sync(self) -> None:
        self._try(lambda: self.sink.sync())

    def close(self) -> None:
        self._try(lambda: self.sink.close())

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            why = " ".join(str(error).split())[:LONGEST] or type(error).__name__
            log.warning(f"logger={self.name} failed, training goes on without it: {why}")
            failed, self.sink = self.sink, Sink()
            with suppress(Exception):
                failed.close()


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


class MetricsFile:
    """metrics.jsonl: one object per step, in order, each step once; before them, where validation came before training,
    one of step 0. A number that is not finite, or not known, is null."""

    def __init__(self, path: Path, resume_after: int):
        """Rows after the step a run resumes from belong to a future that is computed anew: they are dropped."""
        self.path = path
        kept = read_metrics(path, resume_after) if resume_after else []
        self.past = [row for row in kept if row["step"]]  # of training; step 0 is what was there before
        try:
            write_whole(path, "".join(map(_line, kept)).encode())
            self.file = open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} cannot be written: {reason(error)}") from None
        self.before = next((row for row in kept if not row["step"]), None)
        if len(self.past) < resume_after:
            log.warning(f"{path} has lost rows: it holds {len(self.past)} of the {resume_after} steps done")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been said
            self.file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        with self._complaint():
            self.file.write(_line(row))
            self.file.flush()

    def begin(self, row: Mapping[str, Any]) -> None:
        """What was measured before the first step."""
        self.before = dict(row)
        self.write(row)

    def complete(self, scored: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the last of the past rows the validation score that it lacks, before others follow -> the row."""
        self.past[-1] = {key: value for key, value in self.past[-1].items() if key != UNSCORED} | dict(scored)
        with self._complaint():
            self.file.close()
            before = [] if self.before is None else [self.before]
            write_whole(self.path, "".join(map(_line, before + self.past)).encode())
            self.file = open(self.path, "a")  # noqa: SIM115
        return self.past[-1]

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
                f"{self.path} cannot be written: {reason(error)}; what was saved stands: make room, then resume"
            ) from None


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path, last: int = MOST_STEPS) -> list[dict[str, Any]]:
    """The rows written so far, in order, up to that of step `last`, each step once; what is not a row is left out, such
    as a line that a kill cut short. Raises UserError where the file cannot be read."""
    rows = []
    try:
        if not exists(path):
            return []
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_METRICS:
                raise UserError(f"{path} is larger than {LARGEST_METRICS:,} bytes, which the metrics of no run are")
            while line := file.readline(LONGEST_ROW):  # a longer one comes in pieces, none of which is a row
                row = _row(line)
                if row is not None and (rows[-1]["step"] if rows else -1) < row["step"] <= last:
                    rows.append(row)
    except OSError as error:
        refuse_unreadable(path, error, "make it readable, or move it away")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """None for what no run writes."""
    if not line.startswith(b"{"):  # seen at once, where a line is long
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_number, row.values())):
        return None
    losses = (row.get(name) for name in ("train_loss", "val_loss", "val_tokens"))
    fits = "train_loss" in row and type(row.get("step")) is int and not any(isinstance(loss, bool) for loss in losses)
    return row if fits else None


def _is_number(value: Any) -> bool:
    """Or null. Not what arithmetic or a picture would fail at: no float32 is as large."""
    return value is None or (isinstance(value, int | float) and abs(value) < LARGEST_NUMBER)


def unscored(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether a signal cut the evaluation after that step short, which is to be made when the run goes on."""
    return any(row["step"] == step and UNSCORED in row for row in rows)


class Watch:
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


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{fraction:.1%}"


def clock(seconds: float) -> str:
    """As in 2:05, or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class _Stderr(logging.Handler):
    """Looks sys.stderr up at every message: a live line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


@contextmanager
def held_back() -> Iterator[None]:
    """What is announced within comes after it, not amid a text that streams."""
    handlers = log.handlers[:]
    held = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)
    log.handlers[:] = [held]
    try:
        yield
    finally:
        log.handlers[:] = handlers
        for record in held.buffer:
            log.handle(record)


def to_stderr() -> None:
    """What the program announces goes to stderr, a plain line each."""
    log.handlers[:] = [_Stderr()]
    log.setLevel(logging.INFO)
    log.propagate = False
