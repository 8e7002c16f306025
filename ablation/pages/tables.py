"""The tables of a report's page and of its Markdown, which only render them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ablation.pages import columns
from ablation.pages.columns import Column, Value, interval_name, interval_value, optional
from ablation.pages.formats import degrees, exact, fixed, places, signed
from ablation.pages.words import comparisons, power
from ablation.results import Cell, Report


@dataclass(frozen=True)
class Table:
    columns: list[Column]  # names first
    words: str = ""  # to be read before it

    @property
    def rows(self) -> Iterable[tuple[Value, ...]]:
        return zip(*(column.values for column in self.columns), strict=True)


def results(report: Report) -> Table | None:
    """Losses of the variants, and how they compare with the baseline's."""
    return _variants(report, columns.results(report), _explained(report))


def accuracy(report: Report) -> Table | None:
    """Shares of right answers of the variants, and how they compare with the baseline's."""
    found = columns.accuracy(report)
    words = "Share of answers that have the largest logit, on the whole validation set; higher is better."
    return _variants(report, found, words) if found else None


def costs(report: Report) -> Table | None:
    """Budgets, speed and memory of the variants."""
    return _variants(report, columns.costs(report))


def statistics(report: Report) -> Table | None:
    """What the verdicts come of."""
    if report.comparison is None or not report.comparison.differences:
        return None
    decimals = places(report)
    found = report.comparison.differences.values()

    def loss(value: float | None) -> Value:
        return optional(value, lambda known: fixed(known, decimals))

    table = [
        _code("variant", report.comparison.differences),
        Column("difference", [Value(signed(one.mean, decimals), exact(one.mean)) for one in found]),
        Column(interval_name(report), [interval_value(one.interval, decimals) for one in found]),
        Column("p", [optional(one.p, _digits) for one in found]),
        Column("p corrected", [optional(one.p_corrected, _digits) for one in found]),
        Column("detectable from", [loss(one.detectable) for one in found]),
        Column("sd", [loss(one.sd) for one in found]),
        Column("own sd", [loss(one.own_sd) for one in found]),
        Column("df", [Value("" if one.df is None else degrees(one.df)) for one in found]),
        Column("common seeds", [Value(str(len(one.seeds))) for one in found]),
        Column("method", [Value(one.method) for one in found], numeric=False),
    ]
    words = f"Differences of {report.metric_name} to {report.comparison.baseline}."
    if report.comparison.pooled_sd is not None:
        pooled = fixed(report.comparison.pooled_sd, decimals)
        words += f" Pooled sd of one run: {pooled}, with {report.comparison.pooled_df} degrees of freedom."
    return Table(table, words)


def settings(report: Report) -> Table | None:
    """Settings by variant, where they differ; those that the matching of budgets moved are among them."""
    if not report.config_differences:
        return None
    by_variant = [
        _code(variant.name, (shown(values.get(variant.name, "")) for values in report.config_differences.values()))
        for variant in report.variants
    ]
    return Table([_code("setting", report.config_differences), *by_variant])


def unfinished(report: Report) -> Table | None:
    """Runs that have no result, and why."""
    cells = [cell for cell in report.cells if cell.state != "finished"]
    details = Column("detail", [Value(cell.detail) for cell in cells], numeric=False)
    return _runs(cells, details)


def every_run(report: Report) -> Table | None:
    decimals = places(report)

    def losses(name: str, loss_of: Callable[[Cell], float | None]) -> Column:
        return Column(name, [optional(loss_of(cell), lambda value: fixed(value, decimals)) for cell in report.cells])

    both = losses("val bpb", lambda cell: cell.val_bpb), losses("val loss", lambda cell: cell.val_loss)
    answers = [
        optional(cell.val_accuracy, lambda value: fixed(value, columns.ACCURACY_PLACES)) for cell in report.cells
    ]
    accuracies = [Column("accuracy", answers)] if any(value.text for value in answers) else []
    return _runs(report.cells, *both, *accuracies)


def shown(value: Any) -> str:
    """A setting, or a fact of the environment, as text; several as a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def _variants(report: Report, found: list[Column], words: str = "") -> Table | None:
    names = _code("variant", (variant.name for variant in report.variants))
    return Table([names, *found], words) if report.variants else None


def _explained(report: Report) -> str:
    """What the headings of a comparison mean."""
    several = "Intervals are of each comparison alone; p is corrected for their number, by Holm's method. "
    detectable = f"Detectable from: true differences of this size or more {power(report)}."
    count = comparisons(report)
    return f"{several if count > 1 else ''}{detectable}" if count else ""


def _runs(cells: list[Cell], *more: Column) -> Table | None:
    if not cells:
        return None
    names = _code("run", (cell.name for cell in cells))
    states = Column("state", [Value(cell.state) for cell in cells], numeric=False, kind="state")
    return Table([names, states, *more, _code("folder", (cell.folder for cell in cells))])


def _code(name: str, values: Iterable[str]) -> Column:
    return Column(name, [Value(value) for value in values], numeric=False, kind="code")


def _digits(p: float) -> str:
    return f"{p:.3g}"
