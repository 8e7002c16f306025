"""The contract of an attention kernel."""

import functools
import logging
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from common.settings import FrozenSettings
from model.mask import Mask


class Kernel(FrozenSettings, ABC):
    """A frozen callable, handed to an attention at construction."""

    compiles_itself: ClassVar[bool] = False  # and so is none for torch.compile

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        """Raises Unsupported where this kernel cannot serve, so that it is said before a run has made anything.
        dropout: whether attention weights will be dropped."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        """softmax(scale · q kᵀ | mask) v, each weight of the softmax dropped with probability `dropout`.

        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv); G divides H, and query head i attends to
        key head i // (H / G). Raises Unsupported where this device, dtype or shape lacks the kernel.
        """


def group_queries(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, H, D) -> (B, T, G, H/G, D): the query heads that share a key head, side by side."""
    return q.unflatten(2, (n_kv_heads, -1))


_log_once = functools.cache(logging.getLogger("headroom").log)


def say_once(level: int, message: str) -> None:
    """While compiling, it speaks when the call is traced."""
    _log_once(level, message)


# What torch.compiler.assume_constant_result does, without the three seconds that its import of dynamo takes.
say_once._dynamo_marked_constant = True


def announce(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """Say once per shape which kernel ran. Sequence lengths are left out: decoding meets them all."""
    phase = "causal" if mask.is_plain_causal else "patterned" if mask.contiguous else "positions"
    grad = ", with gradients" if torch.is_grad_enabled() and q.requires_grad else ""
    say_once(
        logging.INFO,
        f"kernel {name}: {q.shape[2]} query heads on {k.shape[2]} key heads of {q.shape[3]}, "
        f"values of {v.shape[3]}, {phase} mask, {str(q.dtype).removeprefix('torch.')} on {q.device.type}{grad}",
    )
