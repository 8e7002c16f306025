"""Token files: a header that is checked, then the tokens, memory-mapped.

0    8   16                4096
| magic | header length | header (JSON), zero-padded | tokens, little-endian ... |
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError

MAGIC = b"HEADROOM"
VERSION = 2
HEADER_BYTES = 4096
SHARD_TOKENS = 2**27  # tokens per file


class ShardWriter:
    """Writes `<folder>/<split>_00000.tokens`, `..._00001.tokens`, and so on."""

    def __init__(self, folder: Path, split: str, dtype: type, tokenizer_hash: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.dtype, self.tokenizer_hash = folder, split, np.dtype(dtype), tokenizer_hash
        self.shard_tokens = shard_tokens
        self.shards, self.total = 0, 0
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

    def close(self) -> None:
        self._finish(last=True)

    def _finish(self, last: bool) -> None:
        header = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "tokens": self.written,
            "end": self.total,  # of the stream, after this shard
            "last": last,
            "tokenizer": self.tokenizer_hash,
            "sha256": self.digest.hexdigest(),
        }
        encoded = json.dumps(header).encode()
        self.file.seek(0)
        self.file.write(MAGIC + len(encoded).to_bytes(8, "little") + encoded)
        self.file.close()
        self.shards += 1

    def _open(self) -> None:
        self.file = open(self.folder / f"{self.split}_{self.shards:05d}.tokens", "xb")  # noqa: SIM115
        self.file.write(bytes(HEADER_BYTES))
        self.digest, self.written = hashlib.sha256(), 0


def open_shard(path: Path, tokenizer_hash: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(n,) tokens, mapped read-only, and the header. Raises UserError for a file not whole or of another tokenizer."""
    way_out = f"delete the folder {path.parent} and run again to rebuild it"
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from None
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise UserError(f"{path} is not a shard, or its header is damaged: {way_out}")
    try:
        header = json.loads(head[16 : 16 + int.from_bytes(head[8:16], "little")])
        if header["version"] != VERSION:
            raise UserError(f"{path} has format version {header['version']}, this program reads {VERSION}: {way_out}")
        tokens, checksum = int(header["tokens"]), header["sha256"]
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[header["dtype"]])
        written_by, _ = header["tokenizer"], (header["end"], header["last"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has a damaged header: {way_out}") from None
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} is {size} bytes, its header promises {expected}: {way_out}")
    if written_by != tokenizer_hash:
        raise UserError(
            f"{path} was written with another tokenizer ({written_by[:12]}) than the one given ({tokenizer_hash[:12]})"
        )
    if tokens == 0:
        return np.array([], dtype), header
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))
    if hashlib.sha256(mapped).hexdigest() != checksum:
        raise UserError(f"{path} is damaged: its tokens do not match their checksum: {way_out}")
    return mapped, header


class TokenStream:
    """Several shards as one sequence of tokens."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) tokens from `start`, across shards."""
        parts = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        offset = start - (int(self.ends[shard]) - len(self.shards[shard]))
        while count:
            part = self.shards[shard][offset : offset + count]
            parts.append(part)
            count -= len(part)
            shard, offset = shard + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_stream(folder: Path, split: str, tokenizer_hash: str) -> TokenStream:
    """All shards of a split. Raises UserError where there is none, or one is damaged."""
    paths = sorted(folder.glob(f"{split}_*.tokens"))
    if not paths:
        raise UserError(f"{folder} holds no {split} shard: delete the folder and run again to rebuild it")
    shards, total, last = [], 0, False
    for path in paths:
        tokens, header = open_shard(path, tokenizer_hash)
        total, last = total + len(tokens), header["last"]
        if header["end"] != total:
            raise UserError(f"a shard before {path} is missing: delete the folder {folder} and run again to rebuild it")
        shards.append(tokens)
    if not last:
        raise UserError(f"a shard after {paths[-1]} is missing: delete the folder {folder} and run again to rebuild it")
    return TokenStream(shards)
