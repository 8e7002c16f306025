"""Logger and MetricSink: the interface for sending metrics elsewhere than to metrics.jsonl."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.settings import FrozenSettings

log = logging.getLogger("headroom")
MAX_ERROR_LENGTH = 200  # characters of an error that another package raised


class MetricSink:
    """Receives the rows of one run; this one drops them."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def sync(self) -> None:
        """Flush. Called before a checkpoint: what is lost later, a resumed run writes again."""

    def close(self) -> None: ...


class Logger(FrozenSettings, ABC):
    """Settings that open a sink for the metrics of one run."""

    def check_installed(self) -> None:
        """Call before a run begins. Raises UserError where a package that this logger needs is not installed."""
        return

    @abstractmethod
    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        """Open the sink. Called once, when the run's folder exists."""


class NoLogger(Logger):
    """No metrics but metrics.jsonl."""

    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        return MetricSink()


class FaultTolerantSink(MetricSink):
    """Wraps another sink: at its first failure it warns once and drops it, and training goes on."""

    def __init__(self, name: str, start: Callable[[], MetricSink]):
        self.name = name
        self.sink = MetricSink()
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
            why = " ".join(str(error).split())[:MAX_ERROR_LENGTH] or type(error).__name__
            log.warning(f"logger={self.name} failed, training goes on without it: {why}")
            failed = self.sink
            self.sink = MetricSink()
            with suppress(Exception):
                failed.close()


def known(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are not null."""
    return {key: value for key, value in row.items() if value is not None}
