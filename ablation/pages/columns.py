"""The columns of the tables of variants, the most important first: one definition for terminal, Markdown and HTML. The
column of names is not among them, and none that would be empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ablation.pages.formats import bytes_, compact, duration, exact, fixed, interval, places, signed
from ablation.pages.words import comparisons, estimate, has_accuracy, verdict
from ablation.results import Report, Variant
from ablation.statistics import Difference, Estimate

ACCURACY_PLACES = 3  # decimals of shares of right answers


@dataclass(frozen=True)
class Value:
    text: str
    exact: str = ""  # all digits of what is rounded in the text


@dataclass(frozen=True)
class Column:
    name: str
    values: list[Value]  # by row
    numeric: bool = True
    essential: bool = True  # worth its place in a terminal
    kind: Literal["text", "code", "state"] = "text"  # code: names, folders and settings; state: of a run


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
        column(interval_name(report), lambda found: interval_value(found.interval, decimals)),
        Column("verdict", [_verdict(report, variant) for variant in report.variants], numeric=False),
        column("detectable from", lambda found: optional(found.detectable, lambda value: fixed(value, decimals))),
    ]


def _verdict(report: Report, variant: Variant) -> Value:
    if variant.name == report.comparison.baseline:
        return Value(verdict(None))
    found = report.comparison.differences.get(variant.name)
    if found is None:
        return Value("")
    words = verdict(found)
    return Value(words, "" if found.p_corrected is None else f"{words.partition(', ')[0]}, p = {found.p_corrected!r}")


def accuracy(report: Report) -> list[Column]:
    """Shares of right answers, and how they compare with the baseline's; nothing where the data has no answers."""
    if not has_accuracy(report):
        return []
    column = partial(_column, report)
    found = [
        column("accuracy", lambda variant: _spread(variant.val_accuracy, _share)),
        column("95 % interval", lambda variant: interval_value(variant.val_accuracy.interval, ACCURACY_PLACES)),
    ]
    if report.accuracy is not None:
        found += _accuracy_comparison(report)
    return _telling([*found, column("seeds", lambda variant: Value(str(len(variant.val_accuracy.values))), False)])


def _accuracy_comparison(report: Report) -> list[Column]:
    differences = [report.accuracy.differences.get(variant.name) for variant in report.variants]

    def column(name: str, value_of: Callable[[Difference], Value], numeric: bool = True) -> Column:
        return Column(name, [value_of(found) if found else Value("") for found in differences], numeric)

    return [
        column("difference", lambda found: Value(signed(found.mean, ACCURACY_PLACES), exact(found.mean))),
        column("its 95 % interval", lambda found: interval_value(found.interval, ACCURACY_PLACES)),
        Column("verdict", [Value(verdict(found, higher_is_better=True)) for found in differences], numeric=False),
    ]


def _share(value: float) -> str:
    return fixed(value, ACCURACY_PLACES)


def costs(report: Report) -> list[Column]:
    """Budgets, speed and memory."""
    column = partial(_column, report)
    found = [
        column("params", lambda variant: Value(compact(variant.parameters), exact(variant.parameters))),
        column("active params", lambda variant: optional(variant.active_parameters, compact)),
        column("cache B/token", lambda variant: Value(f"{variant.cache_bytes_per_token:,.0f}")),
        column("FLOPs/token", lambda variant: _number(variant.flops_per_token)),
        column("tok/s", lambda variant: _spread(variant.tokens_per_second, compact, with_sd=False)),
        column("decode tok/s", lambda variant: optional(variant.decode_tokens_per_second, compact)),
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
        column("training time", lambda variant: _minutes(variant.minutes)),
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


def _minutes(found: Estimate) -> Value:
    return Value(duration(60 * found.mean), f"{_digits(found)} min")


def optional(value: float | None, shown: Callable[[float], str]) -> Value:
    return Value("") if value is None else Value(shown(value), exact(value))


def _spread(found: Estimate | None, shown: Callable[[float], str], with_sd: bool = True) -> Value:
    """A mean with its sd over seeds."""
    if found is None or not found.values:
        return Value("")
    spread = f" ± {shown(found.sd)}" if with_sd and found.sd is not None else ""
    return Value(f"{shown(found.mean)}{spread}", _digits(found))


def _digits(found: Estimate) -> str:
    return exact(found.mean) if found.sd is None else f"{exact(found.mean)} ± {exact(found.sd)}"


def interval_name(report: Report) -> str:
    """The heading of intervals: beside verdicts that are corrected for several comparisons they are not."""
    return "95 % interval, uncorrected" if comparisons(report) > 1 else "95 % interval"


def interval_value(bounds: tuple[float, float] | None, decimals: int) -> Value:
    return Value(interval(bounds, decimals), f"{exact(bounds[0])} to {exact(bounds[1])}" if bounds else "")
