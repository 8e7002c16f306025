"""The columns of the tables of variants, the most important first: one definition for terminal, Markdown and HTML. The
column of names is not among them, and none that would be empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ablation.pages.formats import bytes_, compact, exact, fixed, interval, places, signed
from ablation.pages.words import estimate, verdict
from ablation.results import Report, Variant
from ablation.statistics import Difference, Estimate


@dataclass(frozen=True)
class Value:
    text: str
    exact: str = ""  # all digits of what is rounded in the text


@dataclass(frozen=True)
class Column:
    name: str
    values: list[Value]  # by variant
    numeric: bool = True
    essential: bool = True  # worth its place in a terminal


def results(report: Report) -> list[Column]:
    """Losses, and how they compare with the baseline's."""
    decimals = places(report)
    column = partial(_column, report)
    metric = "val bpb" if report.metric == "val_bpb" else "val loss"
    return _telling(
        [
            column(metric, lambda variant: _spread(estimate(report, variant), lambda value: fixed(value, decimals))),
            *_comparison(report),
            column("seeds", lambda variant: Value(str(len(estimate(report, variant).values))), essential=False),
            _other_metric(report),
        ]
    )


def _telling(found: list[Column]) -> list[Column]:
    """Without columns that say nothing of any variant."""
    return [column for column in found if any(value.text for value in column.values)]


def _comparison(report: Report) -> list[Column]:
    if report.comparison is None:
        return []
    decimals = places(report)
    differences = [report.comparison.differences.get(variant.name) for variant in report.variants]

    def column(name: str, value_of: Callable[[Difference], Value], numeric: bool = True) -> Column:
        return Column(name, [value_of(found) if found else Value("") for found in differences], numeric)

    return [
        column("difference", lambda found: Value(signed(found.mean, decimals), exact(found.mean))),
        column("95 % interval", lambda found: Value(interval(found.interval, decimals), _bounds(found.interval))),
        Column("verdict", [_verdict(report, variant) for variant in report.variants], numeric=False),
        column("detectable", lambda found: _optional(found.detectable, lambda value: fixed(value, decimals))),
    ]


def _verdict(report: Report, variant: Variant) -> Value:
    if variant.name == report.comparison.baseline:
        return Value(verdict(None))
    found = report.comparison.differences.get(variant.name)
    if found is None:
        return Value("")
    words = verdict(found)
    return Value(words, "" if found.p_corrected is None else f"{words.partition(', ')[0]}, p = {found.p_corrected!r}")


def costs(report: Report) -> list[Column]:
    """Budgets, speed and memory."""
    column = partial(_column, report)
    found = [
        column("params", lambda variant: Value(compact(variant.parameters), exact(variant.parameters))),
        column("cache B/token", lambda variant: Value(f"{variant.cache_bytes_per_token:,.0f}")),
        column("FLOPs/token", lambda variant: _number(variant.flops_per_token)),
        column("tok/s", lambda variant: _spread(variant.tokens_per_second, compact, with_sd=False)),
        column("decode tok/s", lambda variant: _optional(variant.decode_tokens_per_second, compact)),
        column("memory", lambda variant: _spread(variant.memory_bytes, bytes_, with_sd=False)),
        *_details(report),
    ]
    return _telling(found)


def _details(report: Report) -> list[Column]:
    column = partial(_column, report, essential=False)
    return [
        column("params without embedding", lambda variant: _number(variant.parameters_without_embedding)),
        column("full cache", lambda variant: Value(bytes_(variant.cache_bytes_full), exact(variant.cache_bytes_full))),
        column("context", lambda variant: Value(f"{variant.context_length:,}")),
        column("minutes", lambda variant: _spread(variant.minutes, lambda value: fixed(value, 1), with_sd=False)),
        column("tokens", lambda variant: _number(variant.tokens)),
        column("steps", lambda variant: Value(f"{variant.steps:,}")),
    ]


def _other_metric(report: Report) -> Column:
    """The loss in the unit that the comparison is not of; nothing where that is not known."""
    decimals = places(report)
    name = "val loss (nats)" if report.metric == "val_bpb" else "val bpb"
    others = [variant.val_loss if report.metric == "val_bpb" else variant.val_bpb for variant in report.variants]
    return Column(name, [_spread(other, lambda value: fixed(value, decimals)) for other in others], essential=False)


def _column(report: Report, name: str, value_of: Callable[[Variant], Value], essential: bool = True) -> Column:
    return Column(name, [value_of(variant) for variant in report.variants], essential=essential)


def _number(value: float) -> Value:
    return Value(compact(value), exact(value))


def _optional(value: float | None, shown: Callable[[float], str]) -> Value:
    return Value("") if value is None else Value(shown(value), exact(value))


def _spread(found: Estimate | None, shown: Callable[[float], str], with_sd: bool = True) -> Value:
    """A mean with its sd over seeds."""
    if found is None or not found.values:
        return Value("")
    if found.sd is None:
        return Value(shown(found.mean), exact(found.mean))
    text = f"{shown(found.mean)} ± {shown(found.sd)}" if with_sd else shown(found.mean)
    return Value(text, f"{exact(found.mean)} ± {exact(found.sd)}")


def _bounds(bounds: tuple[float, float] | None) -> str:
    return f"{exact(bounds[0])} to {exact(bounds[1])}" if bounds else ""
