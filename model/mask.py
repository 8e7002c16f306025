"""Which keys a query may see, as a predicate over positions. Kernels turn it into whatever they need."""

from dataclasses import dataclass

from torch import Tensor

HASH = 2**31 - 1


@dataclass(frozen=True)
class Pattern:
    """The keys that one attention may see, of those before (or around) a query.

    Causal, with neither window nor dilation, is all of them up to the query itself. A window holds `window` tokens,
    the query's own included (without `causal`: up to that many on either side); of these, a dilation of n takes the
    query's own and every n-th from there (Longformer, Beltagy et al. 2020, arXiv:2004.05150). Beside them everyone sees
    the first `global_tokens`, and of all pairs of blocks of `block_size` positions the share `random_blocks`, drawn
    from `seed` (BigBird, Zaheer et al. 2020, arXiv:2007.14062).
    """

    causal: bool = True
    window: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    random_blocks: float = 0.0
    block_size: int = 64
    seed: int = 0
    see_self: bool = True  # position 0, which has nothing else to see, sees itself always

    @property
    def is_full(self) -> bool:
        """Nothing hides a key but causality."""
        return self.window is None and self.dilation == 1 and self.see_self

    @property
    def has_bounded_reach(self) -> bool:
        """A query sees no key further back than its window, but for the global tokens."""
        return self.causal and self.window is not None and not self.random_blocks

    def sees(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """bool, of positions that broadcast; none is negative. Elementwise, so it serves one pair as well as many."""
        distance = q_pos - k_pos
        seen = distance >= 0 if self.causal else distance == distance
        if not self.is_full:
            local = seen
            if self.window is not None:
                local = distance.abs() < self.window
            if self.dilation > 1:
                local = local & (distance % self.dilation == 0)
            if self.global_tokens:
                local = local | (k_pos < self.global_tokens)
            if self.random_blocks:
                local = local | self._drawn(q_pos // self.block_size, k_pos // self.block_size)
            seen = seen & local
        return seen if self.see_self else seen & ((distance != 0) | (q_pos == 0))

    def _drawn(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        """Whether a hash of the pair and the seed, of 31 bits, is below the share that is wanted."""
        bits = (q_block * 73856093) ^ (k_block * 19349663) ^ ((self.seed * 83492791) & HASH)
        for _ in range(3):
            bits = ((bits & HASH) ^ ((bits & HASH) >> 16)) * 0x45D9F3B + 1
        return (bits & HASH) < int(self.random_blocks * HASH)


CAUSAL = Pattern()


@dataclass(frozen=True)
class Mask:
    """A query sees the keys that the pattern lets its position see, in its own document only, where several are packed
    into one sequence.

    Negative positions are padding: as keys they are never visible; as queries they see every key there is, so that no
    softmax row is empty and no NaN is born, whatever the window.

    `plain` is a statement by whoever made the positions: they are 0..T-1 for queries and keys alike (with nothing but
    padding behind), and nothing was cached before. Only then may a kernel use what it knows of indices.
    """

    q_pos: Tensor  # (B, T) or (1, T)
    k_pos: Tensor  # (B, S) or (1, S)
    contiguous: bool
    pattern: Pattern = CAUSAL
    q_doc: Tensor | None = None  # (B, T) which document each token belongs to, in packed sequences
    k_doc: Tensor | None = None  # (B, S)

    @property
    def is_plain_causal(self) -> bool:
        """Indices say who sees whom: a query sees the keys up to its own. (Without `causal` they do not tell the
        padding that may stand behind.)"""
        return self.contiguous and self.pattern.is_full and self.pattern.causal

    def visible(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """(B, t, s) bool, for the queries in `rows` and the keys in `keys`."""
        q = self.q_pos[:, rows, None], None if self.q_doc is None else self.q_doc[:, rows, None]
        k = self.k_pos[:, None, keys], None if self.k_doc is None else self.k_doc[:, None, keys]
        return self.sees(*q, *k)

    def sees(self, q_pos: Tensor, q_doc: Tensor | None, k_pos: Tensor, k_doc: Tensor | None) -> Tensor:
        """Of positions and documents that broadcast: elementwise, so it serves one pair as well as many."""
        seen = (k_pos >= 0) & self.pattern.sees(q_pos, k_pos)
        if q_doc is not None:
            seen = seen & (k_doc == q_doc)
        return seen | (q_pos < 0)

    def span(self, rows: slice) -> slice:
        """The keys that the queries in `rows` (a start and a stop) may see at most; all, where indices say nothing."""
        if not self.contiguous:
            return slice(0, self.k_pos.shape[1])
        pattern = self.pattern
        near = pattern.window is not None and not pattern.random_blocks and not pattern.global_tokens
        start = max(0, rows.start - pattern.window + 1) if near else 0
        reach = rows.stop if pattern.causal else rows.stop + pattern.window - 1 if near else self.k_pos.shape[1]
        return slice(start, min(reach, self.k_pos.shape[1]))
