"""FlexAttention (Dong et al. 2024, arXiv:2412.05496): PyTorch compiles the mask into the kernel, and skips tiles of 128
keys that no query in a tile of 128 sees. For windows, packed documents and block-sparse patterns.

A compiled program serves one pattern and one shape, and takes seconds to compile; so lengths are rounded up to a few
sizes.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import Unsupported
from model.kernels.base import Attended, Case, How, Kernel, announce, check_drops_nothing
from model.kernels.sdpa import SDPA
from model.mask import Mask, Pattern

BLOCK = 128  # queries, and keys, skipped together: flex_attention's block size
SHORT_QUERY_KERNEL = SDPA()
MAX_PROGRAMS = 10_000  # compiled in a process, for all patterns and shapes


class Flex(Kernel):
    """FlexAttention for 128 queries or more. Fewer have nothing to skip, as in decoding: the fused kernel runs them."""

    compiles_itself: ClassVar[bool] = True
    hides_what_is_not_chosen: ClassVar[bool] = False

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type not in ("cpu", "cuda"):
            raise Unsupported(f"kernel=flex compiles for cpu and cuda, not for {device.type}: kernel=naive")
        if device.type == "cpu" and training:
            raise Unsupported("kernel=flex has no backward pass on a CPU: to train there, kernel=auto or kernel=online")
        check_drops_nothing("flex", dropout)

    def gives_lse(self, device: str) -> bool:
        return device != "cpu"  # where PyTorch's compiler has none

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        t = q.shape[1]
        if t < BLOCK and (not how.lse or SHORT_QUERY_KERNEL.gives_lse(q.device.type)):
            return SHORT_QUERY_KERNEL(q, k, v, mask, how)
        if mask.chosen is not None:
            raise Unsupported("kernel=flex cannot attend to what an indexer chooses: kernel=auto")
        case = Case.of(q, k, v, mask, how)
        self.check(q.device, case.trains, case.dropout)
        self.check_lse(case)
        announce("flex", case)
        v = how.values(k, v)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, _length(x.shape[1]) - x.shape[1])).transpose(1, 2) for x in (q, k, v))
        if _by_index(mask):
            blocks = _blocks_of(mask.pattern, q.shape[2], q.device)
        else:
            blocks = _blocks(_lengthened(mask, q.shape[0]))
        out, lse = _run_compiled(q, k, v, blocks, how)
        return Attended(out.transpose(1, 2)[:, :t], lse.transpose(1, 2)[:, :t] if how.lse else None)


def _length(tokens: int) -> int:
    """Round up to 1, 2, 3, 4, 6, 8, 12, 16, ... times 128 tokens."""
    blocks = -(-tokens // BLOCK)
    power = 1 << (blocks - 1).bit_length()
    return BLOCK * (power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power)


def _lengthened(mask: Mask, batch: int) -> Mask:
    """Pad the mask's positions and documents to the rounded length, for every sequence: flex looks them up by batch and
    index."""

    def padded(x: Tensor | None) -> Tensor | None:
        return None if x is None else F.pad(x, (0, _length(x.shape[1]) - x.shape[1]), value=-1).expand(batch, -1)

    fields = {name: padded(getattr(mask, name)) for name in ("q_pos", "k_pos", "q_doc", "k_doc")}
    return dataclasses.replace(mask, **fields)


def _by_index(mask: Mask) -> bool:
    """Whether indices are positions, padding behind included: no causal query sees it."""
    return mask.contiguous and mask.pattern.causal


@functools.lru_cache(maxsize=16)
def _blocks_of(pattern: Pattern, length: int, device: torch.device) -> Any:
    """The BlockMask of contiguous positions, cached: training asks for the same one in each step."""
    positions = torch.arange(length, device=device)[None]
    return _blocks(Mask(positions, positions, contiguous=True, pattern=pattern))


def _blocks(mask: Mask) -> Any:
    """Build the BlockMask: which blocks are visible in part, and which as a whole. Works on one row of blocks at a
    time, so that no T × S mask is in memory."""
    from torch.nn.attention.flex_attention import BlockMask

    sequences, queries, keys = mask.q_pos.shape[0], mask.q_pos.shape[1] // BLOCK, mask.k_pos.shape[1] // BLOCK
    some = torch.zeros(sequences, queries, keys, dtype=torch.bool, device=mask.q_pos.device)
    whole = some.clone()
    for i in range(queries):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        span = mask.span(rows)
        near = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        visible = mask.visible_in(rows, slice(near.start * BLOCK, near.stop * BLOCK)).unflatten(-1, (-1, BLOCK))
        some[:, i, near] = visible.any(-1).any(1)
        whole[:, i, near] = visible.all(-1).all(1)

    # flex_attention traces tensors in a closure, but not those within the Mask
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
        mask_mod=by_index if _by_index(mask) else by_position,
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, queries, keys) bool -> how many are set in each row, (B, 1, queries), and their indices in front, (B, 1,
    queries, keys)."""
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None].contiguous()


def _run_compiled(q: Tensor, k: Tensor, v: Tensor, blocks: Any, how: How) -> tuple[Tensor, Tensor | None]:
    """Run the program for this pattern and these shapes, compiling it first if it is new."""
    # By default dynamo compiles a function for 8 patterns and shapes, and would run any other uncompiled, tens of times
    # slower, with no more than a log line.
    limits = {"recompile_limit": MAX_PROGRAMS, "accumulated_recompile_limit": MAX_PROGRAMS}
    try:
        with torch._dynamo.config.patch(limits):
            return _compiled()(q, k, v, blocks, how.scale, how.lse)
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        reason = str(error).strip().splitlines()[0]
        raise Unsupported(f"kernel=flex cannot be compiled here, choose kernel=auto: {reason}") from None


@functools.cache
def _compiled() -> Any:
    return torch.compile(_attend, dynamic=False)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any, scale: float, lse: bool) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import flex_attention  # a second of imports, only for runs that use flex

    options = {"block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return flex_attention(q, k, v, **options, return_lse=True) if lse else (flex_attention(q, k, v, **options), None)
