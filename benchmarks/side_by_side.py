"""Times alternatives against each other: in turns, within one process, so that what slows one slows all."""

import argparse
import json
import logging
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.errors import UserError
from model.kernels.base import forget_logged

NOISY = 0.02  # share of the machine that others may take before a row is marked


class Timing(NamedTuple):
    median: float  # seconds
    spread: float  # seconds: half the distance between the quartiles
    others: float  # share of the machine's CPU time that other processes took
    own: float  # median seconds of CPU time that it took itself, of all its threads and of the processes it started and
    # waited for: what is left of it on a busy machine


class Reading(NamedTuple):
    seconds: float
    own: float  # of CPU time, as in Timing
    others: float  # as in Timing


class Meter:
    """Measures wall-clock and CPU time since it was made."""

    def __init__(self) -> None:
        self.busy, self.before, self.start = _machine_seconds(), _own_seconds(), time.perf_counter()

    def read(self) -> Reading:
        settle()
        seconds, own = time.perf_counter() - self.start, _own_seconds() - self.before
        elsewhere = _machine_seconds() - self.busy - own
        return Reading(seconds, own, max(0.0, elsewhere) / (seconds * os.cpu_count()))


class Announced(logging.Handler):
    """Within its `with` block: the kernel of ours that ran (`sdpa` if none was logged) and the warnings."""

    def __enter__(self) -> "Announced":
        self.kernel, self.warnings = "sdpa", []
        forget_logged()
        self.logger = logging.getLogger("headroom")
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        self.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"kernel ([^:]+): ", record.getMessage())
        self.kernel = found[1] if found else self.kernel
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, Timing]:
    """Each candidate once to warm up; then all of them, one after the other, `rounds` times."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    others: dict[str, list[float]] = {name: [] for name in candidates}
    own: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            meter = Meter()
            run()
            reading = meter.read()
            seconds[name].append(reading.seconds)
            own[name].append(reading.own)
            others[name].append(reading.others)
    return {
        name: Timing(_median(seconds[name]), spread(seconds[name]), _median(others[name]), _median(own[name]))
        for name in candidates
    }


def environment() -> dict[str, Any]:
    """The machine and versions that a measurement depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints rows of equal keys as a table, and writes them, with the environment, as JSON."""
    widths = {key: max(len(key), *(len(_text(row[key])) for row in rows)) for key in rows[0]}
    print(f"{title}: {', '.join(f'{key} {value}' for key, value in environment().items())}\n")
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(_text(value).rjust(widths[key]) for key, value in row.items()))
    if "others" in widths:
        print(f"\nothers: what other processes took of the machine's CPU time; ! marks more than {100 * NOISY:.0f} %")
    if path:
        path.write_text(json.dumps({"title": title, "environment": environment(), "rows": rows}, indent=1) + "\n")
        print(f"\n{path}")


def count(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def check_no_repeats(values: Sequence[Any], option: str) -> None:
    """Raises UserError for one that is there twice: it would be measured twice, and count as two."""
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option}: {value!r} is there twice: leave one of them out")


def output(text: str) -> Path:
    """The absolute path of a file that can be written, checked before hours of measuring."""
    path = Path(text).resolve()  # absolute: the smoke test changes the working directory
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in a folder that can be")
    return path


def checkout(text: str) -> Path:
    """The absolute path of a checkout of nanoGPT."""
    path = Path(text).resolve()
    if not (path / "model.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} holds no model.py: name a checkout of nanoGPT")
    return path


def litgpt_checkout(text: str) -> Path:
    """The absolute path of a checkout of litgpt."""
    path = Path(text).resolve()
    if not (path / "litgpt/model.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} holds no litgpt/model.py: name a checkout of litgpt")
    return path


def marked(timing: Timing | Reading) -> str:
    """Format how much other processes took of the machine."""
    return f"{100 * timing.others:.0f} %" + (" !" if timing.others > NOISY else "")


def _own_seconds() -> float:
    """CPU time of this process, and of those that it started and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _machine_seconds() -> float:
    """CPU time that all processes together have taken since the machine started; 0 where it does not tell."""
    try:
        user, nice, system, _idle, _iowait, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(more[:3])) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def settle() -> None:
    """Waits until a GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
