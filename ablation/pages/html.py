"""A report as one self-contained page: report.html. It needs no network, and no script for anything but switching."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation.pages import charts
from ablation.pages.axes import X_UNITS, Y_UNITS
from ablation.pages.columns import Column, Value, costs, results
from ablation.pages.formats import counted, exact, places
from ablation.pages.markdown import shown
from ablation.pages.palette import COLORS
from ablation.pages.tags import Markup, as_script, join, tag
from ablation.results import Cell, Report

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
    yield _section("Without a result", _unfinished(report))
    yield _section("Results", _variants(report, results(report)))
    yield _curves(report, x, y, log)
    yield from _rows(report)
    yield _frontier(report)
    yield _section("Budgets and speed", _variants(report, costs(report)))
    yield _section("Statistics", _statistics(report))
    yield _section("What differs in the settings", _settings(report))
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


def _table(heads: Sequence[Any], rows: Iterable[Sequence[Value | Markup | str]], right: Sequence[bool]) -> Markup:
    """A table that scrolls within its own container; its first column stays in sight."""
    classes = ["number" if aligned else None for aligned in right]
    head = tag("tr", *(tag("th", name, class_=kind, scope="col") for name, kind in zip(heads, classes, strict=True)))
    body = [_row(row, classes) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0)


def _row(row: Sequence[Value | Markup | str], classes: Sequence[str | None]) -> Markup:
    first, *rest = (_content(value) for value in row)
    cells = (tag("td", value, class_=kind) for value, kind in zip(rest, classes[1:], strict=True))
    return tag("tr", tag("th", first if first.startswith("<") else tag("span", first), scope="row"), *cells)


def _content(value: Value | Markup | str) -> Markup:
    """A cell: rounded, and with all digits, of which the page shows one or the other."""
    if not isinstance(value, Value):
        return join(value)
    if not value.exact or value.exact == value.text.replace(",", ""):
        return join(value.text)
    return join(tag("span", value.text, class_="short"), tag("span", value.exact, class_="exact"))


def _variants(report: Report, found: Sequence[Column]) -> Markup | None:
    if not report.variants:
        return None
    rows = (
        [_named(i, variant.name), *(column.values[i] for column in found)] for i, variant in enumerate(report.variants)
    )
    heads = ["variant", *(column.name for column in found)]
    switch = tag("label", tag("input", type="checkbox", class_="digits"), "all digits", class_="switch")
    return join(switch, _table(heads, rows, [False, *(column.numeric for column in found)]))


def _named(index: int, name: str) -> Markup:
    return tag("span", charts.swatch(index, line=False), tag("span", name), class_="named")


def _statistics(report: Report) -> Markup | None:
    """Differences to the baseline in all digits, as in report.json."""
    if report.comparison is None or not report.comparison.differences:
        return None
    rows = []
    for name, found in report.comparison.differences.items():
        bounds = f"{exact(found.interval[0])} to {exact(found.interval[1])}" if found.interval else ""
        numbers = (found.p, found.p_corrected, found.detectable, found.sd, found.own_sd, found.df)
        rows.append([name, exact(found.mean), bounds, *map(exact, numbers), str(len(found.seeds)), found.method])
    heads = ["variant", "difference", "95 % interval", "p", "p corrected", "detectable", "sd", "own sd", "df"]
    table = _table([*heads, "common seeds", "method"], rows, [False, *[True] * 9, False])
    pooled = report.comparison.pooled_sd
    words = f"Differences of {report.metric_name} to {report.comparison.baseline}. Intervals are not corrected for the"
    words += " number of comparisons; p is, by Holm's method. Detectable: what would have been seen with 80 % power."
    if pooled is not None:
        words += f" Pooled sd of one run: {exact(pooled)}, with {report.comparison.pooled_df} degrees of freedom."
    return join(tag("p", words, class_="note"), table)


def _unfinished(report: Report) -> Markup | None:
    rows = [[cell.name, _state(cell), cell.detail, cell.folder] for cell in report.cells if cell.state != "finished"]
    return _table(["run", "state", "detail", "folder"], rows, [False] * 4) if rows else None


def _state(cell: Cell) -> Markup:
    return tag("span", cell.state, class_=f"state {cell.state}")


def _every_run(report: Report) -> Markup | None:
    rows = [[cell.name, _state(cell), exact(cell.val_bpb), exact(cell.val_loss), cell.folder] for cell in report.cells]
    if not rows:
        return None
    table = _table(["run", "state", "val bpb", "val loss", "folder"], rows, [False, False, True, True, False])
    return tag("details", tag("summary", counted(len(rows), "run")), table)


def _settings(report: Report) -> Markup | None:
    if not report.config_differences:
        return None
    names = [variant.name for variant in report.variants]
    rows = (
        [tag("code", key), *(tag("code", shown(values[name])) if name in values else "" for name in names)]
        for key, values in report.config_differences.items()
    )
    return _table(["setting", *names], rows, [False] * (1 + len(names)))


def _environment(report: Report) -> Markup | None:
    command = tag("pre", tag("code", report.command)) if report.command else None
    pairs: Mapping[str, Any] = {**report.environment, **report.data}
    facts = [tag("div", tag("dt", key), tag("dd", shown(value))) for key, value in pairs.items()]
    return join(command, tag("dl", *facts)) if command or facts else None


# Charts


def _has_seeds(report: Report) -> bool:
    return any(len(variant.val_loss.values) > 1 for variant in report.variants)


def _figure(title: str, caption: str, *content: Markup | None, **attributes: Any) -> Markup:
    return tag("section", tag("h2", title), tag("figure", *content, tag("figcaption", caption)), **attributes)


def _curves(report: Report, x: str, y: str, log: bool) -> Markup | None:
    data = charts.curve_data(report)
    if not data["y"]:
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
    caption += "The dashed line joins those that nothing of a smaller cache beats."
    return _figure("Loss against cache", caption, chart)
