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
from runtime.world import World

OTHER = "it is not what the manifest says was written"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
MAX_HEADER_BYTES = 2**26
T = TypeVar("T")
PIECES = "DCP_SHARDING_INFO"  # in a header's metadata: where in the whole each tensor of the file begins


class FileMark(FrozenSettings):
    size: int = Field(ge=0)  # bytes
    sha256: str


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


def together(world: World, action: Callable[[], T]) -> T:
    """Call action() -> its result. An OSError that it raises in one process is raised in all of them."""
    if world.size == 1:
        return action()
    result, fault = None, None
    try:
        result = action()
    except OSError as error:
        fault = (error.errno or errno.EIO, f"process {world.rank}: {reason(error)}")
    faults = [one for one in world.gathered(fault) if one is not None]
    if faults:
        raise OSError(*faults[0])
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


def read_tensors(files: Sequence[tuple[Path, FileMark]]) -> dict[str, Tensor]:
    """Read files that hold tensors, or pieces that make them whole, straight into memory of their own: no map of a
    file, which whoever overwrites it would change, and no copy of its content. Raises OSError, and BadFile."""
    headers = [_read(file, mark, _header) for file, mark in files]
    tensors = _allocated(files, headers, torch.device("cpu"))
    for (file, mark), parts in zip(files, headers, strict=True):
        _read(file, mark, functools.partial(_fill, parts=parts, tensors=tensors))
    return tensors


def stated_tensors(files: Sequence[tuple[Path, FileMark]]) -> dict[str, Tensor]:
    """Read the headers alone -> meta tensors, as `read_tensors` would return. Raises what that raises."""
    return _allocated(files, [_read(file, mark, _header) for file, mark in files], torch.device("meta"))


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


def _allocated(
    files: Sequence[tuple[Path, FileMark]], headers: Sequence[Mapping[str, _Part]], device: torch.device
) -> dict[str, Tensor]:
    """Memory for the whole of the tensors that there are parts of."""
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
        found[name] = torch.empty(shape, dtype=first.dtype, device=device)
    return found


def _fill(content: BinaryIO, mark: FileMark, parts: Mapping[str, _Part], tensors: Mapping[str, Tensor]) -> None:
    """Read the parts of a file into their tensors."""
    length = content.read(8)
    digest = hashlib.sha256(length + content.read(int.from_bytes(length, "little")))
    for name, part in parts.items():
        target = tensors[name][part.start :][: part.shape[0]] if part.shape else tensors[name]
        numbers = memoryview(target.reshape(-1).view(torch.uint8).numpy()) if part.size else memoryview(bytearray())
        if content.readinto(numbers) != len(numbers):
            raise ValueError(OTHER)
        digest.update(numbers)
    if content.read(1) or digest.hexdigest() != mark.sha256:
        raise ValueError(OTHER)
