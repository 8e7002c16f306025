"""Memory: how much there is, how much was used, and how much a piece of code uses.

Limits are those of a control group of Linux, too: containers and batch systems set them, and beyond one the kernel
kills the process, however much the machine has free.
"""

import itertools
import json
import re
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from runtime.precision import multiplies_bf16

# Of version 2 and 1: limit, usage, and which line of memory.stat says how much of it are files kept for convenience.
UNIFIED = ("memory.max", "memory.current", "inactive_file")
LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def peak_memory(device: torch.device) -> int | None:
    """Bytes, without waiting for the device: the most that tensors took on a GPU so far; elsewhere, the most that the
    process took, PyTorch and all. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated now; on a CPU, of what the machine has and the process may take. None where the
    system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    stated = [_available(), memory_left()]
    return min((number for number in stated if number is not None), default=None)


def _available() -> int | None:
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest of the groups leaves which this process is in, one within the other. None where none
    states a limit. A group that is not to be seen from within a container is where its files begin."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        group = PurePosixPath(path)
        for place in (group, *group.parents):
            if not controllers:
                left.append(_left(root / "sys/fs/cgroup" / place.relative_to("/"), *UNIFIED))
            elif "memory" in controllers.split(","):
                left.append(_left(root / "sys/fs/cgroup/memory" / place.relative_to("/"), *LEGACY))
    return min((number for number in left if number is not None), default=None)


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return max(0, allowed - used + int(counts.get(reclaimable, 0)))


def allocated_peak(run: Callable[[], Any]) -> int:
    """Measure the peak of PyTorch's CPU allocator during run() -> bytes, beyond what was allocated before. Buffers that
    kernels allocate for themselves count; the profiler slows them down a little."""
    from torch.profiler import ProfilerActivity, profile  # not with this module: it takes long to import

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    return max(itertools.accumulate(changes), default=0)


class PeakTensorBytes(TorchDispatchMode):
    """Within its `with` block: `bytes`, the most that the storages of tensors made there took at one time. Around code
    that runs on fake tensors it predicts what the same code holds on real ones. It sees what operators return, and
    storages that are resized, as those are that FSDP gathers into; not what a kernel allocates and frees within itself,
    but for `_sums_of`, nor what an allocator wastes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.alive = 0
        self._sizes: dict[int, int] = {}  # of the storages there are

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # which no operator does, so no mode sees it
            result = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*raised)

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        sums = _sums_of(operator, result)
        self.alive += sums
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                for one in _with_storage(tensor):
                    self.count(one.untyped_storage())
        self.alive -= sums
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Called with the storage of each tensor that an operator returns; `alive` are the bytes there are now."""
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self._resized(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def _resized(self, key: int, size: int) -> None:
        self.alive += size - self._sizes[key]
        self._sizes[key] = size
        self.bytes = max(self.bytes, self.alive)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def _with_storage(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those that it wraps, as a DTensor does, which has none of its own memory."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    wrapped = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [one for one in wrapped if isinstance(one, Tensor)]


def _sums_of(operator: Any, result: Any) -> int:
    """Bytes that a matrix product takes for a moment: oneDNN, on a processor with AVX-512 and no bfloat16, keeps all
    sums of bfloat16 products in float32."""
    product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    if not product or result.dtype != torch.bfloat16 or result.device.type != "cpu":
        return 0
    imitated = torch.backends.cpu.get_cpu_capability() == "AVX512" and not multiplies_bf16(result.device)
    return result.numel() * torch.float32.itemsize if imitated else 0
