"""FlexAttention (Dong et al. 2024, arXiv:2412.05496): PyTorch compiles the mask into the kernel, and a block of keys
that no query of a block sees is not computed. For windows, packed documents and block-sparse patterns.

A compiled program serves one pattern and one shape, and takes seconds to make; so lengths are rounded up to few.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import Unsupported
from model.kernels.base import Kernel, announce
from model.kernels.sdpa import SDPA
from model.mask import Mask, Pattern

BLOCK = 128  # queries, and keys, that are skipped together
SHORT_QUERY_KERNEL = SDPA()


class Flex(Kernel):
    """Fewer queries than a block have nothing to skip, as in decoding: the fused kernel takes them."""

    compiles_itself: ClassVar[bool] = True

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type not in ("cpu", "cuda"):
            raise Unsupported(f"kernel=flex compiles for cpu and cuda, not for {device.type}: kernel=naive")
        if device.type == "cpu" and training:
            raise Unsupported("kernel=flex has no backward pass on a CPU: to train there, kernel=auto or kernel=online")
        if dropout:
            raise Unsupported("kernel=flex drops no attention weights: kernel=auto or matmul, or attention.dropout=0")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        t = q.shape[1]
        if t < BLOCK:
            return SHORT_QUERY_KERNEL(q, k, v, mask, scale, dropout)
        self.check(q.device, torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)), dropout > 0)
        announce("flex", q, k, v, mask)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, _length(x.shape[1]) - x.shape[1])).transpose(1, 2) for x in (q, k, v))
        if mask.contiguous and mask.pattern.causal:  # indices say all, and what is padded behind is seen by none
            blocks = _blocks_of(mask.pattern, q.shape[2], q.device)
        else:
            blocks = _blocks(_lengthened(mask, q.shape[0]))
        kind = (mask.pattern, mask.contiguous, mask.q_doc is None, q.shape, k.shape, v.shape, q.dtype, q.device)
        return _program(kind)(q, k, v, blocks, scale).transpose(1, 2)[:, :t]


def _length(tokens: int) -> int:
    """Blocks of tokens, as many as the next of 1, 2, 3, 4, 6, 8, 12, 16, ... holds."""
    blocks = -(-tokens // BLOCK)
    power = 1 << (blocks - 1).bit_length()
    return BLOCK * (power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power)


def _lengthened(mask: Mask, batch: int) -> Mask:
    """Padding behind, for every sequence: what flex looks up by batch and index."""

    def longer(x: Tensor | None) -> Tensor | None:
        return None if x is None else F.pad(x, (0, _length(x.shape[1]) - x.shape[1]), value=-1).expand(batch, -1)

    places = {name: longer(getattr(mask, name)) for name in ("q_pos", "k_pos", "q_doc", "k_doc")}
    return dataclasses.replace(mask, **places)


@functools.lru_cache(maxsize=16)
def _blocks_of(pattern: Pattern, length: int, device: torch.device) -> Any:
    positions = torch.arange(length, device=device)[None]
    return _blocks(Mask(positions, positions, contiguous=True, pattern=pattern))


def _blocks(mask: Mask) -> Any:
    """The BlockMask of whole blocks: which are seen at all, and which wholly. Looked at a row of blocks at a time, so
    that no mask of T × S exists."""
    from torch.nn.attention.flex_attention import BlockMask

    sequences, queries, keys = mask.q_pos.shape[0], mask.q_pos.shape[1] // BLOCK, mask.k_pos.shape[1] // BLOCK
    some = torch.zeros(sequences, queries, keys, dtype=torch.bool, device=mask.q_pos.device)
    whole = some.clone()
    for i in range(queries):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        span = mask.span(rows)
        near = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        visible = mask.visible(rows, slice(near.start * BLOCK, near.stop * BLOCK)).unflatten(-1, (-1, BLOCK))
        some[:, i, near], whole[:, i, near] = visible.any(-1).any(1), visible.all(-1).all(1)

    q_pos, q_doc, k_pos, k_doc = mask.q_pos, mask.q_doc, mask.k_pos, mask.k_doc

    def by_index(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask.pattern.sees(i, j)

    def by_position(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        docs = (None, None) if q_doc is None else (q_doc[b, i], k_doc[b, j])
        return mask.sees(q_pos[b, i], docs[0], k_pos[b, j], docs[1])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=by_index if mask.contiguous and mask.pattern.causal else by_position,
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, queries, keys) bool -> how many of each row, and their indices in front: (B, 1, queries) and with keys."""
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None].contiguous()


@functools.lru_cache(maxsize=64)
def _program(kind: Any) -> Callable[..., Tensor]:
    """The kernel compiled, for one pattern and one shape. Each has a code object of its own: dynamo counts
    recompilations by code object, and beyond a few it would run without compiling, tens of times slower."""
    own = types.FunctionType(_attend.__code__.replace(co_name=f"flex_{abs(hash(kind)):x}"), globals())
    compiled = torch.compile(own, dynamic=False)

    def call(*inputs: Any) -> Tensor:
        try:
            return compiled(*inputs)
        except RuntimeError as error:
            from torch._dynamo.exc import BackendCompilerFailed  # seconds of imports, which are done by now

            if not isinstance(error, BackendCompilerFailed):
                raise
            reason = str(error).strip().splitlines()[0]
            raise Unsupported(f"kernel=flex cannot be compiled here, choose kernel=auto: {reason}") from None

    return call


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention  # a second of imports, for who wants it

    return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
