"""The memory that the record batches of an Arrow file or stream will take, told from its messages before any is read.

Arrow allocates what a message asks for, and a batch that is compressed may ask for any amount. A message is FlatBuffers
metadata, which say how long the body after it is and where its buffers lie in it; a compressed buffer begins with its
length in memory. Source: Arrow's columnar format, section "Serialization and interprocess communication", with
Message.fbs and File.fbs.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self

ARROW_FILE = b"ARROW1"  # begins and ends an Arrow file, as Feather is; a stream begins otherwise
CONTINUATION = 0xFFFFFFFF  # begins a message since Arrow 0.15
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # of MessageHeader
BLOCK = struct.Struct("<qi4xq")  # of the footer: offset, bytes of metadata, bytes of the body


def largest_message(file: BinaryIO) -> int:
    """Bytes that the largest batch of the file takes in memory, all its columns counted. Where the file is damaged,
    those before the damage count, at which reading ends, too."""
    largest = 0
    try:
        file.seek(0)
        in_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        for start in _blocks(file) if in_file else [None]:
            _go(file, start or 0)
            for size in _sizes(file):
                largest = max(largest, size)
                if in_file:
                    break
    except struct.error:
        pass
    return largest


class _Table(NamedTuple):
    """A table of FlatBuffers."""

    content: bytes
    at: int

    @classmethod
    def root(cls, content: bytes) -> Self:
        return cls(content, _read(content, "<I", 0))

    def place(self, field: int) -> int | None:
        """Where the value of a field stands; None where it is left out."""
        layout = self.at - _read(self.content, "<i", self.at)
        entry = 4 + 2 * field
        offset = _read(self.content, "<H", layout + entry) if entry < _read(self.content, "<H", layout) else 0
        return self.at + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        place = self.place(field)
        return 0 if place is None else _read(self.content, kind, place)

    def table(self, field: int) -> Self:
        return self._replace(at=self._target(field))

    def structs(self, field: int, kind: struct.Struct) -> Iterator[tuple[int, ...]]:
        start = self._target(field)
        count = _read(self.content, "<I", start)
        return kind.iter_unpack(self.content[start + 4 : start + 4 + count * kind.size])

    def _target(self, field: int) -> int:
        place = self.place(field)
        if place is None:
            raise struct.error("a field is left out")
        return place + _read(self.content, "<I", place)


def _read(content: bytes, kind: str, at: int) -> int:
    if at < 0:
        raise struct.error("an offset leads out of the metadata")
    return struct.unpack_from(kind, content, at)[0]


def _go(file: BinaryIO, place: int) -> None:
    if not 0 <= place <= file.seek(0, os.SEEK_END):
        raise struct.error("a place is not in the file")
    file.seek(place)


def _blocks(file: BinaryIO) -> list[int]:
    """Where the batches of an Arrow file begin, as its footer says."""
    end = file.seek(0, os.SEEK_END) - len(ARROW_FILE) - 4
    _go(file, end)
    length = _read(file.read(4), "<I", 0)
    _go(file, end - length)
    footer = _Table.root(file.read(length))
    vectors = [footer.structs(field, BLOCK) for field in (2, 3) if footer.place(field) is not None]
    return [start for vector in vectors for start, *_ in vector]


def _sizes(file: BinaryIO) -> Iterator[int]:
    """The bytes that each message from here takes, without reading its body."""
    while len(begin := file.read(4)) == 4:
        length = _read(begin, "<I", 0)
        if length == CONTINUATION:
            length = _read(file.read(4), "<I", 0)
        if not length:
            return
        message = _Table.root(file.read(length))
        body = file.tell()
        body_length = message.number(3, "<q")
        if body_length < 0:
            raise struct.error("a body of no length")
        yield max(body_length, _in_memory(file, message, body))
        _go(file, body + body_length)


def _in_memory(file: BinaryIO, message: _Table, body: int) -> int:
    """Bytes of the buffers of a compressed batch; 0 for what is not compressed."""
    kind = message.number(1, "<B")
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
        return 0
    batch = message.table(2) if kind == RECORD_BATCH else message.table(2).table(1)
    if batch.place(3) is None:
        return 0
    total = 0
    for offset, length in batch.structs(2, struct.Struct("<qq")):
        if length:
            _go(file, body + offset)
            stated = _read(file.read(8), "<q", 0)
            total += max(stated, length)  # -1 for a buffer that is left as it was
    return total
