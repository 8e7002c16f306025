"""Token files: a header with a checksum, then the tokens.

0    8   16                4096
| magic | header length | header (JSON), zero-padded | tokens, little-endian ... |
"""

import bisect
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.atomic_io import names_in, open_regular, read_at
from common.checksummed_json import parse_verified, with_checksum
from common.errors import UserError, reason

MAGIC = b"HEADROOM"
VERSION = 3
HEADER_BYTES = 4096
SHARD_TOKENS = 2**27  # tokens per file
VERIFY_TOKENS = 2**22  # read at one time to verify
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


class ShardWriter:
    """Writes `<folder>/<split>_00000.tokens`, `..._00001.tokens`, and so on; `after`: continues after
    so many shards of so many tokens together."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: type,
        tokenizer_hash: str,
        shard_tokens: int = SHARD_TOKENS,
        after: tuple[int, int] = (0, 0),
    ):
        self.folder = folder
        self.split = split
        self.dtype = np.dtype(dtype)
        self.tokenizer_hash = tokenizer_hash
        self.shard_tokens = shard_tokens
        self.shards, self.total = after
        self._open()

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.written == self.shard_tokens:
                self._finish(last=False)
                self._open()
            part = tokens[: self.shard_tokens - self.written].astype(self.dtype.newbyteorder("<"))
            self.file.write(part.tobytes())
            self.digest.update(part.tobytes())
            self.written += len(part)
            self.total += len(part)
            tokens = tokens[len(part) :]

    def close(self, last: bool = True) -> None:
        """Finish the current shard. last: the stream ends here."""
        self._finish(last)

    def _finish(self, last: bool) -> None:
        header = {
            "version": VERSION,
            "name": _file_name(self.split, self.shards),
            "dtype": self.dtype.name,
            "tokens": self.written,
            "end": self.total,  # of the stream, after this shard
            "last": last,
            "tokenizer": self.tokenizer_hash,
            "sha256": self.digest.hexdigest(),
        }
        encoded = with_checksum(header).encode()
        self.file.seek(0)
        self.file.write(MAGIC + len(encoded).to_bytes(8, "little") + encoded)
        self.file.close()
        self.shards += 1

    def _open(self) -> None:
        self.file = open(self.folder / _file_name(self.split, self.shards), "xb")  # noqa: SIM115
        self.file.write(bytes(HEADER_BYTES))
        self.digest = hashlib.sha256()
        self.written = 0


class Shard:
    """The tokens of one file, sliced like an array.

    They are read from an open file, not from a memory map: a map of a file that is cut short kills the process. Threads
    may read at the same time: where one reads is no state of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open_regular(path)
            self.opened = self._signature()
            head = self.file.read(HEADER_BYTES)
        except OSError as error:
            raise UserError(f"the shard {path} cannot be read: {reason(error)}") from None
        self.header = _read_header(path, head, self.opened[0])
        self.dtype = np.dtype(DTYPES[self.header["dtype"]])

    def __len__(self) -> int:
        return self.header["tokens"]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens start ... stop - 1, fewer at the end. Raises UserError where they cannot be read, or have changed."""
        place, count = self._bytes(part)
        try:
            content = read_at(self.file.fileno(), place, count)
            unchanged = self._signature() == self.opened
        except OSError as error:
            raise UserError(
                f"the shard {self.path} cannot be read: {reason(error)}; what was saved stands: make it readable, "
                "then go on"
            ) from None
        if len(content) != count or not unchanged:
            raise UserError(f"{self.path} has changed while it was in use: {_rebuild(self.path)}")
        return np.frombuffer(content, self.dtype)

    def announce(self, part: slice) -> None:
        """Have the system begin to read a slice from the disk, without waiting for it."""
        if sys.platform == "linux":
            with suppress(OSError):  # a hint; what cannot be read is said where it is read
                os.posix_fadvise(self.file.fileno(), *self._bytes(part), os.POSIX_FADV_WILLNEED)

    def verify(self) -> None:
        """Raises UserError where the tokens are not those that were written."""
        found = hashlib.sha256()
        for start in range(0, len(self), VERIFY_TOKENS):
            found.update(self[start : start + VERIFY_TOKENS])
        if found.hexdigest() != self.header["sha256"]:
            raise UserError(f"{self.path} is damaged: its tokens do not match their checksum: {_rebuild(self.path)}")

    def _bytes(self, part: slice) -> tuple[int, int]:
        """Where a slice begins in the file, and its number of bytes."""
        start, stop, _ = part.indices(len(self))
        return HEADER_BYTES + start * self.dtype.itemsize, max(0, stop - start) * self.dtype.itemsize

    def _signature(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns


def _file_name(split: str, number: int) -> str:
    return f"{split}_{number:05d}.tokens"


def _rebuild(path: Path) -> str:
    return f"delete the folder {path.parent} and run again to rebuild it"


def _read_header(path: Path, head: bytes, size: int) -> dict[str, Any]:
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise UserError(f"{path} is not a shard, or its header is damaged: {_rebuild(path)}")
    try:
        header = parse_verified(head[16 : 16 + int.from_bytes(head[8:16], "little")].decode())
        if header["version"] != VERSION:
            raise UserError(
                f"{path} has format version {header['version']}, this program reads {VERSION}: {_rebuild(path)}"
            )
        name = header["name"]
        expected = HEADER_BYTES + header["tokens"] * np.dtype(DTYPES[header["dtype"]]).itemsize
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has a damaged header: {_rebuild(path)}") from None
    if name != path.name:
        raise UserError(f"{path} holds what was written as {name}: {_rebuild(path)}")
    if size != expected:
        raise UserError(f"{path} is {size} bytes, its header promises {expected}: {_rebuild(path)}")
    return header


def open_shard(path: Path, tokenizer_hash: str) -> Shard:
    """Open and verify a shard. Raises UserError for a damaged file, and for one written with another tokenizer."""
    shard = Shard(path)
    written_by = shard.header["tokenizer"]
    if written_by != tokenizer_hash:
        raise UserError(
            f"{path} was written with another tokenizer ({written_by[:12]}) than the one given ({tokenizer_hash[:12]})"
        )
    shard.verify()
    return shard


Piece = tuple[Shard | np.ndarray, slice]  # of a shard


class TokenStream:
    """Several shards as one sequence of tokens.

    counted: a sequence as long, 1 for each token that is counted where it is predicted, 0 for those of prompts; None:
    all are.
    """

    def __init__(self, shards: Sequence[Shard | np.ndarray], counted: Self | None = None):
        self.shards = shards
        self.counted = counted
        self.ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Read (count,) tokens from `start`, across shards."""
        return _joined(self._pieces(start, count))

    def read_each(self, starts: Iterable[int], count: int) -> Iterator[np.ndarray]:
        """Read (count,) tokens from each start. The system is told of all of them first, so that a disk reads many at
        the same time, in place of one after the other."""
        pieces = [list(self._pieces(start, count)) for start in starts]
        for shard, part in itertools.chain.from_iterable(pieces):
            if isinstance(shard, Shard):
                shard.announce(part)
        return map(_joined, pieces)

    def _pieces(self, start: int, count: int) -> Iterator[Piece]:
        """Where `count` tokens from `start` stand, which may be in several shards."""
        number = bisect.bisect_right(self.ends, start)
        offset = start - (self.ends[number - 1] if number else 0)
        while count:
            shard = self.shards[number]
            part = slice(offset, min(offset + count, len(shard)))
            yield shard, part
            count -= part.stop - part.start
            number += 1
            offset = 0


def _joined(pieces: Iterable[Piece]) -> np.ndarray:
    """Read pieces as one array."""
    read = [shard[part] for shard, part in pieces]
    return read[0] if len(read) == 1 else np.concatenate(read)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in their order. Raises OSError where the folder cannot be read."""
    names = names_in(folder)
    return [folder / name for name in names if name.startswith(f"{split}_") and name.endswith(".tokens")]


def counted_name(split: str) -> str:
    """The name of the shards that say which tokens of a split are counted."""
    return f"counted_{split}"


def open_stream(folder: Path, split: str, tokenizer_hash: str, has_prompts: bool = False) -> TokenStream:
    """Open all shards of a split. Raises UserError where there is none, or one is damaged."""
    counted = open_stream(folder, counted_name(split), tokenizer_hash) if has_prompts else None
    try:
        paths = shard_paths(folder, split)
    except OSError as error:
        raise UserError(f"the shards in {folder} cannot be read: {reason(error)}") from None
    if not paths:
        raise UserError(f"{folder} holds no {split} shard: {_rebuild(folder / split)}")
    shards = []
    total = 0
    for path in paths:
        shard = open_shard(path, tokenizer_hash)
        total += len(shard)
        if shard.header["end"] != total:
            raise UserError(f"a shard before {path} is missing: {_rebuild(path)}")
        shards.append(shard)
    if not shards[-1].header["last"]:
        raise UserError(f"a shard after {paths[-1]} is missing: {_rebuild(paths[-1])}")
    if counted is not None and len(counted) != total:
        raise UserError(f"{folder} says of {len(counted)} of {total} {split} tokens what counts: {_rebuild(paths[0])}")
    return TokenStream(shards, counted)
