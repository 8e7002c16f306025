"""Base class of attention kernels, and the log line that says which one ran."""

import functools
import logging
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from common.settings import FrozenSettings
from model.mask import Mask


class Kernel(FrozenSettings, ABC):
    """Attention kernel: a frozen callable, passed to an attention at construction."""

    compiles_itself: ClassVar[bool] = False  # and so stays out of torch.compile

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        """Raise Unsupported if this kernel cannot run there, before a run has created anything.
        dropout: whether attention weights will be dropped."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        """softmax(scale · q kᵀ | mask) v, each weight of the softmax dropped with probability `dropout`.

        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv); G divides H, and query head i attends to
        KV head i // (H / G). Raises Unsupported if this device, dtype or shape lacks the kernel.
        """


def group_queries(q: Tensor, n_kv_heads: int) -> Tensor:
    """Group query heads by the KV head they share: (B, T, H, D) -> (B, T, G, H/G, D)."""
    return q.unflatten(2, (n_kv_heads, -1))


_log_once = functools.cache(logging.getLogger("headroom").log)


def say_once(level: int, message: str) -> None:
    """Log a message once per process. In compiled code it is logged when the call is traced."""
    _log_once(level, message)


# Sets what torch.compiler.assume_constant_result sets, without its import of dynamo, which takes three seconds.
say_once._dynamo_marked_constant = True


def forget_logged() -> None:
    """Forget the messages that `say_once` logged: each is logged again when it comes next."""
    _log_once.cache_clear()


def _heads(x: Tensor, kind: str) -> str:
    count = x.shape[2]
    return f"{count} {kind} {'head' if count == 1 else 'heads'}"


def announce(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """Log once per shape which kernel ran. Sequence lengths are left out, because decoding has all of them."""
    phase = "causal" if mask.is_plain_causal else "patterned" if mask.contiguous else "positions"
    grad = ", with gradients" if torch.is_grad_enabled() and q.requires_grad else ""
    say_once(
        logging.INFO,
        f"kernel {name}: {_heads(q, 'query')} on {_heads(k, 'key')} of {q.shape[3]}, "
        f"values of {v.shape[3]}, {phase} mask, {str(q.dtype).removeprefix('torch.')} on {q.device.type}{grad}",
    )
