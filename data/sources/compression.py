"""Files compressed by gzip or zstd: told by their names, and read as what they hold, a block at a time."""

import io
import math
import os
from pathlib import Path
from typing import BinaryIO, TextIO

CODECS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {"gzip": (b"\x1f\x8b",), "zstd": (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")}  # the latter of pzstd
BLOCK_BYTES = 2**20  # decompressed at one time


def content_name(path: str) -> str:
    """The path without the suffix of a compression: it says what a file holds."""
    suffix = Path(path).suffix
    return path[: -len(suffix)] if suffix.lower() in CODECS else path


def open_bytes(path: str) -> BinaryIO:
    """Open a file for reading, compressed or not. Raises OSError, also for one that is named as compressed and is not;
    and for compressed data that is damaged or ends too early, where that is read."""
    codec = _codec_of(path)
    return Path(path).open("rb") if codec is None else io.BufferedReader(_Decompressed(path, codec), BLOCK_BYTES)


def open_text(path: str, encoding: str, newline: str | None) -> TextIO:
    """Open a text file, compressed or not, as `open` does."""
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=newline)


def _codec_of(path: str) -> str | None:
    """How a file is compressed, as its suffix says; an empty one is not. Raises OSError where it begins otherwise."""
    suffix = Path(path).suffix
    codec = CODECS.get(suffix.lower())
    if codec is None:
        return None
    with open(path, "rb") as file:
        head = file.read(4)
    if head and not head.startswith(MAGIC[codec]):
        raise OSError(f"it is named {suffix} and does not begin as {codec} data does: rename it without {suffix}")
    return codec if head else None


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. It seeks by decompressing: backwards from the beginning, and for the end all of
    it."""

    def __init__(self, path: str, codec: str):
        self.path = path
        self.codec = codec
        self.stream = None
        self._begin()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        try:
            content = self.stream.read(len(buffer))
        except OSError as error:
            raise OSError(
                f"its {self.codec} data is damaged or cut short ({error}): replace it or exclude it"
            ) from None
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            self._skip(math.inf)
        goal = offset if whence == os.SEEK_SET else self.at + offset
        if goal < self.at:
            self._begin()
        self._skip(goal - self.at)
        return self.at

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        super().close()

    def _skip(self, count: float) -> None:
        """Decompress so many bytes, fewer at the end."""
        block = memoryview(bytearray(BLOCK_BYTES))
        while count > 0 and (read := self.readinto(block[: min(count, BLOCK_BYTES)])):
            count -= read

    def _begin(self) -> None:
        import pyarrow as pa  # imported here: it takes a tenth of a second, and few have such files

        if not pa.Codec.is_available(self.codec):
            raise OSError(f"the installed pyarrow has no {self.codec}: decompress it")
        if self.stream is not None:
            self.stream.close()
        self.stream = pa.CompressedInputStream(pa.OSFile(self.path), self.codec)  # which closes the file, too
        self.at = 0
