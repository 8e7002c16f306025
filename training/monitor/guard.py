"""Notices numerical trouble in the rows of metrics.jsonl, from nothing else: a resumed run notices the same."""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

SPIKE_WINDOW = 64  # steps a loss is compared with
SPIKE_DEVIATIONS = 8.0  # median absolute deviations above their median
SPIKE_LEAST = 0.5  # nats: where the losses hardly vary, smaller ones are not worth a word


class Guard:
    """Counts skipped updates, in all and in a row, and compares each loss with those before it."""

    def __init__(self, past: Iterable[Mapping[str, Any]]):
        """past: rows of the steps already done."""
        self.skipped = self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.spiking = False
        for row in past:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> bool:
        """Takes in the next row -> whether a loss spike begins with it."""
        if row.get("skipped") or row["train_loss"] is None:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        was_spiking, self.spiking = self.spiking, self._is_spike(row["train_loss"])
        self.losses.append(row["train_loss"])
        return self.spiking and not was_spiking

    @property
    def usual_loss(self) -> float:
        return statistics.median(self.losses)

    def _is_spike(self, loss: float) -> bool:
        if len(self.losses) < SPIKE_WINDOW:
            return False
        usual = self.usual_loss
        deviation = statistics.median(abs(each - usual) for each in self.losses)
        return loss > usual + max(SPIKE_DEVIATIONS * deviation, SPIKE_LEAST)
