"""The decode step, compiled, and whether that was worth its time."""

import functools
import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from common.errors import UserError
from common.streams import print_stderr
from model.cache import Cache
from model.flat_model import FlatModel
from model.placement import Placement
from model.transformer import TransformerLM
from runtime.compile import reason_of

TIMED_STEPS = 3
PAYS_FROM = 240  # seconds of decoding, of which a compiled step may save what compiling it takes, and more,
MAX_SHARE = 0.5  # where reading memory takes no more of them
MAX_GRAPHS = 64  # of one process; torch.compile's own limit is 8
LIMITS = ("recompile_limit", "cache_size_limit")  # its name, in newer and older versions of PyTorch

Eager = Callable[[], Tensor]


def bucket(n: int) -> int:
    """Round up a length to one of 64, 96, 128, 192, 256, 384, ...: few enough shapes to record a graph for each."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class CompiledStep:
    """The next logits of one token of every row, by one graph. On a CPU torch.compile traces it once for a text: how
    many cache rows may be visible is a symbol in it. On a GPU it is recorded as a CUDA graph, whose shapes are fixed:
    once for each bucket of that number, with the KV caches at fixed addresses.

    `tokens` are to be written, for which the KV caches get room before. Where eager execution would have written them
    sooner, it says so. What cannot be compiled runs eagerly from then on, after a warning."""

    def __init__(self, tokens: int, device: torch.device):
        self.tokens = tokens
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0  # spent compiling
        self.failed: set[type] = set()  # kinds of models
        self.compiled: set[tuple] = set()  # shapes

    @functools.cached_property
    def step(self) -> Callable[..., Tensor]:
        mode = "reduce-overhead" if self.on_gpu else None
        return torch.compile(decode_step, dynamic=False, fullgraph=True, mode=mode)

    def __call__(
        self,
        model: TransformerLM | FlatModel,
        tokens: Tensor,
        positions: Tensor | None,
        caches: Sequence[Cache],
        kv_len: int,
        eager: Eager,
    ) -> Tensor:
        """tokens (B, 1) at positions (B, 1), or None for a FlatModel, where they are kv_len - 1 -> logits (B, V).
        kv_len: how many cache rows may be visible, at least. eager: computes the same."""
        if type(model) in self.failed:
            return eager()
        extent = self._extent(kv_len, caches, tokens.device)
        shapes = (
            type(model),
            tokens.shape,
            extent.shape if self.on_gpu else None,
            *(cache.capacity for cache in caches),
        )
        call = functools.partial(self.step, model, tokens, positions, caches, extent)
        try:
            if shapes not in self.compiled:
                self.compiled.add(shapes)
                self._compile(call, eager)
            return call()
        except (UserError, torch.OutOfMemoryError):  # which say nothing about the compiler
            raise
        except Exception as error:  # whatever a compiler raises
            self.failed.add(type(model))
            logging.getLogger("headroom").warning(f"--compile failed, running eagerly: {reason_of(error)}")
        return eager()

    def _extent(self, kv_len: int, caches: Sequence[Cache], device: torch.device) -> Tensor:
        """An empty tensor (kv_len,), whose size says it to the graph."""
        if self.on_gpu:
            for cache in caches:
                for column in cache.columns.values():
                    torch._dynamo.mark_static_address(column)
            return torch.empty(bucket(kv_len), 0, device=device)  # no CUDA graph has an input on the CPU
        extent = torch.empty(kv_len, 0, device=device)
        torch._dynamo.mark_dynamic(extent, 0)
        return extent

    def _compile(self, call: Eager, eager: Eager) -> None:
        """Run the step for the first time, which compiles it. Running it again caches the same again."""
        first = not self.seconds
        begun = time.perf_counter()
        with torch._dynamo.config.patch({_limit(): MAX_GRAPHS}):
            _seconds(call)
        self.seconds += time.perf_counter() - begun
        if first:
            self._judge(call, eager)

    def _judge(self, call: Eager, eager: Eager) -> None:
        """Say how long it took, what it saves, and where eager execution would have been done sooner."""
        slow, fast = (min(_seconds(step) for _ in range(TIMED_STEPS)) for step in (eager, call))
        saved = self.tokens * (slow - fast)
        advice = ": leave it out, or write more" if saved < self.seconds else ""
        logging.getLogger("headroom").warning(
            f"--compile took {self.seconds:.0f} s and saves {max(saved, 0):.1f} s in {self.tokens:,} tokens{advice}"
        )


def decode_step(
    model: TransformerLM | FlatModel, tokens: Tensor, positions: Tensor | None, caches: Sequence[Cache], extent: Tensor
) -> Tensor:
    """tokens (B, 1) at positions (B, 1), or None for a FlatModel, where they are kv_len - 1 -> logits (B, V). extent
    (kv_len, 0): its size is how many cache rows may be visible."""
    if isinstance(model, FlatModel):
        return model(tokens, extent.shape[0] - 1)
    at = Placement.decode(positions, caches, extent.shape[0])
    return model.logits(model(tokens, at).x)[:, 0]


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile cannot work: it writes C++ for a CPU, and Triton for a GPU."""
    chosen = os.environ.get("CXX")
    compiler = chosen or ("clang++" if sys.platform == "darwin" else "g++")
    if not _runs(compiler):
        found = f"CXX={chosen} is none: unset CXX" if chosen else f"there is no {compiler}: install it"
        raise UserError(f"--compile needs a C++ compiler, and {found}, or leave --compile out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU: install it, or leave --compile out")


def _runs(program: str) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    except OSError:  # not there, or no program
        return False


def offer(seconds: float, share: Callable[[], float | None], flat: bool, device: torch.device) -> None:
    """Offer --compile in a line where eager decoding took long, and for the most part not to read weights, which is all
    that compiling leaves; on a CPU where steps were `flat`, for others were not seen to gain (benchmarks/README.md).
    share: measures how much of the time reading took."""
    gains = flat or device.type == "cuda"
    if not gains or seconds < PAYS_FROM or (share() or 1) > MAX_SHARE:
        return
    with suppress(UserError):
        check_compiler(device)
        print_stderr(f"[this took {seconds:.0f} s: --compile may save more than the half minute or more that it takes]")


def _limit() -> str:
    return next(name for name in LIMITS if hasattr(torch._dynamo.config, name))


def _seconds(step: Eager) -> float:
    begun = time.perf_counter()
    step().cpu()  # waits for the device
    return time.perf_counter() - begun
