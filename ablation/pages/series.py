"""Curves of variants for pictures and the page: of each seed, and their mean with its band."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ablation.pages.axes import Y_UNITS
from ablation.results import Curve, Report, Variant

SOURCES = ("val", "train")
EARLY = 0.05  # of a run, in which losses fall so steeply that they are above the frame of a linear axis
Values = dict[str, list[float | None]]  # by unit


@dataclass(frozen=True)
class Line:
    x: dict[str, list[float]]  # by unit, steps among them
    y: Values  # by unit


@dataclass(frozen=True)
class Series:
    """One variant: its seeds, and their mean, lowest and highest at the steps that all of them have."""

    seeds: list[Line]
    mean: Line
    low: Values
    high: Values


def series(variant: Variant, source: str, limit: int | None = None) -> Series:
    """source: val, of the evaluations, or train. limit: points per line, about."""
    lines = [_line(curve, source) for curve in variant.curves]
    steps = sorted(set.intersection(*(set(line.x["steps"]) for line in lines))) if lines else []
    rows = [_at(line, steps) for line in lines]
    mean_x = {unit: [_mean(found) for found in _columns(row.x[unit] for row in rows)] for unit in _units(rows)}

    def over_seeds(reduce: Callable[[Sequence[float]], float]) -> Values:
        return {
            unit: [None if None in found else reduce(found) for found in _columns(row.y[unit] for row in rows)]
            for unit in Y_UNITS
        }

    indices = _thinned(len(steps), limit)
    return Series(
        [_picked(line, _thinned(len(line.x["steps"]), limit)) for line in lines],
        _picked(Line(mean_x, over_seeds(_mean)), indices),
        _pick(over_seeds(min), indices),
        _pick(over_seeds(max), indices),
    )


def units(report: Report) -> list[str]:
    """The units of Y_UNITS in which these runs have losses that can be compared: nats only of the same tokens."""
    known = {
        "bpb": any(variant.val_bpb.values for variant in report.variants),
        "loss": any(variant.val_loss.values for variant in report.variants),
    }
    return [unit for unit in Y_UNITS if known[unit]]


def late(line: Line, unit: str) -> list[float]:
    """Losses after the first steps of a run; all of them where there are few."""
    found = [value for value in line.y[unit] if value is not None]
    if not line.x["steps"]:
        return found
    start = EARLY * line.x["steps"][-1]
    after = [
        value for step, value in zip(line.x["steps"], line.y[unit], strict=True) if step > start and value is not None
    ]
    return after or found


def _line(curve: Curve, source: str) -> Line:
    if source == "val":
        x = {
            "steps": curve.val_step,
            "tokens": curve.val_tokens,
            "seconds": curve.val_seconds,
            "flops": curve.val_flops,
        }
        return Line(x, {"bpb": curve.val_bpb, "loss": curve.val_loss})
    x = {"steps": curve.step, "tokens": curve.tokens, "seconds": curve.seconds, "flops": curve.flops}
    return Line(x, {"bpb": curve.train_bpb, "loss": curve.train_loss})


def _units(lines: Sequence[Line]) -> Iterable[str]:
    return lines[0].x if lines else ("steps", "tokens", "seconds", "flops")


def _columns(rows: Iterable[Sequence]) -> Iterable[tuple]:
    return zip(*rows, strict=True)


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


def _at(line: Line, steps: Sequence[float]) -> Line:
    place = {step: i for i, step in enumerate(line.x["steps"])}
    return _picked(line, [place[step] for step in steps])


def _picked(line: Line, indices: Sequence[int]) -> Line:
    return Line(_pick(line.x, indices), _pick(line.y, indices))


def _pick(lists: dict[str, list], indices: Sequence[int]) -> dict[str, list]:
    return {unit: [values[i] for i in indices] for unit, values in lists.items()}


def _thinned(count: int, limit: int | None) -> list[int]:
    """Indices of about `limit` points: two thirds of them evenly spaced, the others closer to the beginning, so that a
    logarithmic axis has some there."""
    if limit is None or count <= limit:
        return list(range(count))
    even = (2 * limit) // 3
    found = {round(i * (count - 1) / (even - 1)) for i in range(even)}
    return sorted(found | {round((count - 1) ** (i / (limit - even))) for i in range(limit - even)})
