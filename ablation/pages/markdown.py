"""A report as Markdown that GitHub renders: report.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablation.pages import tables
from ablation.pages.columns import Column, Value
from ablation.pages.tables import Table, shown
from ablation.results import Report
from common.errors import escaped

SPECIAL = re.compile(r"[\\`*_\[\]#|~>]|^-|^\+(?=\s|$)")
ORDERED = re.compile(r"^(\d+)([.)])(?=\s|$)")  # the beginning of a list, as no decimal is
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
    yield from _section("Without a result", _table(tables.unfinished(report)))
    yield from _section("Results", _table(tables.results(report)))
    yield from _section("Accuracy", _table(tables.accuracy(report)))
    for name, caption in pictures.items():
        yield from (f"![{text(caption)}]({name})", f"{text(caption)}.")
    yield from _section("Budgets and speed", _table(tables.costs(report)))
    yield from _section("Statistics", _table(tables.statistics(report)))
    yield from _section("What differs in the settings", _table(tables.settings(report)))
    yield from _section("Every run", _table(tables.every_run(report)))
    yield from _section("Environment", _pairs({**report.environment, **report.data}))
    if report.command:
        yield from _section("Command", _code_block(report.command))


def _section(title: str, content: str) -> Iterator[str]:
    if content:
        yield f"## {title}"
        yield content


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {text(sentence)}" for sentence in sentences)


def _table(found: Table | None) -> str:
    """A table with its words. Numbers are rounded; report.json has all digits."""
    if found is None:
        return ""
    heads = [text(column.name) for column in found.columns]
    rows = [[_cell(column, value) for column, value in zip(found.columns, row, strict=True)] for row in found.rows]
    made = table(heads, rows, [column.numeric for column in found.columns])
    return f"{text(found.words)}\n\n{made}" if found.words else made


def _cell(column: Column, value: Value) -> str:
    """A cell; a number is never broken into lines."""
    if column.kind == "code":
        return code(value.text)
    return text(value.text).replace(" ", "\N{NO-BREAK SPACE}") if column.numeric else text(value.text)


def _pairs(values: Mapping[str, Any]) -> str:
    return table(["", ""], [[text(key), text(shown(value))] for key, value in values.items()], [False, False])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A table of cells that are Markdown already."""
    rule = ["---:" if aligned else "---" for aligned in right]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def text(value: str) -> str:
    """Text in which nothing is markup."""
    marked = ORDERED.sub(r"\1\\\2", SPECIAL.sub(lambda found: f"\\{found[0]}", escaped(value)))
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
