"""Charts of the page as SVG. Places are percentages, so that a chart fills its container while its texts keep their
size; paths, which know no percentages, lie in an inner SVG of 1000 by 1000 that is stretched."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ablation.pages.axes import X_UNITS, Axis, bytes_axis, loss_axis, x_axis
from ablation.pages.formats import bytes_, exact, fixed, signed
from ablation.pages.palette import COLORS, SHAPES, look
from ablation.pages.series import SOURCES, Line, Series, late, series, units
from ablation.pages.tags import Markup, join, tag
from ablation.pages.words import accuracy_frontier, estimate, frontier, verdict
from ablation.results import Report, Variant
from ablation.statistics import Estimate
from common.errors import escaped

MAX_POINTS = 160  # of a line on the page
MIN_EVALUATIONS = 4  # for the validation losses to be drawn first


def marker_shapes() -> Markup:
    """The markers, once for the whole page."""
    small = (tag("path", d=shape, id=f"m{i}") for i, shape in enumerate(SHAPES))
    large = (tag("path", d=shape, id=f"l{i}", transform="scale(1.4)") for i, shape in enumerate(SHAPES))
    return tag("svg", tag("defs", *small, *large), width=0, height=0, class_="defs", aria_hidden="true")


def marker(index: int, x: str, y: str, size: str = "m", **attributes: Any) -> Markup:
    """The marker of the index-th variant at a place. size: m, or l for a large one."""
    return tag("use", href=f"#{size}{look(index).marker}", x=x, y=y, class_=f"mark c{color(index)}", **attributes)


def labelled_marker(index: int, x: str, y: str, tip: str) -> Markup:
    """A large marker that tells its numbers when it is pointed at, touched or focused."""
    return marker(index, x, y, "l", data_tip=tip, tabindex=0, role="img", aria_label=tip.replace("\n", ", "))


def color(index: int) -> int:
    """The number of a variant's color, as in the page's style sheet."""
    return index % len(COLORS)


def swatch(index: int, line: bool) -> Markup:
    """What a variant looks like, for legends."""
    stroke = tag("line", x1="0", x2="100%", y1="50%", y2="50%", **_stroke(index)) if line else None
    return tag("svg", stroke, marker(index, "50%", "50%"), class_="swatch", aria_hidden="true")


def legend(report: Report) -> Markup:
    """Names beside a chart."""
    rows = (
        tag("li", swatch(i, False), tag("span", variant.label, title=variant.name))
        for i, variant in enumerate(report.variants)
    )
    return tag("ul", *rows, class_="legend")


def reading_legend(report: Report) -> Markup:
    """The legend of the curves: each name shows or hides its variant, and has its loss at the cursor beside it."""
    rows = []
    for i, variant in enumerate(report.variants):
        content = join(swatch(i, True), tag("span", variant.label, title=variant.name), tag("output"))
        rows.append(tag("li", tag("button", content, type="button", data_series=i, aria_pressed="true")))
    bands = any(len(variant.curves) > 1 for variant in report.variants)
    place = tag("p", "", class_="reading", role="status")
    return tag("div", place, tag("ul", *rows, class_="legend readings bands" if bands else "legend readings"))


def percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _stroke(index: int) -> dict[str, str]:
    dash = look(index).dash
    return {"class_": f"stroke c{color(index)}", **({"stroke_dasharray": " ".join(map(str, dash))} if dash else {})}


# Loss curves


def curve_data(report: Report) -> dict[str, Any]:
    """All that the curves can be drawn of: ranges and ticks for every choice of axes, and every variant's lines. The
    page's script draws other choices than the first from it."""
    sources = [source for source in SOURCES if any(_has(variant, source) for variant in report.variants)]
    found = {source: [series(variant, source, MAX_POINTS) for variant in report.variants] for source in sources}
    lines = [line for each in found.values() for line in _lines(each)]
    drawn = [unit for unit in units(report) if any(_known(line, unit) for line in lines)]
    return {
        "x": {source: _x_axes(each) for source, each in found.items()},
        "y": {source: {unit: _y_axes(each, unit) for unit in drawn} for source, each in found.items()},
        "series": [
            {"name": variant.name, **{source: _data(found[source][i]) for source in sources}}
            for i, variant in enumerate(report.variants)
        ],
    }


def first_source(report: Report) -> str:
    """What the curves show at first: validation losses, unless there are too few of them for a curve."""
    counts = [len(curve.val_step) for variant in report.variants for curve in variant.curves]
    return "val" if min(counts, default=0) >= MIN_EVALUATIONS else "train"


def _has(variant: Variant, source: str) -> bool:
    return any(curve.val_step if source == "val" else curve.step for curve in variant.curves)


def _lines(found: Iterable[Series]) -> list[Line]:
    return [line for each in found for line in [each.mean, *each.seeds]]


def _known(line: Line, unit: str) -> list[float]:
    return [value for value in line.y[unit] if value is not None]


def _x_axes(found: Sequence[Series]) -> dict[str, dict[str, Any]]:
    axes = {}
    for unit in X_UNITS:
        values = [value for line in _lines(found) for value in line.x[unit]]
        axes[unit] = {name: as_data(x_axis(unit, values, log)) for name, log in (("linear", False), ("log", True))}
    return axes


def _y_axes(found: Sequence[Series], unit: str) -> dict[str, dict[str, Any]]:
    """Axes by name: of all losses, and of the late ones only, where x is linear and the steep beginning has no room."""
    every = [value for line in _lines(found) for value in _known(line, unit)]
    end = [value for line in _lines(found) for value in late(line, unit)]
    return {
        f"{kind}-{name}": as_data(loss_axis(unit, values, log))
        for kind, values in (("late", end), ("all", every))
        for name, log in (("linear", False), ("log", True))
    }


def as_data(axis: Axis) -> dict[str, Any]:
    return {"label": axis.label, "low": axis.low, "high": axis.high, "log": axis.log, "ticks": axis.ticks}


def _data(found: Series) -> dict[str, Any]:
    """The lines of a variant. Numbers have seven digits, which are more than a hundred screens show."""
    seeds = [{"x": _rounded(line.x), "y": _rounded(line.y)} for line in found.seeds] if len(found.seeds) > 1 else []
    y = {"mean": _rounded(found.mean.y), "low": _rounded(found.low), "high": _rounded(found.high)}
    return {"x": _rounded(found.mean.x), **(y if seeds else {"mean": y["mean"]}), "seeds": seeds}


def _rounded(lists: dict[str, list]) -> dict[str, list]:
    return {
        unit: [value if value is None or isinstance(value, int) else float(f"{value:.7g}") for value in values]
        for unit, values in lists.items()
        if any(value is not None for value in values)
    }


def curves(report: Report, data: dict[str, Any], choice: dict[str, str]) -> Markup:
    """The curves as they are at first. choice: source, x, y, and xscale and yscale, each linear or log."""
    source, unit = choice["source"], choice["y"]
    axis_x = Axis(**data["x"][source][choice["x"]][choice["xscale"]])
    reach = "all" if choice["xscale"] == "log" else "late"
    axis_y = Axis(**data["y"][source][unit][f"{reach}-{choice['yscale']}"])
    groups, points = [], []
    for i, each in enumerate(data["series"]):
        found = each[source]
        xs = found["x"].get(choice["x"], [])
        mean = found["mean"].get(unit, [])
        paths = [_band(axis_x, axis_y, xs, found, unit, i)]
        for seed in found["seeds"]:
            drawn = _path(axis_x, axis_y, seed["x"][choice["x"]], seed["y"].get(unit, []))
            paths.append(tag("path", d=drawn, class_=f"seed c{color(i)}"))
        paths.append(tag("path", d=_path(axis_x, axis_y, xs, mean), **_stroke(i)))
        groups.append(tag("g", *paths, data_series=i))
        marks = _marks(axis_x, axis_y, xs, mean, i) if source == "val" else ()
        points.append(tag("g", *marks, data_series=i))
    inner = tag(
        "svg", *groups, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%", class_="lines"
    )
    description = f"Loss of {len(groups)} variants against {axis_x.label}, in {axis_y.label}. Arrow keys move a cursor."
    return plot("Loss curves", description, axis_x, axis_y, join(inner, *points), interactive=True)


def _path(axis_x: Axis, axis_y: Axis, xs: Sequence[float], ys: Sequence[float | None]) -> str:
    pieces, pen = [], "M"
    for x, y in zip(xs, ys, strict=False):
        if y is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{1000 * axis_x.place(x):.1f},{1000 * (1 - axis_y.place(y)):.1f}")
        pen = "L"
    return "".join(pieces)


def _band(
    axis_x: Axis, axis_y: Axis, xs: Sequence[float], found: dict[str, Any], unit: str, index: int
) -> Markup | None:
    if unit not in found.get("low", {}):
        return None
    rows = [row for row in zip(xs, found["low"][unit], found["high"][unit], strict=True) if None not in row]
    outline = [(x, high) for x, _, high in rows] + [(x, low) for x, low, _ in reversed(rows)]
    return tag(
        "path", d=_path(axis_x, axis_y, *zip(*outline, strict=True)) if outline else "", class_=f"band c{color(index)}"
    )


def _marks(axis_x: Axis, axis_y: Axis, xs: Sequence[float], ys: Sequence[float | None], index: int) -> list[Markup]:
    places = [(axis_x.place(x), axis_y.place(y)) for x, y in zip(xs, ys, strict=False) if y is not None]
    return [marker(index, percent(x), percent(1 - y)) for x, y in places if 0 <= x <= 1 and 0 <= y <= 1]


def plot(title: str, text: str, axis_x: Axis, axis_y: Axis, content: Markup, interactive: bool = False) -> Markup:
    """A frame with both axes around the content."""
    cursor = tag("line", y1="0", y2="100%", class_="cursor", visibility="hidden") if interactive else None
    frame = tag(
        "svg",
        tag("desc", text),
        tag("g", *_ticks_y(axis_y), class_="ticks y"),
        tag("g", *_ticks_x(axis_x), class_="ticks x"),
        content,
        cursor,
        class_="frame",
        role="img" if interactive else "group",
        aria_label=f"{title}. {text}",
        tabindex=0 if interactive else None,
    )
    return tag(
        "div",
        tag("p", axis_y.label, class_="axis-label y"),
        tag("div", frame, class_="area"),
        tag("p", axis_x.label, class_="axis-label x"),
        class_="plot",
    )


def _ticks_x(axis: Axis) -> list[Markup]:
    pieces = []
    for value, text in axis.ticks:
        place = percent(axis.place(value))
        pieces.append(tag("line", x1=place, x2=place, y1="0", y2="100%"))
        pieces.append(tag("text", text, x=place, y="100%", dy=18, text_anchor="middle"))
    return pieces


def _ticks_y(axis: Axis) -> list[Markup]:
    pieces = []
    for value, text in axis.ticks:
        place = percent(1 - axis.place(value))
        pieces.append(tag("line", x1="0", x2="100%", y1=place, y2=place))
        pieces.append(tag("text", text, x="0", y=place, dx=-8, dy="0.34em", text_anchor="end"))
    return pieces


# Dots in rows


@dataclass(frozen=True)
class Dots:
    """A row: one number of a variant."""

    index: int  # of the variant
    variant: Variant
    mean: float
    interval: tuple[float, float] | None
    seeds: dict[int, float]
    text: str  # the mean, rounded
    tip: str  # all digits


def finals(report: Report, decimals: int) -> Markup:
    """Final losses: a row for each variant, with the interval of the mean and every seed."""
    rows = []
    for i, variant in enumerate(report.variants):
        found = estimate(report, variant)
        seeds = found.values if len(found.values) > 1 else {}
        rows.append(Dots(i, variant, found.mean, found.interval, seeds, fixed(found.mean, decimals), _tip(found)))
    return _dots(rows, report.metric_name)


def differences(report: Report, decimals: int) -> Markup:
    """Differences to the baseline with their intervals, a row for each other variant."""
    rows = []
    for i, variant in enumerate(report.variants):
        found = report.comparison.differences.get(variant.name)
        if found is None:
            continue
        tip = f"{exact(found.mean)}, {verdict(found)}"
        if found.interval:
            tip += f"\n95 % interval {exact(found.interval[0])} to {exact(found.interval[1])}"
        rows.append(Dots(i, variant, found.mean, found.interval, {}, signed(found.mean, decimals), tip))
    return _dots(rows, f"difference in {report.metric_name}; lower is better", 0.0)


def _tip(found: Estimate) -> str:
    """All digits of an estimate."""
    if found.interval is None or found.sd is None:
        return f"{exact(found.mean)}, one seed"
    low, high = found.interval
    return f"mean {exact(found.mean)}\nsd {exact(found.sd)}\n95 % interval {exact(low)} to {exact(high)}"


def _dots(rows: Sequence[Dots], label: str, *also: float) -> Markup:
    """Rows on one axis, which reaches the numbers in `also` too."""
    values = [value for row in rows for value in [row.mean, *row.seeds.values(), *(row.interval or ())]]
    axis = loss_axis("", [*also, *values], label=label)
    return join(*(_row(row, axis) for row in rows), _scale(axis))


def _row(row: Dots, axis: Axis) -> Markup:
    name = escaped(row.variant.name)
    look_of = f"c{color(row.index)}"
    pieces = [_grid(axis)]
    if row.interval:
        low, high = (percent(axis.place(bound)) for bound in row.interval)
        pieces.append(tag("line", x1=low, x2=high, y1="50%", y2="50%", class_=f"span {look_of}"))
    for seed, value in row.seeds.items():
        dot = {"cx": percent(axis.place(value)), "cy": "50%", "r": 2.5, "class_": f"dot {look_of}"}
        pieces.append(tag("circle", **dot, data_tip=f"{name}\nseed {seed}: {exact(value)}"))
    pieces.append(labelled_marker(row.index, percent(axis.place(row.mean)), "50%", f"{name}\n{row.tip}"))
    return tag(
        "div",
        tag("div", swatch(row.index, line=False), tag("span", row.variant.label), class_="name"),
        tag("div", tag("svg", *pieces, class_="strip"), class_="row"),
        tag("div", row.text, class_="value"),
        class_="dots",
    )


def _grid(axis: Axis) -> Markup:
    lines = []
    for value, _ in axis.ticks:
        place = percent(axis.place(value))
        lines.append(tag("line", x1=place, x2=place, y1="0", y2="100%", class_="zero" if value == 0 else None))
    return tag("g", *lines, class_="ticks")


def _scale(axis: Axis) -> Markup:
    """The labels below rows of dots."""
    labels = [tag("text", text, x=percent(axis.place(value)), y=13, text_anchor="middle") for value, text in axis.ticks]
    image = tag("svg", tag("g", *labels, class_="ticks"), class_="strip scale", aria_hidden="true")
    label = tag("p", axis.label, class_="axis-label x")
    return tag("div", tag("div", class_="name"), tag("div", image, label), tag("div", class_="value"), class_="dots")


# The frontier


def frontier_chart(report: Report) -> Markup:
    """Final losses against bytes of KV cache per token."""
    text = f"Final loss of {len(report.variants)} variants against the bytes that their cache takes per token."
    return _against_cache(
        report,
        lambda variant: estimate(report, variant),
        frontier(report),
        ("Loss against cache", report.metric_name, text),
    )


def accuracy_chart(report: Report) -> Markup:
    """Shares of right answers against bytes of KV cache per token."""
    text = f"Accuracy of {len(report.variants)} variants against the bytes that their cache takes per token."
    words = ("Accuracy against cache", "accuracy; higher is better", text)
    return _against_cache(report, lambda variant: variant.val_accuracy, accuracy_frontier(report), words)


def _against_cache(
    report: Report,
    estimate_of: Callable[[Variant], Estimate],
    best: Sequence[Variant],
    words: tuple[str, str, str],
) -> Markup:
    """best: the variants on the frontier. words: the title, the label of the axis, and a description."""
    title, label, text = words
    estimates = [estimate_of(variant) for variant in report.variants]
    axis_x = bytes_axis(variant.cache_bytes_per_token for variant in report.variants)
    spans = [value for found in estimates for value in [found.mean, *(found.interval or ())]]
    axis_y = loss_axis("", spans, label=label)
    pieces = []
    for i, (variant, found) in enumerate(zip(report.variants, estimates, strict=True)):
        x = percent(axis_x.place(variant.cache_bytes_per_token))
        if found.interval:
            low, high = (percent(1 - axis_y.place(bound)) for bound in found.interval)
            pieces.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"span c{color(i)}"))
        size = f"{variant.cache_bytes_per_token:,.0f} bytes per token ({bytes_(variant.cache_bytes_per_token)})"
        tip = f"{escaped(variant.name)}\n{size}\n{_tip(found)}"
        pieces.append(labelled_marker(i, x, percent(1 - axis_y.place(found.mean)), tip))
    corners = [(axis_x.place(one.cache_bytes_per_token), axis_y.place(estimate_of(one).mean)) for one in best]
    return plot(title, text, axis_x, axis_y, join(_steps(corners), *pieces))


def _steps(corners: Sequence[tuple[float, float]]) -> Markup:
    """The frontier as dashed steps between the variants on it, by their places."""
    places = [(percent(x), percent(1 - y)) for x, y in corners]
    lines = []
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        lines.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y1))
        lines.append(tag("line", x1=x2, y1=y1, x2=x2, y2=y2))
    return tag("g", *lines, class_="frontier")
