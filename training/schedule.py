"""Learning-rate schedules: pure functions of the step."""

import math
from abc import ABC, abstractmethod

from pydantic import Field

from model.config import Config


class Schedule(Config, ABC):
    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Fraction of the peak learning rate for the update that `step` of `steps` makes, counted from 0."""


class Cosine(Schedule):
    """Linear warmup over a fraction of the steps, then half a cosine down to final_fraction of the peak."""

    warmup: float = Field(0.05, ge=0, lt=1)
    final_fraction: float = Field(0.1, ge=0, le=1)

    def __call__(self, step: int, steps: int) -> float:
        warmup_steps = self.warmup * steps
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1.0, steps - 1 - warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
