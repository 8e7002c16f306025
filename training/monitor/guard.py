"""Detection of divergence and loss spikes from the rows of metrics.jsonl, and nothing else: a resumed run detects the
same."""

import statistics
from collections import deque
from collections.abc import Iterable

from training.metrics_file import MetricRow

SPIKE_WINDOW = 64  # steps a loss is compared with
SPIKE_DEVIATIONS = 8.0  # median absolute deviations above their median
MIN_SPIKE = 0.5  # nats: where the losses hardly vary, smaller ones are not reported


class Guard:
    """Counts skipped updates, in all and in a row, and compares each loss with those before it."""

    def __init__(self, past: Iterable[MetricRow], max_in_a_row: int):
        """past: rows of the steps already done. max_in_a_row: skipped updates in a row after which training has
        diverged."""
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.uncounted = 0
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.spiking = False
        for row in past:
            self.see(row)
        self.only_past = True
        self.diverged_before = self.in_a_row >= max_in_a_row  # and no step of this process was a good one

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that training is to end. A resumed run gets another chance: its
        past alone does not count."""
        return self.in_a_row >= self.max_in_a_row and not self.only_past

    def see(self, row: MetricRow) -> bool:
        """Record the next row -> whether a loss spike starts with it."""
        self.only_past = False
        if row.get("uncounted"):  # which is no sign of divergence, nor of the contrary
            self.uncounted += 1
            return False
        if row.get("skipped") or row["train_loss"] is None:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        self.diverged_before = False
        was_spiking = self.spiking
        self.spiking = self._is_spike(row["train_loss"])
        self.losses.append(row["train_loss"])
        return self.spiking and not was_spiking

    @property
    def usual_loss(self) -> float:
        """The median of the last SPIKE_WINDOW losses."""
        return statistics.median(self.losses)

    def _is_spike(self, loss: float) -> bool:
        if len(self.losses) < SPIKE_WINDOW:
            return False
        usual = self.usual_loss
        deviation = statistics.median(abs(each - usual) for each in self.losses)
        return loss > usual + max(SPIKE_DEVIATIONS * deviation, MIN_SPIKE)
