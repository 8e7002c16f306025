"""Choice of the device, and of deterministic algorithms."""

import logging
import os
import re

import torch

from common.errors import UserError
from common.experimental import warn_experimental
from runtime.fast_startup import use_deterministic_algorithms

log = logging.getLogger("headroom")
DEFAULT_THREADS = torch.get_num_threads()  # as PyTorch chose when this process started


def choose_device(device: str, local_rank: int | None = None) -> torch.device:
    """Choose the device: `auto` is a GPU where CUDA finds one, else the CPU. Raises UserError for a device this machine
    lacks. local_rank: of several processes on this machine, each of which takes a GPU of its own."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", device):
        raise UserError(f"device={device}: choose auto, cpu, cuda, cuda:1 (or another number) or mps")
    chosen = torch.device(device) if local_rank is None else _own_device(device, local_rank)
    if chosen.type == "cuda":
        _check_cuda(device, chosen.index or 0)
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps: PyTorch finds no Metal device here: choose device=cpu or auto")
        warn_experimental("device=mps")
    return chosen


def _own_device(device: str, local_rank: int) -> torch.device:
    """The device of one of several processes on this machine."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device} is one device, and several processes need one each: choose cuda, cpu or auto")
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if chosen.type == "cuda":
        _check_cuda(device, local_rank)
        torch.cuda.set_device(chosen)
    return chosen


def _check_cuda(device: str, index: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise UserError(f"device={device}: PyTorch sees {count} CUDA devices here: choose device=cpu or auto")


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None: PyTorch's default, which an earlier call may have changed."""
    wanted = threads or DEFAULT_THREADS
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or wanted
    if wanted > max(cpus, DEFAULT_THREADS):
        log.warning(f"threads={wanted} is more than the CPUs there are: with threads={cpus} steps take less time")
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def set_determinism(wanted: bool) -> None:
    """Set whether the process uses deterministic algorithms only; an operation without one then raises an error. Call
    it before the first CUDA operation: cuBLAS reads its setting then."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
