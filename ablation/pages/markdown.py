"""A report as Markdown that GitHub renders: report.md."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablation.pages.columns import Column, costs, results
from ablation.pages.formats import exact
from ablation.results import Report
from common.errors import escaped

SPECIAL = re.compile(r"[\\`*_\[\]#|~>]|^[+-]|(?<=^\d)[.)]")
ENTITIES = {"&": "&amp;", "<": "&lt;", "$": "&#36;", "@": "&#64;"}  # a backslash does not stop GitHub's formulas
TICKS = re.compile("`+")


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """report.md. pictures: captions by file name, which are linked relatively."""
    return "\n\n".join(_blocks(report, pictures)) + "\n"


def _blocks(report: Report, pictures: Mapping[str, str]) -> Iterator[str]:
    yield f"# {text(report.title)}"
    if report.hypothesis:
        yield f"> **Hypothesis:** {text(report.hypothesis)}"
    yield from _section("Summary", _list(report.summary))
    yield from _section("What limits this", _list(report.notes))
    yield from _section("Without a result", _unfinished(report))
    yield from _section("Results", _variants(report, results(report)))
    for name, caption in pictures.items():
        yield from (f"![{text(caption)}]({name})", f"{text(caption)}.")
    yield from _section("Budgets and speed", _variants(report, costs(report)))
    yield from _section("Statistics", _statistics(report))
    yield from _section("What differs in the settings", _settings(report))
    yield from _section("Every run", _every_run(report))
    yield from _section("Environment", _pairs({**report.environment, **report.data}))
    if report.command:
        yield from _section("Command", _code_block(report.command))


def _section(title: str, content: str) -> Iterator[str]:
    if content:
        yield f"## {title}"
        yield content


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {text(sentence)}" for sentence in sentences)


def _variants(report: Report, found: Sequence[Column]) -> str:
    """The table of variants. Losses are rounded; report.json has all digits."""
    if not report.variants:
        return ""
    rows = [[code(variant.name), *(_value(column, i) for column in found)] for i, variant in enumerate(report.variants)]
    return table(["variant", *(column.name for column in found)], rows, [False, *(column.numeric for column in found)])


def _value(column: Column, row: int) -> str:
    """A cell; a number is never broken into lines."""
    shown = text(column.values[row].text)
    return shown.replace(" ", "\N{NO-BREAK SPACE}") if column.numeric else shown


def _statistics(report: Report) -> str:
    """Differences to the baseline, in all digits."""
    if report.comparison is None or not report.comparison.differences:
        return ""
    heads = ["variant", "difference", "95 % interval", "p", "p corrected", "detectable", "sd", "own sd", "df"]
    rows = []
    for name, found in report.comparison.differences.items():
        bounds = f"{exact(found.interval[0])} to {exact(found.interval[1])}" if found.interval else ""
        numbers = (found.p, found.p_corrected, found.detectable, found.sd, found.own_sd, found.df)
        rows.append([code(name), exact(found.mean), bounds, *map(exact, numbers), text(found.method)])
    pooled = report.comparison.pooled_sd
    shown = "" if pooled is None else f"; pooled sd {exact(pooled)} with {report.comparison.pooled_df} df"
    head = f"Differences of {text(report.metric_name)} to {code(report.comparison.baseline)}{shown}."
    return f"{head}\n\n{table([*heads, 'method'], rows, [False, *[True] * 8, False])}"


def _unfinished(report: Report) -> str:
    cells = [cell for cell in report.cells if cell.state != "finished"]
    rows = [[code(cell.name), cell.state, text(cell.detail), code(cell.folder)] for cell in cells]
    return table(["run", "state", "detail", "folder"], rows, [False] * 4) if rows else ""


def _every_run(report: Report) -> str:
    rows = [
        [code(cell.name), cell.state, exact(cell.val_bpb), exact(cell.val_loss), code(cell.folder)]
        for cell in report.cells
    ]
    return table(["run", "state", "val bpb", "val loss", "folder"], rows, [False, False, True, True, False])


def _settings(report: Report) -> str:
    """Settings by variant, where they differ; those that the matching of budgets moved are among them."""
    if not report.config_differences:
        return ""
    names = [variant.name for variant in report.variants]
    rows = [
        [code(key), *(code(shown(values[name])) if name in values else "" for name in names)]
        for key, values in report.config_differences.items()
    ]
    return table(["setting", *map(code, names)], rows, [False] * (1 + len(names)))


def _pairs(values: Mapping[str, Any]) -> str:
    return table(["", ""], [[text(key), text(shown(value))] for key, value in values.items()], [False, False])


def shown(value: Any) -> str:
    """A setting, or a fact of the environment, as text; several as a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A table of cells that are Markdown already."""
    rule = ["---:" if aligned else "---" for aligned in right]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def text(value: str) -> str:
    """Text in which nothing is markup."""
    marked = SPECIAL.sub(lambda found: f"\\{found[0]}", escaped(value))
    return re.sub("[&<$@]", lambda found: ENTITIES[found[0]], marked)


def code(value: str) -> str:
    """A name between backticks, of which there are more than in the name itself; valid in a table too."""
    name = escaped(value).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, TICKS.findall(name)), default=0))
    padding = " " if name.startswith("`") or name.endswith("`") else ""
    return f"{fence}{padding}{name}{padding}{fence}" if name else ""


def _code_block(command: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, TICKS.findall(command)), default=0))
    return f"{fence}sh\n{escaped(command, keep=chr(10))}\n{fence}"
