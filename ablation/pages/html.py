"""A report as one self-contained page: report.html. It needs no network, and no script for anything but switching."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation.pages import charts, tables
from ablation.pages.axes import X_UNITS, Y_UNITS
from ablation.pages.columns import Column, Value
from ablation.pages.formats import places
from ablation.pages.palette import COLORS
from ablation.pages.tables import Table, shown
from ablation.pages.tags import Markup, as_script, join, tag
from ablation.pages.words import estimate, has_accuracy
from ablation.results import Report
from common.console import counted

HERE = Path(__file__).parent
X_NAMES = {"tokens": "tokens", "seconds": "time", "flops": "FLOPs", "steps": "steps"}
SOURCE_NAMES = {"val": "validation", "train": "training"}


def page(report: Report, x: str = "tokens", y: str = "bpb", log: bool = False) -> str:
    """report.html. x, y and log are of the curves, which the page can draw otherwise too."""
    content = tag("main", *_sections(report, x, y, log))
    script = tag("script", Markup((HERE / "page.js").read_text()))
    tip = tag("div", id="tip", role="status", hidden=True)
    body = tag("body", charts.marker_shapes(), content, tip, script)
    return f"<!DOCTYPE html>\n{tag('html', _head(report), body, lang='en')}\n"


def _head(report: Report) -> Markup:
    colors = "".join(f".c{i}{{--c:light-dark({light},{dark})}}" for i, (light, dark) in enumerate(COLORS))
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", report.title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup((HERE / "page.css").read_text() + colors)),
    )


def _sections(report: Report, x: str, y: str, log: bool) -> Iterable[Markup]:
    yield _header(report)
    yield _section("Summary", _list(report.summary, "summary"))
    yield _section("What limits this", _list(report.notes, "notes"))
    yield _section("Without a result", _table(tables.unfinished(report)))
    yield _section("Results", _table(tables.results(report), swatches=True))
    yield _curves(report, x, y, log)
    yield from _rows(report)
    yield _frontier(report)
    yield from _accuracy(report)
    yield _section("Budgets and speed", _table(tables.costs(report), swatches=True))
    yield _section("Statistics", _table(tables.statistics(report)))
    yield _section("What differs in the settings", _table(tables.settings(report)))
    yield _section("Every run", _every_run(report))
    yield _section("Environment", _environment(report))
    yield tag(
        "footer", "Made from the runs' metrics.jsonl. Beside this page, report.json has all figures in all digits."
    )


def _header(report: Report) -> Markup:
    finished = sum(cell.state == "finished" for cell in report.cells)
    runs = f"{finished} of {counted(len(report.cells), 'run')} finished"
    facts = [counted(len(report.variants), "variant"), runs, f"losses in {report.metric_name}, lower is better"]
    return tag(
        "header",
        tag("div", tag("h1", report.title), tag("p", " · ".join(facts), class_="facts"), class_="titles"),
        tag("button", "Dark", id="theme", type="button", hidden=True),
        tag("blockquote", tag("strong", "Hypothesis: "), report.hypothesis) if report.hypothesis else None,
    )


def _section(title: str, content: Markup | None, *more: Markup) -> Markup | None:
    return tag("section", tag("h2", title), content, *more) if content else None


def _list(sentences: Sequence[str], name: str) -> Markup | None:
    return tag("ul", *(tag("li", sentence) for sentence in sentences), class_=name) if sentences else None


# Tables


def _table(found: Table | None, swatches: bool = False) -> Markup | None:
    """A table that scrolls within its own container; its first column stays in sight. swatches: its rows are the
    variants, which have a look in charts."""
    if found is None:
        return None
    heads = (tag("th", column.name, class_=_class(column), scope="col") for column in found.columns)
    body = (_row(found.columns, row, i if swatches else None) for i, row in enumerate(found.rows))
    made = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    switch = tag("label", tag("input", type="checkbox", class_="digits"), "all digits", class_="switch")
    return join(
        switch if any(map(_is_rounded, itertools.chain(*found.rows))) else None,
        tag("p", found.words, class_="note") if found.words else None,
        tag("div", made, class_="scroll", tabindex=0),
    )


def _class(column: Column) -> str | None:
    return "number" if column.numeric else None


def _row(columns: Sequence[Column], row: Sequence[Value], variant: int | None) -> Markup:
    first, *rest = zip(columns, row, strict=True)
    name = _content(*first)
    if variant is not None:
        name = tag("span", charts.swatch(variant, line=False), tag("span", first[1].text), class_="named")
    cells = (tag("td", _content(column, value), class_=_class(column)) for column, value in rest)
    return tag("tr", tag("th", name, scope="row"), *cells)


def _content(column: Column, value: Value) -> Markup:
    """A cell; a rounded number has all its digits with it, and the page shows the one or the other."""
    if column.kind == "code":
        return tag("code", value.text)
    if column.kind == "state":
        return tag("span", value.text, class_=f"state {value.text}")
    if not _is_rounded(value):
        return join(value.text)
    return join(tag("span", value.text, class_="short"), tag("span", value.exact, class_="exact"))


def _is_rounded(value: Value) -> bool:
    return bool(value.exact) and value.exact != value.text.replace(",", "")


def _every_run(report: Report) -> Markup | None:
    found = tables.every_run(report)
    return tag("details", tag("summary", counted(len(report.cells), "run")), _table(found)) if found else None


def _environment(report: Report) -> Markup | None:
    command = tag("pre", tag("code", report.command)) if report.command else None
    pairs: Mapping[str, Any] = {**report.environment, **report.data}
    facts = [tag("div", tag("dt", key), tag("dd", shown(value))) for key, value in pairs.items()]
    return join(command, tag("dl", *facts)) if command or facts else None


# Charts


def _has_seeds(report: Report) -> bool:
    return any(len(estimate(report, variant).values) > 1 for variant in report.variants)


def _figure(title: str, caption: str, *content: Markup | None, **attributes: Any) -> Markup:
    return tag("section", tag("h2", title), tag("figure", *content, tag("figcaption", caption)), **attributes)


def _curves(report: Report, x: str, y: str, log: bool) -> Markup | None:
    data = charts.curve_data(report)
    if not any(data["y"].values()):
        return None
    source = charts.first_source(report)
    source = source if source in data["y"] else next(iter(data["y"]))
    unit = y if y in data["y"][source] else next(iter(data["y"][source]))
    scale = "log" if log else "linear"
    choice = {"source": source, "x": x, "y": unit, "xscale": scale, "yscale": scale}
    bands = "Lines are means over seeds, bands go from the lowest to the highest seed, thin lines are single seeds. "
    return _figure(
        "Loss curves",
        f"{bands if _has_seeds(report) else ''}A linear axis leaves out the steep beginning.",
        _controls(data, choice),
        tag("div", charts.curves(report, data, choice), charts.reading_legend(report), class_="beside"),
        tag("script", as_script({**data, "choice": choice}), type="application/json", id="curve-data"),
        id="curves",
    )


def _controls(data: dict[str, Any], choice: dict[str, str]) -> Markup:
    """Switches, which the page's script reads; without one they stay hidden."""
    groups = [
        _radios("source", "losses of", {name: SOURCE_NAMES[name] for name in data["y"]}, choice["source"]),
        _radios("y", "in", {name: Y_UNITS[name] for name in data["y"][choice["source"]]}, choice["y"]),
        _radios("x", "against", {name: X_NAMES[name] for name in X_UNITS}, choice["x"]),
    ]
    for name, label in (("xscale", "log x"), ("yscale", "log y")):
        box = tag("input", type="checkbox", name=name, checked=choice[name] == "log")
        groups.append(tag("label", box, label, class_="switch"))
    return tag("form", *groups, class_="controls", hidden=True)


def _radios(name: str, title: str, options: Mapping[str, str], chosen: str) -> Markup:
    buttons = (
        tag("label", tag("input", type="radio", name=name, value=value, checked=value == chosen), tag("span", text))
        for value, text in options.items()
    )
    return tag("fieldset", tag("legend", title), *buttons, hidden=len(options) < 2)


def _rows(report: Report) -> Iterable[Markup]:
    if not report.variants:
        return
    decimals = places(report)
    caption = "Marks are means, small dots single seeds, bars the 95 % interval of the mean."
    caption = caption if _has_seeds(report) else "One seed each: no interval."
    yield _figure("Final loss", caption, charts.finals(report, decimals))
    if report.comparison and report.comparison.differences:
        caption = f"Against {report.comparison.baseline}"
        if any(found.interval for found in report.comparison.differences.values()):
            caption += ", with 95 % intervals that are not corrected for their number"
        caption += "."
        yield _figure("Difference to the baseline", caption, charts.differences(report, decimals))


def _frontier(report: Report) -> Markup | None:
    sizes = {round(variant.cache_bytes_per_token) for variant in report.variants}
    if not sizes:
        return None
    if len(sizes) == 1:
        words = f"Every variant caches {counted(sizes.pop(), 'byte')} per token." if len(report.variants) > 1 else ""
        return _section("Loss against cache", tag("p", words)) if words else None
    chart = tag("div", charts.frontier_chart(report), charts.legend(report), class_="beside")
    caption = "Marks are means with 95 % intervals. " if _has_seeds(report) else ""
    caption += "The dashed line is the lowest loss reached with a cache of that size or a smaller one."
    return _figure("Loss against cache", caption, chart)


def _accuracy(report: Report) -> Iterable[Markup | None]:
    if not has_accuracy(report):
        return
    yield _section("Accuracy", _table(tables.accuracy(report), swatches=True))
    chart = tag("div", charts.accuracy_chart(report), charts.legend(report), class_="beside")
    caption = "Marks are means with 95 % intervals. " if _has_seeds(report) else ""
    caption += "The dashed line is the highest accuracy reached with a cache of that size or a smaller one."
    yield _figure("Accuracy against cache", caption, chart)
