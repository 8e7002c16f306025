"""Which keys a query may see, as a predicate over positions. Kernels turn it into whatever they need."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """A query at position p sees the keys at positions 0..p.

    Negative positions are padding: as keys they are never visible; as queries they see position 0, so no softmax
    row is empty and no NaN is born. (That needs every sequence to hold a key at position 0: one real token.)

    Where documents are packed into one sequence, a query sees the keys of its own document only.

    `plain` is a statement by whoever made the positions: they are 0..T-1 for queries and keys alike, with nothing
    cached before. Only then may a kernel use its causal fast path, which knows indices but not positions.
    """

    q_pos: Tensor  # (B, T) or (1, T)
    k_pos: Tensor  # (B, S) or (1, S)
    plain: bool
    q_doc: Tensor | None = None  # (B, T) which document each token belongs to, in packed sequences
    k_doc: Tensor | None = None  # (B, S)

    def visible(self, rows: slice = slice(None)) -> Tensor:
        """(B, T, S) bool, for the queries in `rows`."""
        q_pos = self.q_pos[:, rows, None].clamp(min=0)
        k_pos = self.k_pos[:, None, :]
        seen = (k_pos >= 0) & (k_pos <= q_pos)
        return seen if self.q_doc is None else seen & (self.k_doc[:, None, :] == self.q_doc[:, rows, None])
