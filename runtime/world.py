"""World: the processes that train one run together, and what they tell each other."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
BUCKET = 2**23  # numbers that are summed at one time: 32 MB of float32
T = TypeVar("T")


class World:
    """A process by itself: what several would add up or tell each other is its own."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def total(self, number: Tensor) -> Tensor:
        """The sum of the processes' tensors, of equal shape."""
        return number

    def largest(self, number: Tensor) -> Tensor:
        """The elementwise maximum of the processes' tensors, of equal shape."""
        return number

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, which every process has in the same order, by their sums over the processes."""

    def agreed(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each that any process gives. Waits for no device."""
        return numbers

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        return [value]

    def from_first(self, value: T) -> T:
        """The value that the first process gives; what the others give is ignored."""
        return value

    def exchanged(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send each process a vector, `outgoing` by rank -> those that came, by rank, of these sizes."""
        return list(outgoing)

    def reached(self, step: int) -> None:
        """Note the step that this process begins, by which one that hangs is named."""

    def trains_in(self, folder: Path) -> None:
        """Note the run's folder, by which processes that are started again go on with it."""


ONE = World()


class ProcessGroup(World):
    """The processes of torch.distributed's default group. Tensors travel by the device's backend; `agreed`, `gathered`
    and `from_first` by gloo, on the CPU."""

    def __init__(self, device: torch.device = CPU, timeout: datetime.timedelta | None = None):
        """device: of the parameters. timeout: as the group was made with."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        talks_by_gloo = dist.get_backend_config() == "cpu:gloo"
        self.control = dist.group.WORLD if talks_by_gloo else dist.new_group(timeout=timeout, backend="gloo")

    def total(self, number: Tensor) -> Tensor:
        return self._reduced(number, dist.ReduceOp.SUM)

    def largest(self, number: Tensor) -> Tensor:
        return self._reduced(number, dist.ReduceOp.MAX)

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        for bucket in _buckets(list(tensors)):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            summed = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(tensor) for piece, tensor in zip(summed, bucket, strict=True)])

    def agreed(self, *numbers: int) -> tuple[int, ...]:
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return tuple(largest.tolist())

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: T) -> T:
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def exchanged(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        sent = torch.cat(list(outgoing))
        came = sent.new_empty(sum(sizes))
        dist.all_to_all_single(came, sent, list(sizes), [len(piece) for piece in outgoing])
        return list(came.split(list(sizes)))

    def mesh(self) -> Any:
        """A DeviceMesh of all processes in a row, as FSDP takes them."""
        return dist.init_device_mesh(self.device.type, (self.size,))

    def _reduced(self, number: Tensor, operation: dist.ReduceOp) -> Tensor:
        reduced = number.clone()
        dist.all_reduce(reduced, operation)
        return reduced


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in their order, so many at a time that they have BUCKET numbers at most, or are one."""
    bucket, numbers = [], 0
    for tensor in tensors:
        if bucket and (numbers + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket
