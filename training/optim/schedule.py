"""Learning-rate schedules: pure functions of the step."""

import math
from abc import ABC, abstractmethod
from typing import Self

from pydantic import Field

from common.settings import MAX_COUNT, FrozenSettings


class Schedule(FrozenSettings, ABC):
    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Fraction of the peak learning rate for the update that `step` of `steps` makes, counted from 0."""

    def derive(self, steps: int) -> Self:
        """The same choice with what depends on the length of the run filled in. Raises ValueError where it does not fit
        into the run."""
        return self

    def decay_start_step(self, steps: int) -> int | None:
        """The first step whose rate depends on `steps`: until it is done, the run may be made longer or shorter and is
        the run it would have been. None: all do; a longer run goes on along another curve."""
        return None


class Warmup(Schedule, ABC):
    """Linear warmup over a fraction of the steps, then down to final_fraction of the peak."""

    warmup: float = Field(ge=0, lt=1)
    final_fraction: float = Field(ge=0, le=1)

    def __call__(self, step: int, steps: int) -> float:
        warmup_steps = self.warmup * steps
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1.0, steps - 1 - warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * self.shape(min(1.0, progress))

    @staticmethod
    @abstractmethod
    def shape(progress: float) -> float:
        """The decay curve: from 1 to 0 as progress goes from 0 to 1."""


class Cosine(Warmup):
    @staticmethod
    def shape(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class Linear(Warmup):
    @staticmethod
    def shape(progress: float) -> float:
        return 1 - progress


class WSD(Schedule):
    """Warmup, stable, decay (Hu et al. 2024, arXiv:2404.06395): linear warmup, the peak, and a linear cooldown over the
    last fraction of the steps. How long the run is matters from the cooldown on only."""

    warmup_steps: int | None = Field(ge=0, le=MAX_COUNT)  # 5 % of the steps that the run begins with
    cooldown: float = Field(ge=0, le=1)
    final_fraction: float = Field(ge=0, le=1)

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        start = self.decay_start_step(steps)
        left = 1.0 if step < start else (steps - step) / (steps - start + 1)
        return self.final_fraction + (1 - self.final_fraction) * left

    def derive(self, steps: int) -> Self:
        derived = self.model_copy(
            update={"warmup_steps": round(0.05 * steps) if self.warmup_steps is None else self.warmup_steps}
        )
        if derived.warmup_steps > derived.decay_start_step(steps):
            raise ValueError(
                f"schedule.warmup_steps={derived.warmup_steps} and schedule.cooldown={self.cooldown} do not fit into "
                f"steps={steps}: the cooldown begins at step {derived.decay_start_step(steps)}"
            )
        return derived

    def decay_start_step(self, steps: int) -> int:
        return steps - round(self.cooldown * steps)
