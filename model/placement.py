"""Placement: where the tokens of a forward pass stand, and the KV caches that they go on from. Its constructors make
the combinations that there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from model.cache import Cache

PADDING_POSITION = -1  # of what fills up a row with fewer tokens: a mask hides negative positions


class Windows(Protocol):
    """A batch of training or evaluation, as data.batches makes it."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    positions: Tensor | None  # (B, T) of tokens in their documents, in packed sequences
    docs: Tensor | None  # (B, T) document of each token

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True)
class Placement:
    """Made by `contiguous`, `packed`, `prefill` or `decode`."""

    positions: Tensor  # (B, T) or (1, T): tokens from the start of their document; negative is padding
    is_contiguous: bool = False  # positions are 0..T-1, with nothing but padding behind, and the caches are empty
    docs: Tensor | None = None  # (B, T) document of each token, in packed sequences
    caches: Sequence[Cache] | None = None  # one KV cache per layer, written in place
    kv_len: int | None = None  # cache rows that may be visible; None is all
    below: int | None = None  # a bound of the positions, if known
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # by caches

    def __post_init__(self):
        assert self.docs is None or (self.caches is None and not self.is_contiguous), "no cache holds documents"

    @classmethod
    def contiguous(cls, length: int, device: torch.device | None = None) -> Self:
        """Tokens 0..T-1 of one text per row."""
        return cls(torch.arange(length, device=device)[None], is_contiguous=True)

    @classmethod
    def packed(cls, positions: Tensor, docs: Tensor) -> Self:
        """Several documents in a row: positions (B, T) begin at 0 in each, docs (B, T) tells them apart. No caches: a
        cache row holds one document."""
        return cls(positions, docs=docs)

    @classmethod
    def of_batch(cls, batch: Windows) -> Self:
        """Packed where the batch knows its documents, else contiguous."""
        if batch.docs is None:
            return cls.contiguous(batch.inputs.shape[1], batch.inputs.device)
        return cls.packed(batch.positions, batch.docs)

    @classmethod
    def prefill(cls, lengths: Tensor, caches: Sequence[Cache] | None = None) -> Self:
        """Whole texts of `lengths` (B,) tokens from their beginning, padded on the right to the longest. caches, if
        any, are empty, and hold them afterwards."""
        positions = torch.arange(int(lengths.max()), device=lengths.device)[None]
        if (lengths != lengths[0]).any():
            positions = positions.where(positions < lengths[:, None], PADDING_POSITION)
        return cls(positions, is_contiguous=True, caches=caches)

    @classmethod
    def decode(
        cls, positions: Tensor, caches: Sequence[Cache], kv_len: int | None = None, below: int | None = None
    ) -> Self:
        """Tokens at positions (B, T) or (1, T) that go on from what the caches hold. kv_len: how many cache rows may be
        visible, if fewer than the capacity. below: a bound of the positions, if known."""
        return cls(positions, caches=caches, kv_len=kv_len, below=below)
