"""Attention masks as predicates over positions: which keys a query may see. Kernels turn them into what they need."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

HASH_BITS = 2**31 - 1
MAX_SHARED = 2**18  # elements, of each sequence, of a bias that the layers of a forward pass share


@dataclass(frozen=True)
class Pattern:
    """A mask pattern: the keys a query sees by their distance, apart from documents and padding.

    Causal, with neither window nor dilation, shows all keys up to the query's own. A sliding window shows `window`
    tokens, the query's own included (without `causal`: up to that many on either side); of these, a dilation of n shows
    the query's own and every n-th from there (Longformer, Beltagy et al. 2020, arXiv:2004.05150). In addition every
    query sees the first `global_tokens`, and the positions are divided into spans of `block_size`: a share
    `random_blocks` of all pairs of spans is visible, chosen by a hash with `seed` (BigBird, Zaheer et al. 2020,
    arXiv:2007.14062).
    """

    causal: bool = True
    window: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    random_blocks: float = 0.0
    block_size: int = 64
    seed: int = 0
    see_self: bool = True  # position 0 sees itself always: it has no other key

    @property
    def is_full(self) -> bool:
        """Whether nothing but causality hides a key."""
        return self.window is None and self.dilation == 1 and self.see_self

    @property
    def has_bounded_reach(self) -> bool:
        """Whether no query sees keys further back than its window, except global tokens."""
        return self.causal and self.window is not None and not self.random_blocks

    def sees(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Bool tensor for positions that broadcast and are not negative. Elementwise: flex calls it on single pairs."""
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
                local = local | self._in_random_block(q_pos // self.block_size, k_pos // self.block_size)
            seen = seen & local
        return seen if self.see_self else seen & ((distance != 0) | (q_pos == 0))

    @property
    def settings(self) -> tuple[bool, int | None, int, int, float, int, int]:
        """What `spans` depends on, in the order of the fields: as numbers, of which torch.compile makes constants."""
        near = self.causal, self.window, self.dilation
        return *near, self.global_tokens, self.random_blocks, self.block_size, self.seed

    def span(self, rows: slice, n_keys: int) -> slice:
        """A range of keys that holds all those visible to the queries in `rows` (a start and a stop), where indices are
        positions, as in `spans`."""
        near = self._near(rows, n_keys)
        if self.global_tokens or self.random_blocks:
            return slice(0, near.stop if self.causal else n_keys)
        return near

    def spans(self, rows: slice, n_keys: int) -> list[slice]:
        """The same in ranges, in order and none twice, which leave out what lies between. Where `rows` are every n-th,
        and n divides the dilation, so are the keys nearby."""
        near = self._near(rows, n_keys)
        first = slice(0, min(self.global_tokens, near.stop if self.causal else n_keys))
        if rows.step is None:
            return merged([first, near, *self._random_spans(rows, n_keys)])
        assert self.dilation % rows.step == 0 and not self.random_blocks, f"rows {rows} may see any key"
        start = max(near.start, first.stop)
        start += (rows.start - start) % rows.step
        return [span for span in (first, slice(start, near.stop, rows.step)) if span.start < span.stop]

    def _near(self, rows: slice, n_keys: int) -> slice:
        """The keys that causality and window leave."""
        start = 0 if self.window is None else max(0, rows.start - self.window + 1)
        stop = n_keys
        if self.causal:
            stop = rows.stop
        elif self.window is not None:
            stop = rows.stop + self.window - 1
        return slice(start, min(stop, n_keys))

    def _random_spans(self, rows: slice, n_keys: int) -> Iterable[slice]:
        if not self.random_blocks:
            return
        size, stop = self.block_size, rows.stop if self.causal else n_keys
        blocks = range(rows.start // size, -(-rows.stop // size))
        for i in range(-(-stop // size)):
            if any(self._in_random_block(block, i) for block in blocks):
                yield slice(i * size, min(stop, (i + 1) * size))

    def _in_random_block(self, q_block: Any, k_block: Any) -> Any:
        """Whether the 31-bit hash of the pair, tensors or numbers, and the seed is below the share `random_blocks`."""
        bits = (q_block * 73856093) ^ (k_block * 19349663) ^ ((self.seed * 83492791) & HASH_BITS)
        for _ in range(3):
            bits = ((bits & HASH_BITS) ^ ((bits & HASH_BITS) >> 16)) * 0x45D9F3B + 1
        return (bits & HASH_BITS) < int(self.random_blocks * HASH_BITS)


def merged(spans: Iterable[slice]) -> list[slice]:
    """What spans cover together, in order, none twice; those that touch become one."""
    found: list[slice] = []
    for span in sorted((span for span in spans if span.start < span.stop), key=lambda span: span.start):
        if found and span.start <= found[-1].stop:
            found[-1] = slice(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


CAUSAL = Pattern()
T = TypeVar("T")


def made_once(made: dict[Any, T], key: Any, make: Callable[[], T]) -> T:
    """What `make` returns, stored for the next who asks: for what the layers of a forward pass share. A compiler finds
    by itself what is computed twice, and wants no side effects."""
    if torch.compiler.is_compiling():
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


@dataclass(frozen=True)
class Mask:
    """The attention mask of one call: a query sees the keys that the pattern shows its position, and in packed
    sequences only those of its own document.

    Negative positions are padding: as keys they are never visible; as queries they see every key, so that no softmax
    row is empty and none gives NaN, whatever the window.

    `pattern` has no default, as torch.compile of PyTorch 2.11 cannot make an object that is one.

    `contiguous` is stated by whoever made the positions: they are 0..T-1 for queries and keys alike (with nothing but
    padding behind), and nothing was cached before. Only then may a kernel tell positions from indices.
    """

    q_pos: Tensor  # (B, T) or (1, T)
    k_pos: Tensor  # (B, S) or (1, S)
    contiguous: bool
    pattern: Pattern
    q_doc: Tensor | None = None  # (B, T) document of each token, if packed: each a run of tokens, positions from 0 on
    k_doc: Tensor | None = None  # (B, S)
    chosen: Tensor | None = None  # (B, T, S) bool: of the keys that are visible, an indexer shows these alone
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # of it, by kernels

    @property
    def is_plain_causal(self) -> bool:
        """Whether query i sees exactly the keys 0..i, by index: the mask of a kernel's causal fast path. (Without
        `causal`, indices cannot hide the padding that may stand behind.)"""
        return self.contiguous and self.pattern.is_full and self.pattern.causal and self.chosen is None

    def among(self, chosen: Tensor) -> "Mask":
        """The same mask, of which only the chosen keys (B, T, S) are visible."""
        return Mask(self.q_pos, self.k_pos, self.contiguous, self.pattern, self.q_doc, self.k_doc, chosen)

    def visible(self) -> Tensor:
        """The mask as a (B, T, S) bool tensor."""
        return self.visible_in(slice(None), slice(None))

    def visible_in(self, rows: slice, keys: slice) -> Tensor:
        """The mask as a (B, t, s) bool tensor, for the queries in `rows` and the keys in `keys`."""
        q = self.q_pos[:, rows, None], None if self.q_doc is None else self.q_doc[:, rows, None]
        k = self.k_pos[:, None, keys], None if self.k_doc is None else self.k_doc[:, None, keys]
        seen = self.sees(*q, *k)
        return seen if self.chosen is None else seen & self.chosen[:, rows, keys] | (q[0] < 0)

    def bias(self, rows: slice, keys: slice, dtype: torch.dtype, repeats: int = 1) -> Tensor:
        """The mask as a term of the scores, 0 or -∞ for a hidden key: (B or 1, t · repeats, s), each query's row
        repeated. Layers that share this mask compute it once, unless it is large."""
        key = (rows.start, rows.stop, keys.start, keys.stop, dtype, repeats)
        few = (rows.stop - rows.start) * (keys.stop - keys.start) * repeats <= MAX_SHARED
        return made_once(self.made if few else {}, key, lambda: self._bias(*key))

    def _bias(self, first: int, last: int, first_key: int, last_key: int, dtype: torch.dtype, repeats: int) -> Tensor:
        visible = self.visible_in(slice(first, last), slice(first_key, last_key))
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return bias.repeat_interleave(repeats, dim=1) if repeats > 1 else bias

    def sees(self, q_pos: Tensor, q_doc: Tensor | None, k_pos: Tensor, k_doc: Tensor | None) -> Tensor:
        """Bool tensor for positions and documents that broadcast. Elementwise: flex calls it on single pairs."""
        seen = (k_pos >= 0) & self.pattern.sees(q_pos, k_pos)
        if q_doc is not None:
            seen = seen & (k_doc == q_doc)
        return seen | (q_pos < 0)

    @property
    def pattern_by_index(self) -> Pattern | None:
        """A pattern that hides, by index, nothing that this mask shows, and which keys it leaves out may be told from
        shapes alone: the mask's own where positions are contiguous; in packed documents, where an index tells distances
        but not positions, without what positions choose; None where it tells neither."""
        if self.contiguous:
            return self.pattern
        if self.q_doc is None:
            return None
        pattern = self.pattern
        if pattern.global_tokens or pattern.random_blocks:
            return Pattern(pattern.causal)
        return Pattern(pattern.causal, pattern.window, pattern.dilation)

    def span(self, rows: slice) -> slice:
        """A range of keys that holds all those visible to the queries in `rows` (a start and a stop), so that a kernel
        can leave out the others; all keys where indices do not tell."""
        pattern, n_keys = self.pattern_by_index, self.k_pos.shape[1]
        return slice(0, n_keys) if pattern is None else pattern.span(rows, n_keys)
