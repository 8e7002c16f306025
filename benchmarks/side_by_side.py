"""Times alternatives against each other: in turns, within one process, so that what slows one slows all."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

NOISY = 0.02  # share of the machine that others may take before a row is marked


class Timing(NamedTuple):
    median: float  # seconds
    spread: float  # seconds: half the distance between the quartiles
    others: float  # share of the machine's CPU time that other processes took
    own: float  # median seconds of CPU time that it took itself, of all threads: what is left of it on a busy machine


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, Timing]:
    """Each candidate once to warm up; then all of them, one after the other, `rounds` times."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    others: dict[str, list[float]] = {name: [] for name in candidates}
    own: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            busy, before, start = _machine_seconds(), time.process_time(), time.perf_counter()
            run()
            _settle()
            seconds[name].append(time.perf_counter() - start)
            own[name].append(time.process_time() - before)
            elsewhere = _machine_seconds() - busy - own[name][-1]
            others[name].append(max(0.0, elsewhere) / (seconds[name][-1] * os.cpu_count()))
    return {
        name: Timing(_median(seconds[name]), _spread(seconds[name]), _median(others[name]), _median(own[name]))
        for name in candidates
    }


def environment() -> dict[str, Any]:
    """What a figure depends on."""
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
    if path:
        path.write_text(json.dumps({"title": title, "environment": environment(), "rows": rows}, indent=1) + "\n")
        print(f"\n{path}")


def marked(timing: Timing) -> str:
    """How much others took of the machine, as a column says it."""
    return f"{100 * timing.others:.0f} %" + (" !" if timing.others > NOISY else "")


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


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
