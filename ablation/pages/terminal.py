"""A report as text for the terminal: aligned columns that break into several tables where the window is narrow."""

import re
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells

from ablation.pages.columns import Column, accuracy, costs, results
from ablation.pages.words import outcome
from ablation.results import Report
from common.errors import escaped

GAP = "  "
BOUND = "\N{NO-BREAK SPACE}"  # which does not end a line
BINDS = re.compile(" %|\\bp [=<] | ± ")
MAX_NAME = 32  # cells of a variant's name in a line; longer ones go on in the next


def terminal(report: Report, width: int = 100) -> str:
    """Tables, summary, notes and cells without a result: lines of at most `width` cells where words allow, without
    colors, and with names as they are but for control characters."""
    of_variants = ([*results(report), *costs(report)], accuracy(report)) if report.variants else ()
    blocks = ["\n".join(table) for columns in of_variants for table in _tables(report, columns, width)]
    blocks.append("\n".join(line for sentence in report.summary for line in _wrapped(sentence, width)))
    if report.notes:
        blocks.append("\n".join(line for note in report.notes for line in _wrapped(f"Note: {note}", width)))
    others = [outcome(cell) for cell in report.cells if cell.state != "finished"]
    if others:
        lines = (f"  {line}" for other in others for line in _wrapped(other, width - 2))
        blocks.append("\n".join(["Without a result:", *lines]))
    return "\n\n".join(block for block in [escaped(report.title), *blocks] if block) + "\n"


def _wrapped(sentence: str, width: int) -> list[str]:
    bound = BINDS.sub(lambda found: found[0].replace(" ", BOUND), escaped(sentence))
    lines = textwrap.wrap(bound, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line.replace(BOUND, " ") for line in lines]


def _tables(report: Report, columns: Sequence[Column], width: int) -> list[list[str]]:
    """A table of variants as lines; as several, each with the names, where the columns are too many for the width."""
    limit = min(MAX_NAME, max(8, width // 3))
    names = [_pieces(escaped(variant.label), limit) for variant in report.variants]
    space = max(cell_len(piece) for name in [*names, ["variant"]] for piece in name)
    tables: list[list[Column]] = [[]]
    used = space
    for column in columns:
        if not column.essential:
            continue
        needed = len(GAP) + _width(column)
        if tables[-1] and used + needed > width:
            tables.append([])
            used = space
        tables[-1].append(column)
        used += needed
    return [_lines(names, space, table) for table in tables if table]


def _width(column: Column) -> int:
    return max(cell_len(text) for text in [column.name, *(value.text for value in column.values)])


def _pieces(name: str, limit: int) -> list[str]:
    """A name in lines of at most `limit` cells, broken after commas where there are some."""
    lines = [""]
    for part in re.findall(r"[^,]*,|[^,]+$", name) or [name]:
        if cell_len(lines[-1] + part) > limit and lines[-1]:
            lines.append("")
        lines[-1] += part
    return [piece for line in lines for piece in (chop_cells(line, limit) or [""])]


def _lines(names: Sequence[list[str]], space: int, table: Sequence[Column]) -> list[str]:
    widths = [_width(column) for column in table]
    heads = [_aligned(column.name, width, column.numeric) for column, width in zip(table, widths, strict=True)]
    lines = [GAP.join([_aligned("variant", space, False), *heads]), "─" * (space + sum(len(GAP) + w for w in widths))]
    for i, name in enumerate(names):
        values = [
            _aligned(column.values[i].text or "·", width, column.numeric)
            for column, width in zip(table, widths, strict=True)
        ]
        lines.append(GAP.join([_aligned(name[0], space, False), *values]))
        lines += name[1:]
    return [line.rstrip() for line in lines]


def _aligned(text: str, width: int, right: bool) -> str:
    filling = " " * (width - cell_len(text))
    return filling + text if right else text + filling
