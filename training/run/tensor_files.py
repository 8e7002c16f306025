"""Tensors in safetensors files: whole in one file, or divided among files that several processes wrote together.

PyTorch's distributed checkpoints (DCP) plan who writes what, and write it, as <folder>/shard-00001-*.safetensors and so
on, each with the places of its rows in the header. They leave no pickled .metadata, and PyTorch's own
HuggingFaceStorageReader can read them.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from common.atomic_io import open_regular
from common.errors import reason
from common.settings import FrozenSettings
from runtime.precision import Shard
from runtime.world import ONE, World

OTHER = "it is not what the manifest says was written"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
MAX_HEADER_BYTES = 2**26
BLOCK = 2**20  # bytes that are read at one time of what is not kept
T = TypeVar("T")
PIECES = "DCP_SHARDING_INFO"  # in a header's metadata: where in the whole each tensor of the file begins


class FileMark(FrozenSettings):
    size: int = Field(ge=0)  # bytes
    sha256: str


class Share(NamedTuple):
    """What a process keeps of the tensors that it reads, together with others."""

    world: World = ONE
    divided: Mapping[str, slice] = {}  # its rows of the parameters that are divided; of all else it keeps everything

    def rows(self, key: str) -> slice:
        """Of a parameter, or of its optimizer state, "<parameter>/<state>"."""
        return self.divided.get(key.rpartition("/")[0] or key, slice(None))

    def checks(self, file: int) -> bool:
        """Whether it is this process that compares the hash of a file, by its place among all: of those that several
        wrote the one that it wrote itself, where there are as many as then."""
        return not self.divided or file % self.world.size == self.world.rank


WHOLE = Share()


class Piece(NamedTuple):
    """Some rows of a tensor, from `start` on."""

    rows: Tensor
    start: int
    shape: torch.Size  # of the whole

    @classmethod
    def of(cls, shard: Shard, stored_rows: int | None = None) -> "Piece":
        """What a process holds of a tensor, of which only the first `stored_rows` are stored."""
        rows, local = shard.rows(), shard.local.detach()
        shape = shard.shape if stored_rows is None else torch.Size((stored_rows, *shard.shape[1:]))
        return cls(local[: max(0, shape[0] - rows.start)], min(rows.start, shape[0]), shape)

    def __create_write_items__(self, name: str, _object: Any) -> list[Any]:  # DCP asks for it
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not len(self.rows):
            return []
        offsets = torch.Size((self.start, *[0] * (len(self.shape) - 1)))
        chunk = ChunkStorageMetadata(offsets, self.rows.shape)
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.rows), self.shape)
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


def together(world: World, action: Callable[[], T], kind: type[Exception] = OSError) -> T:
    """Call action() in all processes -> its result. An error of this kind, OSError or UserError, that it raises in one
    is raised in all of them."""
    if world.size == 1:
        return action()
    result, fault = None, None
    try:
        result = action()
    except kind as error:
        fault = (type(error), (str(error),))
        if isinstance(error, OSError):
            fault = (OSError, (error.errno or errno.EIO, f"process {world.rank}: {reason(error)}"))
    for found in world.gathered(fault):
        if found is not None:
            raised, given = found
            raise raised(*given)
    return result


def write_pieces(folder: Path, tensors: Mapping[str, Tensor | Piece], world: World) -> dict[str, FileMark]:
    """Write tensors into a folder that is there, every process its pieces; of what all have whole, each is written by
    one. Call it in all processes -> the marks of the file that this one wrote, if any. Raises OSError in all of them
    where one of them cannot write."""
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    class Planner(DefaultSavePlanner):
        def lookup_object(self, index: Any) -> Any:
            found = self.state_dict[index.fqn]
            return found.rows if isinstance(found, Piece) else super().lookup_object(index)

    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    contiguous = {
        name: tensor._replace(rows=tensor.rows.cpu().contiguous()) if isinstance(tensor, Piece) else tensor.cpu()
        for name, tensor in tensors.items()
    }
    try:
        planner = Planner(flatten_state_dict=False)
        save(contiguous, storage_writer=writer, planner=planner, process_group=world.control)
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        if not isinstance(fault, OSError):
            raise
        raise OSError(fault.errno or errno.EIO, f"process {rank}: {reason(fault)}") from None
    mine = folder.glob(f"shard-{world.rank + 1:05d}-*.safetensors")
    return {f"{folder.name}/{file.name}": _mark(file) for file in mine}


def _mark(file: Path) -> FileMark:
    with open(file, "rb") as content:
        return FileMark(size=file.stat().st_size, sha256=hashlib.file_digest(content, "sha256").hexdigest())


class BadFile(Exception):
    """A file is not what was written. `file`: which."""

    def __init__(self, file: Path, fault: object):
        super().__init__(f"{file} is damaged: {fault}")


class _Part(NamedTuple):
    """A tensor in a file, or some rows of one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first row in the whole

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_tensors(files: Sequence[tuple[Path, FileMark]], share: Share = WHOLE) -> dict[str, Tensor]:
    """Read files that hold tensors, or pieces that make them whole, straight into memory of their own: no map of a
    file, which whoever overwrites it would change, and no copy of its content. Raises OSError, and BadFile; where
    several processes keep shares, of a file that is not what was written in one of them."""
    headers = [_read(file, mark, _header) for file, mark in files]
    stated = _stated(files, headers)
    tensors = {name: _room(tensor, share.rows(name)) for name, tensor in stated.items()}
    for i, ((file, mark), parts) in enumerate(zip(files, headers, strict=True)):
        fill = functools.partial(_fill, parts=parts, tensors=tensors, share=share, checked=share.checks(i))
        _read(file, mark, fill)
    return tensors


def kept_bytes(files: Sequence[tuple[Path, FileMark]], share: Share) -> int:
    """Of memory, what `read_tensors` takes for its result. Raises what that raises."""
    tensors = stated_tensors(files).items()
    return sum(math.prod(_kept_shape(one, share.rows(name))) * one.dtype.itemsize for name, one in tensors)


def _room(stated: Tensor, rows: slice) -> Tensor:
    """Memory for some rows of a meta tensor. (torch.empty_like of it imports SymPy.)"""
    return torch.empty(_kept_shape(stated, rows), dtype=stated.dtype)


def _kept_shape(stated: Tensor, rows: slice) -> tuple[int, ...]:
    first = [] if stated.ndim == 0 else [len(range(*rows.indices(len(stated))))]
    return (*first, *stated.shape[1:])


def stated_tensors(files: Sequence[tuple[Path, FileMark]]) -> dict[str, Tensor]:
    """Read the headers alone -> meta tensors, as `read_tensors` would return. Raises what that raises."""
    return _stated(files, [_read(file, mark, _header) for file, mark in files])


def _read(file: Path, mark: FileMark, take: Callable[[BinaryIO, FileMark], T]) -> T:
    """take(the open file, its mark) -> its result."""
    with open_regular(file) as content:
        try:
            return take(content, mark)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise BadFile(file, error or type(error).__name__) from None


def _header(content: BinaryIO, mark: FileMark) -> dict[str, _Part]:
    """The tensors in a file, in the order in which they lie there."""
    if os.fstat(content.fileno()).st_size != mark.size:
        raise ValueError(OTHER)
    length = int.from_bytes(content.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, mark.size - 8):
        raise ValueError("it is no safetensors file")
    header = json.loads(content.read(length))
    starts = json.loads((header.pop("__metadata__", None) or {}).get(PIECES, "{}"))
    parts, end = {}, 0
    for name, stated in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, *others = starts.get(name, {}).get("saved_offsets") or [0]
        parts[name] = part = _Part(DTYPES[stated["dtype"]], tuple(stated["shape"]), start)
        if not all(type(number) is int for number in (*part.shape, start)):
            raise ValueError(f"{name} has a shape of no whole numbers")
        begin, end = end, end + part.size * part.dtype.itemsize
        if stated["data_offsets"] != [begin, end] or min(*part.shape, start, 0) < 0 or any(others):
            raise ValueError(f"{name} is not where its header says")
    if 8 + length + end != mark.size:
        raise ValueError("its header does not state its size")
    return parts


def _stated(files: Sequence[tuple[Path, FileMark]], headers: Sequence[Mapping[str, _Part]]) -> dict[str, Tensor]:
    """The whole of the tensors that there are parts of, on the meta device."""
    parts: dict[str, list[_Part]] = {}
    for header in headers:
        for name, part in header.items():
            parts.setdefault(name, []).append(part)
    found = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda part: part.start)
        first = pieces[0]
        rows = [max(part.start + part.shape[0] for part in pieces if part.shape)] if first.shape else []
        shape = (*rows, *first.shape[1:])
        alike = all((part.dtype, part.shape[1:]) == (first.dtype, first.shape[1:]) for part in pieces)
        ends = [0, *(part.start + part.shape[0] for part in pieces if part.shape)]
        adjoin = all(part.start == end for part, end in zip(pieces, ends, strict=False))
        if not alike or not adjoin or sum(part.size for part in pieces) != math.prod(shape):
            raise BadFile(files[0][0].parent, f"its files do not make {name} whole")
        found[name] = torch.empty(shape, dtype=first.dtype, device="meta")
    return found


def _fill(
    content: BinaryIO,
    mark: FileMark,
    parts: Mapping[str, _Part],
    tensors: Mapping[str, Tensor],
    share: Share,
    checked: bool,
) -> None:
    """Read what is kept of a file's parts into their tensors; all else is read too where its hash is compared."""
    digest = hashlib.sha256()
    length = content.read(8)
    digest.update(length + content.read(int.from_bytes(length, "little")))
    for name, part in parts.items():
        kept, before, behind = _kept(part, tensors[name], share.rows(name))
        _pass_over(content, before, digest, checked)
        numbers = memoryview(kept.reshape(-1).view(torch.uint8).numpy()) if kept.numel() else memoryview(bytearray())
        if content.readinto(numbers) != len(numbers):
            raise ValueError(OTHER)
        if checked:
            digest.update(numbers)
        _pass_over(content, behind, digest, checked)
    if checked and (content.read(1) or digest.hexdigest() != mark.sha256):
        raise ValueError(OTHER)


def _kept(part: _Part, tensor: Tensor, rows: slice) -> tuple[Tensor, int, int]:
    """Where to put what is kept of a part: in some rows of the tensor; and how many bytes of the part lie before that
    and behind it. rows: of the whole, which the tensor has."""
    if not part.shape:
        return tensor, 0, 0
    origin = rows.start or 0
    first, last = (min(max(row, origin), origin + len(tensor)) for row in (part.start, part.start + part.shape[0]))
    row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
    kept = tensor[first - origin : last - origin]
    before = (first - part.start) * row_bytes if len(kept) else 0
    return kept, before, part.size * part.dtype.itemsize - before - len(kept) * row_bytes


def _pass_over(content: BinaryIO, count: int, digest: Any, read: bool) -> None:
    """Go on by so many bytes, which the digest learns of where they are to be read."""
    if not read:
        content.seek(count, os.SEEK_CUR)
        return
    while count:
        block = content.read(min(count, BLOCK))
        if not block:
            raise ValueError(OTHER)
        digest.update(block)
        count -= len(block)
