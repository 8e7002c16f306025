"""Tables: read columns of JSON, JSON lines, CSV, Parquet or Arrow row by row, never as a whole."""

import csv
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError
from common.paths import raise_unreadable
from data.sources import bounds
from data.sources.compression import content_name, open_bytes, open_text
from data.sources.json_values import values

FORMATS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
BINARY = ("parquet", "arrow")  # formats that are not text, and compress by themselves
ARROW_FILE = b"ARROW1"  # begins an Arrow file, as Feather is; a stream begins otherwise
BATCH_ROWS = 256  # of Parquet, decoded at one time
KEPT_KEYS = 2**20  # characters of the keys of JSON rows, kept for a message
READ_BYTES = 2**20  # of Parquet, in memory at one time
csv.field_size_limit(2**31 - 1)  # a cell may be a book; rows have a bound of their own
log = logging.getLogger("headroom")

Columns = Mapping[str, str]  # by the settings that name them
Cells = Iterator[tuple[int, Sequence[Any]]]  # the number of a row, and its cells in the columns asked for
COLUMN = "data.column"


def format_of(path: str) -> str | None:
    """The table format by the file's suffix, before that of a compression; None for other files."""
    return FORMATS.get(Path(content_name(path)).suffix.lower())


def check_column(path: str, column: str, setting: str = COLUMN) -> None:
    """Raises UserError where a table has no such column: in its header, or, of JSON, in any row, of which no more are
    read than up to the first that has it. setting: the one that names it."""
    _check_known(path, {setting: column}, _columns(path, column))


def cells(path: str, column: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every row that has text: the place is `path:row`, for JSON lines `path:line`, from 1."""
    return ((place, found[0]) for place, found in rows(path, {COLUMN: column}) if found is not None)


def rows(path: str, columns: Columns) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """Yield the place of every row, as `cells` does, and its texts in several columns; None where it lacks one."""
    kinds = {
        "json lines": _json_cells,
        "json": _json_cells,
        "csv": _csv_cells,
        "parquet": _parquet_cells,
        "arrow": _arrow_cells,
    }
    with _user_errors(path):
        for number, found in kinds[format_of(path)](path, columns):
            place = f"{path}:{number}"
            if None in found or "" in found:
                yield place, None
            else:
                yield place, tuple(_text(place, *each) for each in zip(columns.items(), found, strict=True))


def _text(place: str, named: tuple[str, str], cell: Any) -> str:
    setting, column = named
    if not isinstance(cell, str):
        raise UserError(not_text_message(place, column, cell, setting))
    if len(cell) > bounds.MAX_LENGTH:
        raise bounds.length_error(f"{place}, in column {column},")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} is not valid Unicode: a lone surrogate at character {error.start}: mend it") from None
    return cell


def not_text_message(place: str, column: str, cell: Any, setting: str = COLUMN) -> str:
    return (
        f"{place} holds {type(cell).__name__} in column {column}, not text: choose a column of strings as {setting}= "
        "(null and empty ones are passed over)"
    )


def _columns(path: str, wanted: str) -> list[str]:
    """The columns of a table. Of JSON: the keys of the first row that has the wanted one, else those of all rows."""
    if format_of(path) == "parquet":
        return _open_parquet(path)[1]
    if format_of(path) == "arrow":
        return _open_arrow(path)[0]
    with _user_errors(path):
        if format_of(path) == "csv":
            with open_text(path, "utf-8-sig", "") as file:
                return next((head for _, head in _csv_rows(path, file)), [])
        return _json_keys(path, wanted)


def _json_keys(path: str, wanted: str) -> list[str]:
    found: dict[str, None] = {}
    length = 0
    for _, row in _json_rows(path):
        if wanted in row:
            return list(row)
        if length < KEPT_KEYS:
            length += sum(len(key) for key in row if key not in found)
            found |= dict.fromkeys(row)
    return list(found)


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


def _check_known(place: str, columns: Columns, names: list[str]) -> None:
    for setting, column in columns.items():
        if column not in names:
            raise UserError(no_column_message(place, column, names, setting))
        if names.count(column) > 1:
            _warn_once(f"{place} has {names.count(column)} columns named {column}: the first is read")


def no_column_message(place: str, column: str, columns: list[str], setting: str = COLUMN) -> str:
    """The error message for a missing column, also where the setting that names it is not set."""
    if len(columns) == 1 and ";" in columns[0] and content_name(place).lower().endswith(".csv"):
        return f"{place} has one column, {columns[0]}: separate its cells by commas instead of semicolons"
    return f"{place} has no column {column}, it has {list_names(columns)}: give one as {setting}="


def list_names(names: list[str]) -> str:
    """Format at most 20 names for a message: a table may have thousands."""
    shown = ", ".join(map(str, names[:20])) or "none"
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown


def _json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of every row: its line number, or, in a .json file, its index from 1."""
    for number, row in _json_lines(path) if format_of(path) == "json lines" else enumerate(_json_values(path), 1):
        if not isinstance(row, dict):
            way_out = ", or name a file that is one array .json" if isinstance(row, list) else ""
            raise UserError(f"{path}:{number} is not a JSON object with a column of text: mend or remove it{way_out}")
        yield number, row


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as file:
        for number, line in bounds.numbered_lines(path, file):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error).partition(":")[0]
                raise UserError(f"{path}:{number} is not JSON ({reason}): mend or remove the line") from None


def _json_values(path: str) -> Iterator[Any]:
    with open_text(path, "utf-8-sig", "") as file:
        number = 0
        try:
            for value in values(file):
                number += 1
                yield value
        except UnicodeDecodeError:
            raise
        except bounds.TooLong:
            raise bounds.length_error(f"{path}, in its row {number + 1},") from None
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(":")[0]
            place = f" after row {number}" if number else ""
            raise UserError(f"{path} is not JSON{place} ({reason}): mend or exclude it") from None


def _json_cells(path: str, columns: Columns) -> Cells:
    for number, row in _json_rows(path):
        yield number, [row.get(column) for column in columns.values()]


def _csv_rows(path: str, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Rows, and the line that each ends in. A row may go over many lines, where a quote is open."""
    first = 1  # line of the row
    length = 0  # of the row so far

    def lines() -> Iterator[str]:
        nonlocal length
        while line := file.readline(bounds.MAX_LENGTH + 1 - length):
            length += len(line)
            if length > bounds.MAX_LENGTH:
                raise bounds.length_error(f"{path}, the row that begins in line {first},")
            yield line

    reader = csv.reader(lines(), strict=True, delimiter="\t" if content_name(path).lower().endswith(".tsv") else ",")
    try:
        for row in reader:
            length = 0
            first = reader.line_num + 1
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV ({error}): mend or exclude the file") from None


def _csv_cells(path: str, columns: Columns) -> Cells:
    with open_text(path, "utf-8-sig", "") as file:
        rows = _csv_rows(path, file)
        _, head = next(rows, (0, []))
        _check_known(path, columns, head)
        places = [head.index(column) for column in columns.values()]
        warn_of_tabs = content_name(path).lower().endswith(".tsv")
        for number, (line, row) in enumerate(rows, 1):
            if row and len(row) != len(head):
                raise UserError(
                    f"{path}, line {line}, row {number} after the head, has {len(row)} cells, the head has "
                    f"{len(head)}: mend the row"
                )
            if row:
                found = [row[place] for place in places]
                if warn_of_tabs:
                    warn_of_tabs = not _warns_of_tabs(f"{path}:{number}", columns, found)
                yield number, found


def _warns_of_tabs(place: str, columns: Columns, found: list[str]) -> bool:
    """Warn where a cell of a .tsv file has what separates cells. -> whether it did."""
    column = next(
        (column for column, cell in zip(columns.values(), found, strict=True) if set(cell) & set("\t\r\n")), None
    )
    if column is not None:
        _warn_once(
            f"{place} has tabs or line ends within quotes in column {column}, read as one cell: "
            "where a quote is text, double and enclose it, or give the table as .jsonl"
        )
    return column is not None


def _parquet_cells(path: str, columns: Columns) -> Cells:
    file, names = _open_parquet(path)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    _check_known(path, columns, names)
    for setting, column in columns.items():
        if leaves.count(column) > names.count(column):
            struct, _, field = column.partition(".")
            _warn_once(
                f"{path}: {setting}={column} reads the column of that name; the field {field} of the struct {struct} "
                f"is another text, which can be read from a file where it has a column of its own"
            )
    yield from _cells_of_batches(
        path, columns, file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns.values()))
    )


def _arrow_cells(path: str, columns: Columns) -> Cells:
    names, _ = _open_arrow(path)
    _check_known(path, columns, names)
    _, batches = _open_arrow(path, [names.index(column) for column in columns.values()])
    yield from _cells_of_batches(path, columns, batches)


def _cells_of_batches(path: str, columns: Columns, batches: Iterable) -> Cells:
    """Rows of Arrow record batches, which are read as they are taken."""
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches:
            # By name, not by place: of Parquet, columns=["a.text"] also selects the field text of a struct a.
            chosen = [batch.column(batch.schema.names.index(column)) for column in columns.values()]
            for found in zip(*chosen, strict=True):
                number += 1
                yield number, [cell.as_py() for cell in found]
    except UnicodeDecodeError:
        named = " or ".join(columns.values())
        raise UserError(
            f"{path}:{number} is not UTF-8 text in column {named}: mend the row, or exclude the file"
        ) from None
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged after row {number}: {_first_line(error)}: replace or exclude it") from None


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(line)


def _open_parquet(path: str) -> tuple[Any, list[str]]:
    """The file, and the names of its columns."""
    from pyarrow import ArrowException  # imported here: it takes a tenth of a second, and few have such files
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
        return file, file.schema_arrow.names
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Parquet file: {_first_line(error)}: replace or exclude it") from None


def _open_arrow(path: str, fields: list[int] | None = None) -> tuple[list[str], Iterator]:
    """The names of the columns, and the record batches, of an Arrow stream, as `datasets` writes it, or of an Arrow
    file, as Feather is. fields: places of the columns that are read; None: all."""
    from pyarrow import ArrowException, OSFile, ipc

    options = ipc.IpcReadOptions(included_fields=fields)
    try:
        file = OSFile(path)  # not a memory map: one of a file that is cut short kills the process
        begins_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(0)
        reader = ipc.open_file(file, options=options) if begins_file else ipc.open_stream(file, options=options)
        names = reader.schema.names
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not an Arrow file: {_first_line(error)}: replace or exclude it") from None
    batches = map(reader.get_batch, range(reader.num_record_batches)) if begins_file else iter(reader)
    return names, map(_checked, batches)


def _checked(batch):
    """Raises ArrowException for a damaged batch, whose offsets would be followed out of its memory."""
    batch.validate(full=True)
    return batch


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
