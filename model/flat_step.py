"""What a module makes ready to decode one token of every row on a CPU, in the fewest operations.

A token of a small model costs less in arithmetic than in everything around it: each operation of PyTorch takes a few
microseconds when what it runs was run a moment ago, and some twenty when the weights that were read in between have
displaced it from the caches of the processor. So where every row has one token, at the same position, which the host
knows (the usual case of decoding), a `flat` of each part of the model returns a function of a few operations, which has
at hand what does not change from token to token: joined and transposed matrices, rows of the KV cache, rotary tables.
It computes what `forward` does, which is its naive twin; a part that has no `flat`, or returns None, runs `forward`.
"""

from collections.abc import Callable

from torch import Tensor

from model.rope import Rope


class Now:
    """Where the token of every row stands."""

    def __init__(self, position: int, rotary: dict[Rope, tuple[Tensor, Tensor]]):
        self.rotary = rotary  # cos and sin of the position, (1, dim) each
        # Slices, whose bounds may be symbols of torch.compile; an index it would fix.
        self.row = slice(position + 1, position + 2)  # in an array of ColumnCache, whose first row is spare
        self.seen = slice(1, position + 2)  # rows of this position and those before it


FlatMLP = Callable[[Tensor, Tensor], Tensor]  # (x (B, d), residual (B, d)) -> residual + mlp(x)
FlatAttention = Callable[[Tensor, Tensor, Now], Tensor]  # (x, residual, now) -> residual + attention(x)
