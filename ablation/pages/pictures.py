"""Pictures of a report, by matplotlib: curves.png, final.png, frontier.png and accuracy.png."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ablation.pages.axes import X_UNITS, Axis, bytes_axis, loss_axis, x_axis
from ablation.pages.palette import MATPLOTLIB_MARKERS, Look, look
from ablation.pages.series import Series, late, series, units
from ablation.pages.words import accuracy_frontier, estimate, frontier, has_accuracy, short_names
from ablation.results import Report, Variant
from ablation.statistics import Difference, Estimate
from common.figures import legend, name_ticks, new_figure

CAPTIONS = {
    "curves.png": "Training loss (line: mean over seeds; thin: each seed; band: lowest to highest) "
    "and validation loss (points)",
    "final.png": "Final validation loss: mean (large), every seed (small) and 95 % interval (bar)",
    "frontier.png": "Final validation loss against bytes of KV cache per token "
    "(bar: 95 % interval; dashed: the lowest with that cache or less)",
    "accuracy.png": "Share of right answers against bytes of KV cache per token "
    "(bar: 95 % interval; dashed: the highest with that cache or less)",
}
MAX_LABEL = 40  # characters of a name in a picture


def figures(report: Report, x: str = "tokens", y: str = "bpb", log: bool = False) -> dict[str, Any]:
    """matplotlib's figures by file name; those that would be empty, or of one point only, are left out.

    x: one of X_UNITS; y: bpb or loss; log: both axes. All three are of the curves.
    """
    assert x in X_UNITS, x
    found = {"curves.png": curves(report, x, y, log)} if any(variant.curves for variant in report.variants) else {}
    if report.variants:
        found["final.png"] = final(report)
    if len({variant.cache_bytes_per_token for variant in report.variants}) > 1:
        found["frontier.png"] = frontier_figure(report)
    if has_accuracy(report):
        found["accuracy.png"] = accuracy_figure(report)
    for name, figure in found.items():  # a picture may leave the folder of its report
        figure.supxlabel(CAPTIONS[name], size="x-small", color="0.35")
    return found


def curves(report: Report, x: str, y: str, log: bool) -> Any:
    """Losses against x, a color, a dash and a marker for each variant. A linear axis leaves out the steep beginning.
    Runs that cannot be compared in y are drawn in the other unit."""
    y = y if y in units(report) else next(iter(units(report)), y)
    train = [series(variant, "train") for variant in report.variants]
    val = [series(variant, "val") for variant in report.variants]
    figure, axes = new_figure(9.5, max(4.5, 1 + 0.24 * len(train)))
    lines = [_curve(axes, *pair, look(i), x, y) for i, pair in enumerate(zip(train, val, strict=True))]
    shown = [line for each in [*train, *val] for line in [each.mean, *each.seeds]]
    losses = [value for line in shown for value in (_known(line.y[y]) if log else late(line, y))]
    set_axis(axes, "x", x_axis(x, [place for line in shown for place in line.x[x]], log))
    set_axis(axes, "y", loss_axis(y, losses, log))
    legend(figure, _named(report, lines))
    return figure


def _curve(axes: Any, train: Series, val: Series, found: Look, x: str, y: str) -> Any:
    """Draw a variant -> its line in the legend."""
    style = {"color": found.light, "linestyle": (0, found.dash) if found.dash else "-"}
    for line in train.seeds if len(train.seeds) > 1 else ():
        axes.plot(line.x[x], gaps(line.y[y]), color=found.light, linewidth=0.5, alpha=0.25)
    if len(train.seeds) > 1:
        low, high = gaps(train.low[y]), gaps(train.high[y])
        axes.fill_between(train.mean.x[x], low, high, color=found.light, alpha=0.15, linewidth=0)
    axes.plot(train.mean.x[x], gaps(train.mean.y[y]), linewidth=1.4, **style)
    marker = MATPLOTLIB_MARKERS[found.marker]
    axes.plot(val.mean.x[x], gaps(val.mean.y[y]), marker, color=found.light, markersize=4.5, markeredgewidth=0)
    return axes.plot([], [], marker=marker, markersize=5, markeredgewidth=0, linewidth=1.4, **style)[0]


def final(report: Report) -> Any:
    """Final losses as dots, a row for each variant; beside them differences to the baseline, with intervals."""
    differences = report.comparison.differences if report.comparison else {}
    panels = 2 if any(found.interval for found in differences.values()) else 1
    figure, axes = new_figure(5.5 + 3 * (panels - 1), 1.2 + 0.32 * len(report.variants), panels)
    left = axes[0] if panels == 2 else axes
    estimates = [estimate(report, variant) for variant in report.variants]
    for row, found in enumerate(estimates):
        _row(left, row, found)
    set_axis(left, "x", loss_axis("", _spans(estimates), label=report.metric_name))
    name_ticks(left.yaxis, short_names([variant.label for variant in report.variants], MAX_LABEL))
    left.set_ylim(len(estimates) - 0.5, -0.5)
    if panels == 2:
        _differences(axes[1], report, differences)
        name_ticks(axes[1].yaxis, [""] * len(estimates))
        axes[1].set_ylim(left.get_ylim())
    return figure


def _row(axes: Any, row: int, found: Estimate) -> None:
    style = look(row)
    places = list(found.values.values())
    if found.interval:
        axes.plot(found.interval, [row, row], "-", color=style.light, linewidth=7, alpha=0.25, solid_capstyle="butt")
    axes.plot(places, [row] * len(places), "o", color=style.light, markersize=3, markeredgewidth=0)
    axes.plot(found.mean, row, MATPLOTLIB_MARKERS[style.marker], color=style.light, markersize=7, markeredgewidth=0)


def _differences(axes: Any, report: Report, differences: Mapping[str, Difference]) -> None:
    spans = [0.0]
    for row, variant in enumerate(report.variants):
        found = differences.get(variant.name)
        if found is None:
            continue
        style = look(row)
        if found.interval:
            axes.plot(
                found.interval, [row, row], "-", color=style.light, linewidth=7, alpha=0.25, solid_capstyle="butt"
            )
        axes.plot(found.mean, row, MATPLOTLIB_MARKERS[style.marker], color=style.light, markersize=7, markeredgewidth=0)
        spans += [found.mean, *(found.interval or ())]
    axes.axvline(0, color="0.4", linewidth=0.9)
    set_axis(axes, "x", loss_axis("", spans, label="difference to the baseline (first row), 95 %"))


def frontier_figure(report: Report) -> Any:
    """Final losses against bytes of KV cache per token; the dashed line is the frontier."""
    return _against_cache(report, lambda variant: estimate(report, variant), frontier(report), report.metric_name)


def accuracy_figure(report: Report) -> Any:
    """Shares of right answers against bytes of KV cache per token; the dashed line is the frontier."""
    return _against_cache(report, lambda variant: variant.val_accuracy, accuracy_frontier(report), "accuracy")


def _against_cache(
    report: Report, estimate_of: Callable[[Variant], Estimate], best: Sequence[Variant], label: str
) -> Any:
    """best: the variants on the frontier."""
    figure, axes = new_figure(7.5, max(4.0, 1 + 0.24 * len(report.variants)))
    estimates = [estimate_of(variant) for variant in report.variants]
    axes.plot(
        [variant.cache_bytes_per_token for variant in best],
        [estimate_of(variant).mean for variant in best],
        color="0.55",
        linewidth=0.9,
        linestyle="--",
        drawstyle="steps-post",
    )
    lines = []
    for i, (variant, found) in enumerate(zip(report.variants, estimates, strict=True)):
        style = look(i)
        place = variant.cache_bytes_per_token
        if found.interval:
            axes.plot([place, place], found.interval, "-", color=style.light, linewidth=1.4)
        marker = MATPLOTLIB_MARKERS[style.marker]
        lines += axes.plot(place, found.mean, marker, color=style.light, markersize=7, markeredgewidth=0)
    set_axis(axes, "x", bytes_axis(variant.cache_bytes_per_token for variant in report.variants))
    set_axis(axes, "y", loss_axis("", _spans(estimates), label=label))
    legend(figure, _named(report, lines))
    return figure


def _named(report: Report, lines: Sequence[Any]) -> dict[str, Any]:
    """Lines by name for a legend."""
    return dict(zip(short_names([variant.name for variant in report.variants], MAX_LABEL), lines, strict=True))


def _spans(estimates: Sequence[Estimate]) -> list[float]:
    return [value for found in estimates for value in [*found.values.values(), *(found.interval or ())]]


def set_axis(axes: Any, which: str, axis: Axis) -> None:
    """Give one of matplotlib's axes the range and ticks of ours."""
    settings = {f"{which}scale": "log" if axis.log else "linear", f"{which}label": axis.label}
    axes.set(**settings, **{f"{which}lim": (axis.low, axis.high)})
    places, labels = [tick for tick, _ in axis.ticks], [text for _, text in axis.ticks]
    own = axes.xaxis if which == "x" else axes.yaxis
    own.set_ticks(places, labels)
    own.set_ticks([], minor=True)


def gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
