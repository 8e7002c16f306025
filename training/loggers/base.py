"""What a logger is: settings that open a sink for the metrics of one run."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.settings import FrozenSettings

log = logging.getLogger("headroom")
LONGEST = 200  # characters of an error that is no line of ours


class MetricSink:
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
    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        """Called once, when the run's folder exists."""


class NoLogger(Logger):
    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        return MetricSink()


class FaultTolerantSink(MetricSink):
    """Another sink, whose first failure is one warning, and the end of it."""

    def __init__(self, name: str, start: Callable[[], MetricSink]):
        self.name, self.sink = name, MetricSink()
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
            failed, self.sink = self.sink, MetricSink()
            with suppress(Exception):
                failed.close()


def known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
