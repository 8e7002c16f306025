"""Base class of attention kernels: what they are given and return, and the log line that says which one ran."""

import contextlib
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from common.errors import Unsupported
from common.settings import FrozenSettings
from model.mask import Mask


class How(NamedTuple):
    """How to attend, besides the tensors and the mask."""

    scale: float  # of the scores; never the kernel's to choose: absorbed keys are wider than those it is for
    dropout: float = 0.0  # probability with which each weight of the softmax is dropped
    lse: bool = False  # whether Attended.lse is wanted
    v_dim: int | None = None  # the values are the first v_dim columns of the keys, as in absorbed MLA; v is not read

    def values(self, k: Tensor, v: Tensor | None) -> Tensor:
        """The values: v, or a view of the keys."""
        return v if self.v_dim is None else k[..., : self.v_dim]


class Attended(NamedTuple):
    """What a kernel returns."""

    out: Tensor  # (B, T, H, Dv), in the dtype of the queries
    lse: Tensor | None = (
        None  # (B, T, H) float32, log Σ exp(scores) over the visible keys, with its gradient; if wanted
    )


class Case(NamedTuple):
    """What calls that are alike have in common. The number of tokens is left out, because decoding has all of them."""

    device: str
    dtype: torch.dtype
    n_heads: int
    n_kv_heads: int
    key_dim: int
    v_dim: int
    mask: str
    trains: bool  # whether a backward pass follows
    dropout: bool
    lse: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Self:
        return cls(
            q.device.type,
            q.dtype,
            q.shape[2],
            k.shape[2],
            q.shape[3],
            v.shape[3] if how.v_dim is None else how.v_dim,
            _kind_of(mask),
            torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v)),
            how.dropout > 0,
            how.lse,
        )


def _kind_of(mask: Mask) -> str:
    if mask.contiguous:
        return "causal" if mask.is_plain_causal else "patterned"
    return "positions" if mask.q_doc is None else "documents"


class Kernel(FrozenSettings, ABC):
    """Attention kernel: a frozen callable, passed to an attention at construction."""

    compiles_itself: ClassVar[bool] = False  # and so stays out of torch.compile
    hides_what_is_not_chosen: ClassVar[bool] = True  # whether it follows Mask.chosen
    is_flash_on_cpu: ClassVar[bool] = False  # whether it is PyTorch's flash kernel there, where nothing trains

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        """Raise Unsupported if this kernel cannot run there, before a run has created anything.
        dropout: whether attention weights will be dropped."""

    def gives_lse(self, device: str) -> bool:
        """Whether this kernel can return the log-sum-exp there."""
        return True

    def check_lse(self, case: Case) -> None:
        """Raise Unsupported if the log-sum-exp is wanted of a kernel that has none."""
        if case.lse and not self.gives_lse(case.device):
            name = type(self).__name__.lower()
            raise Unsupported(f"kernel={name} returns no log-sum-exp on {case.device}: kernel=auto, naive or online")

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        """softmax(scale · q kᵀ | mask) v, each weight of the softmax dropped with probability `dropout`.

        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv); G divides H, and query head i attends to
        KV head i // (H / G). Raises Unsupported if this device, dtype or shape lacks the kernel.
        """

    def run(self, case: Case, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        """The same, where the case of these inputs is known."""
        return self(q, k, v, mask, how)


def check_drops_nothing(name: str, dropout: bool, device: str = "") -> None:
    """Raise Unsupported if attention weights are to be dropped, which that kernel cannot."""
    if dropout:
        raise Unsupported(
            f"kernel={name} drops no attention weights{device}: kernel=auto or matmul, or attention.dropout=0 (of a "
            "stack, model.attention_dropout=0)"
        )


def group_queries(q: Tensor, n_kv_heads: int) -> Tensor:
    """Group query heads by the KV head they share: (B, T, H, D) -> (B, T, G, H/G, D)."""
    return q.unflatten(2, (n_kv_heads, -1))


_log_once = functools.cache(logging.getLogger("headroom").log)
_announced: set[tuple[str, Case]] = set()
_silent: list[None] = []  # an element for each trial in progress


def say_once(level: int, message: str) -> None:
    """Log a message once per process. In compiled code it is logged when the call is traced."""
    _log_once(level, message)


# Sets what torch.compiler.assume_constant_result sets, without its import of dynamo, which takes three seconds.
say_once._dynamo_marked_constant = True


def forget_logged() -> None:
    """Forget the messages that were logged once: each is logged again when it comes next."""
    _log_once.cache_clear()
    _announced.clear()


@contextlib.contextmanager
def unannounced() -> Iterator[None]:
    """Within its `with` block kernels run without being announced, as in a trial."""
    _silent.append(None)
    try:
        yield
    finally:
        _silent.pop()


def announce(name: str, case: Case) -> None:
    """Log once per case which kernel ran."""
    if not torch.compiler.is_compiling():
        if _silent or (name, case) in _announced:
            return
        _announced.add((name, case))
    grad = ", with gradients" if case.trains else ""
    say_once(
        logging.INFO,
        f"kernel {name}: {_heads(case.n_heads, 'query')} on {_heads(case.n_kv_heads, 'key')} of {case.key_dim}, "
        f"values of {case.v_dim}, {case.mask} mask, {str(case.dtype).removeprefix('torch.')} on {case.device}{grad}",
    )


def _heads(count: int, kind: str) -> str:
    return f"{count} {kind} {'head' if count == 1 else 'heads'}"
