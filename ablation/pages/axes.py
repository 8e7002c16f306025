"""Axes of charts: ranges, ticks and their labels, the same in pictures and on the page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ablation.pages.formats import bytes_, compact, fixed

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAX_TICKS = 6
X_UNITS = ("tokens", "seconds", "flops", "steps")  # that losses are drawn against
Y_UNITS = {"bpb": "bits per byte", "loss": "nats per token"}


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)


def x_axis(unit: str, values: Iterable[float], log: bool) -> Axis:
    """The axis of training, from its beginning to its end, in one of X_UNITS."""
    found = list(values)
    high = max(found, default=1.0) or 1.0
    low = min((value for value in found if value > 0), default=high / 10) if log else 0.0
    low, high = _apart(low, high, log)
    high += 0.01 * (high - low)
    factor, label, shown = _x_scale(unit, high, log)
    return Axis(
        label, low, high, log, [(tick * factor, shown(tick)) for tick in ticks(low / factor, high / factor, log)]
    )


def loss_axis(unit: str, values: Iterable[float], log: bool = False, label: str | None = None) -> Axis:
    """The axis of losses, with a margin. Differences may be drawn on it too; a logarithmic one begins above zero."""
    found = [value for value in values if value > 0 or not log] or [0.1 if log else 0.0, 1.0]
    low, high = _apart(min(found), max(found), log)
    margin = 0.05 * (high - low)
    low = low if log and low - margin <= 0 else low - margin
    high += margin
    return Axis(label or Y_UNITS[unit], low, high, log, _decimal(ticks(low, high, log)))


def bytes_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis of cache sizes, with ticks at powers of two."""
    found = [max(value, 1) for value in values] or [1, 2]
    low, high = _apart(min(found) / 1.25, max(found) * 1.25, True)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    stride = max(1, math.ceil(len(powers) / MAX_TICKS))
    return Axis("cache per token", low, high, True, [(2.0**power, bytes_(2.0**power)) for power in powers[::stride]])


def _apart(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range of some width, of one value too."""
    if high - low > 1e-9 * max(abs(high), abs(low)):
        return low, high
    return (
        (low / 1.5, high * 1.5) if log and low > 0 else (low - max(abs(low), 1) * 0.01, high + max(abs(high), 1) * 0.01)
    )


def _x_scale(unit: str, high: float, log: bool) -> tuple[float, str, Callable[[float], str]]:
    """(what a tick's number stands for, label of the axis, label of a tick)."""
    if unit == "seconds":
        factor, name = next(((f, n) for f, n in ((3600, "hours"), (60, "minutes")) if high >= 3 * f), (1, "seconds"))
        return factor, f"time of training ({name})", _short
    if unit == "flops" and not log:
        exponent = math.floor(math.log10(high))
        return 10.0**exponent, f"training compute (10{_superscript(exponent)} FLOPs)", _short
    if unit == "flops":
        return 1.0, "training compute (FLOPs)", _power
    return 1.0, {"tokens": "tokens trained on", "steps": "steps"}[unit], compact


def _superscript(exponent: int) -> str:
    return str(exponent).translate(SUPERSCRIPTS)


def _short(value: float) -> str:
    return f"{value:.6g}"


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**exponent
    return f"{'' if round(factor, 3) == 1 else f'{factor:.3g}·'}10{_superscript(exponent)}"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between low and high, at most about MAX_TICKS of them."""
    found = _log_ticks(low, high) if log else []
    return found if len(found) >= 3 else _linear_ticks(low, high)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; over a short range their double and fivefold too, over a long one not all."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
    return found[:: max(1, math.ceil(len(found) / (MAX_TICKS + 2)))]


def _decimal(places: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks of losses with as many decimals as they need, all the same."""
    for decimals in range(7):
        if all(abs(round(tick, decimals) - tick) < 1e-9 for tick in places):
            break
    return [(tick, fixed(tick, decimals)) for tick in places]
