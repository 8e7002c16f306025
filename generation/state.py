"""The state of generation: token sequences that grow, their KV caches, and the seed of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.gumbel import hash_seeds
from model.transformer import TransformerLM


def bucket(n: int) -> int:
    """Round up a length to one of 64, 96, 128, 192, 256, 384, ...: few enough shapes for a compiled decode step."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class GenerationState:
    """A batch of token sequences with their KV caches: all that `generate` reads and changes.

    The caller owns it. Between two steps, or two calls of `generate`, it may append to a row, which then goes on, or
    set `alive[row] = False`, which ends it. Only tokens that are not in the KV caches yet are computed.

    A row whose context is full ends; with `slide` it drops its oldest half and goes on, the rest at positions from 0 as
    if it were the whole text. What is dropped depends on the number of tokens alone, so a row continues as the same
    window would without a cache, whatever the other rows of the batch are.
    """

    def __init__(
        self,
        model: TransformerLM,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        cached: bool = True,
        slide: bool = False,
    ):
        """Row i is sampled with seeds[i] alone. cached=False recomputes the whole text for each token:
        the slow twin. Raises ValueError for a prompt that cannot be appended."""
        rows = len(prompts)
        self.context_length = model.config.context_length
        self.slide = slide
        self.seeds = hash_seeds(seeds)
        self.tokens = torch.zeros(rows, self.context_length, dtype=torch.int64)  # padded on the right
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens in each row's context
        self.dropped = torch.zeros(rows, dtype=torch.int64)  # tokens that were before them, and slid out of it
        self.num_cached = torch.zeros(rows, dtype=torch.int64)  # of these, in the KV caches: all but the last sampled
        self.alive = torch.zeros(rows, dtype=torch.bool)
        self.not_finite = torch.zeros(rows, dtype=torch.bool)  # rows that ended because no next token followed
        for row, (prompt, _) in enumerate(zip(prompts, seeds, strict=True)):
            self.append(row, prompt)
        self.caches = model.make_caches(rows, bucket(int(self.lengths.max()) + 1)) if cached else None

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Append given tokens, such as a prompt, to a row, and revive it. Raises ValueError, and changes nothing, where
        the row would be empty, or leave no room in the context for one token more (and does not slide)."""
        before = int(self.lengths[row])
        total = before + len(tokens)
        dropped = self._num_dropped(total) if self.slide else 0
        if not 0 < total - dropped < self.context_length:
            raise ValueError(
                f"a text of {total} tokens: between 1 and {self.context_length - 1} "
                f"fit a context of {self.context_length}"
            )
        text = torch.cat((self.tokens[row, :before], torch.tensor(tokens, dtype=torch.int64)))[dropped:]
        self.tokens[row, : len(text)] = text
        self.lengths[row] = len(text)
        self.alive[row] = True
        self.not_finite[row] = False
        if dropped:
            self.dropped[row] += dropped
            self.num_cached[row] = 0  # each token stands elsewhere now

    def append_token(self, tokens: Tensor) -> None:
        """Append one sampled token (B,) to each row that is alive; a row whose context is full then ends or slides."""
        self.tokens[self.alive, self.lengths[self.alive]] = tokens[self.alive]
        self.lengths += self.alive
        full = self.alive & (self.lengths == self.context_length)
        for row in full.nonzero()[:, 0].tolist():
            if self.slide:
                self.append(row, [])
            else:
                self.alive[row] = False

    def seen_tokens(self, vocab_size: int) -> Tensor:
        """(B, V) bool: the tokens in each row's context, which a repetition penalty applies to."""
        written = torch.arange(self.context_length) < self.lengths[:, None]
        row = torch.arange(len(self.tokens))[:, None].expand_as(written)
        seen = torch.zeros(len(self.tokens), vocab_size, dtype=torch.bool)
        seen[row[written], self.tokens[written]] = True
        return seen

    @property
    def indices(self) -> Tensor:
        """(B,) index of the next token in each row's whole text, what slid out of its context counted."""
        return self.lengths + self.dropped

    def reseed(self, row: int, seed: int) -> None:
        """Sample the row's next tokens with another seed."""
        self.seeds[row] = hash_seeds([seed])[0]

    def _num_dropped(self, total: int) -> int:
        """Number of tokens to drop, in halves of the context, so that one more token fits."""
        half = self.context_length // 2
        return -(-max(0, total - self.context_length + 1) // half) * half
