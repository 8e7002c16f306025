"""Tables: read one column of JSON, JSON lines, CSV or Parquet row by row, never as a whole."""

import csv
import functools
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.paths import raise_unreadable
from data.sources.json_values import values

FORMATS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
PARQUET_ROWS = 256  # decoded at one time
csv.field_size_limit(2**31 - 1)  # a cell may be a book
log = logging.getLogger("headroom")


def format_of(path: str) -> str | None:
    """The table format by the file's suffix; None for other files."""
    return FORMATS.get(Path(path).suffix.lower())


def check_column(path: str, column: str) -> None:
    """Raises UserError where a table's header or first row has no such column. Reads nothing more."""
    _check_known(path, column, _columns(path))


def cells(path: str, column: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every row that has text: the place is `path:row`, for JSON lines `path:line`, from 1."""
    kinds = {"json lines": _json_cells, "json": _json_cells, "csv": _csv_cells, "parquet": _parquet_cells}
    rows = kinds[format_of(path)]
    with _user_errors(path):
        for number, cell in rows(path, column):
            if cell is not None and cell != "":
                yield f"{path}:{number}", _text(f"{path}:{number}", column, cell)


def check_rows_have_column(path: str, column: str, rows: int | None) -> int:
    """Raises UserError for the first row of JSON or JSON lines that lacks the column, unlike one with null in it.
    rows: how many are checked; None: all. -> the number of rows checked."""
    with _user_errors(path):
        return sum(1 for _ in itertools.islice(_json_cells(path, column), rows))


def _text(place: str, column: str, cell: Any) -> str:
    if not isinstance(cell, str):
        raise UserError(not_text_message(place, column, cell))
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} is not valid Unicode: a lone surrogate at character {error.start}: mend it") from None
    return cell


def not_text_message(place: str, column: str, cell: Any) -> str:
    return (
        f"{place} holds {type(cell).__name__} in column {column}, not text: choose a column of strings as data.column= "
        "(null and empty ones are passed over)"
    )


def _columns(path: str) -> list[str]:
    if format_of(path) == "parquet":
        return _open_parquet(path).schema_arrow.names
    with _user_errors(path):
        if format_of(path) == "csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return next(_csv_rows(path, file), [])
        return next((list(row) for _, row in _json_rows(path)), [])


@contextmanager
def _user_errors(path: str) -> Iterator[None]:
    """A context for reading: turns OSError and UnicodeDecodeError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise_unreadable(path, error)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text (it holds the byte 0x{byte:02x}): convert or exclude it") from None


def _check_known(place: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(no_column_message(place, column, columns))
    if columns.count(column) > 1:
        _warn_once(f"{place} has {columns.count(column)} columns named {column}: the first is read")


def no_column_message(place: str, column: str, columns: list[str]) -> str:
    """The error message for a missing column, also where data.column is not set."""
    if len(columns) == 1 and ";" in columns[0] and place.lower().endswith(".csv"):
        return f"{place} has one column, {columns[0]}: separate its cells by commas instead of semicolons"
    return f"{place} has no column {column}, it has {list_names(columns)}: give one as data.column="


def list_names(names: list[str]) -> str:
    """Format at most 20 names for a message: a table may have thousands."""
    shown = ", ".join(map(str, names[:20])) or "none"
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown


def _json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of every row: its line number, or, in a .json file, its index from 1."""
    for number, row in _json_lines(path) if format_of(path) == "json lines" else enumerate(_json_values(path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object with a column of text: mend or remove it")
        yield number, row


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error).partition(":")[0]
                raise UserError(f"{path}:{number} is not JSON ({reason}): mend or remove the line") from None


def _json_values(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for value in values(file):
                number += 1
                yield value
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(":")[0]
            place = f" after row {number}" if number else ""
            raise UserError(f"{path} is not JSON{place} ({reason}): mend or exclude it") from None


def _json_cells(path: str, column: str) -> Iterator[tuple[int, Any]]:
    for number, row in _json_rows(path):
        if column not in row:
            raise UserError(f"{no_column_message(f'{path}:{number}', column, list(row))}, or mend or remove the row")
        yield number, row[column]


def _csv_rows(path: str, file) -> Iterator[list[str]]:
    reader = csv.reader(file, strict=True, delimiter="\t" if path.lower().endswith(".tsv") else ",")
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV ({error}): mend or exclude the file") from None


def _csv_cells(path: str, column: str) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = _csv_rows(path, file)
        head = next(rows, [])
        _check_known(path, column, head)
        place = head.index(column)
        warn_of_tabs = path.lower().endswith(".tsv")
        for number, row in enumerate(rows, 1):
            if row and len(row) != len(head):
                raise UserError(
                    f"{path}, row {number} after the head, has {len(row)} cells, the head has {len(head)}: mend the row"
                )
            if row:
                if warn_of_tabs and set(row[place]) & set("\t\r\n"):
                    warn_of_tabs = False
                    _warn_once(
                        f"{path}:{number} has tabs or line ends within quotes in column {column}, read as one cell: "
                        "where a quote is text, double and enclose it, or give the table as .jsonl"
                    )
                yield number, row[place]


def _parquet_cells(path: str, column: str) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException

    file = _open_parquet(path)
    number = 0
    _check_known(path, column, file.schema_arrow.names)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    if leaves.count(column) > file.schema_arrow.names.count(column):
        struct, _, field = column.partition(".")
        _warn_once(
            f"{path}: data.column={column} reads the column of that name; the field {field} of the struct {struct} is "
            f"another text, which can be read from a file where it has a column of its own"
        )
    try:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            # By name, not the first: columns=["a.text"] also selects the field text of a struct a.
            for cell in batch.column(batch.schema.names.index(column)):
                number += 1
                yield number, cell.as_py()
    except UnicodeDecodeError:
        raise UserError(
            f"{path}:{number} is not UTF-8 text in column {column}: mend the row, or exclude the file"
        ) from None
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged after row {number}: {reason}: replace or exclude it") from None


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(line)


def _open_parquet(path: str):
    from pyarrow import ArrowException  # imported here: it takes a tenth of a second, and few have such files
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}: replace or exclude it") from None
