"""The state of texts that grow: their tokens, their KV caches, and where each draws its randomness from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.transformer import TransformerLM


def bucket(n: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds n: few enough shapes for a compiled decode step."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class GenerationState:
    """A batch of texts, and what the model remembers of them: all that `generate` reads and changes.

    The caller owns it. Between two steps, or two calls of `generate`, it may append to a row, which then goes on, or
    set `alive[row] = False`, which ends it. Only tokens that the caches do not hold yet are computed.

    A row whose context is full ends; with `slide` it drops its oldest half and goes on, the rest standing at positions
    from 0 as if it were the whole text. What is dropped depends on the number of tokens alone: a row goes on as an
    uncached text of the same window would, whoever its neighbours are.
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
        """Row i draws from a generator of seeds[i] alone. cached=False computes the whole text anew for each token: the
        slow twin. Raises ValueError for a prompt that cannot be appended."""
        rows, self.limit, self.slide = len(prompts), model.config.context_length, slide
        self.draws = [torch.Generator().manual_seed(seed) for seed in seeds]  # a row each
        self.tokens = torch.zeros(rows, self.limit, dtype=torch.int64)  # (B, limit), padded on the right
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens in each row's context
        self.held = torch.zeros(rows, dtype=torch.int64)  # of these, how many the caches hold; not the last
        self.alive = torch.zeros(rows, dtype=torch.bool)
        self.not_finite = torch.zeros(rows, dtype=torch.bool)  # rows that ended because no next token followed
        for row, (prompt, _) in enumerate(zip(prompts, seeds, strict=True)):
            self.append(row, prompt)
        self.caches = model.make_caches(rows, bucket(int(self.lengths.max()) + 1)) if cached else None

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Tokens from outside. Raises ValueError, and changes nothing, where the row would be empty, or leave no room
        in the context for one token more (and does not slide)."""
        held = int(self.lengths[row])
        total = held + len(tokens)
        start = self._surplus(total) if self.slide else 0
        if not 0 < total - start < self.limit:
            raise ValueError(f"a text of {total} tokens: between 1 and {self.limit - 1} fit a context of {self.limit}")
        text = torch.cat((self.tokens[row, :held], torch.tensor(tokens, dtype=torch.int64)))[start:]
        self.tokens[row, : len(text)] = text
        self.lengths[row], self.alive[row], self.not_finite[row] = len(text), True, False
        if start:
            self.held[row] = 0  # each token stands elsewhere now

    def add(self, tokens: Tensor) -> None:
        """One token of its own (B,) for each row that is alive."""
        self.tokens[self.alive, self.lengths[self.alive]] = tokens[self.alive]
        self.lengths += self.alive
        full = self.alive & (self.lengths == self.limit)
        for row in full.nonzero()[:, 0].tolist():
            if self.slide:
                self.append(row, [])
            else:
                self.alive[row] = False

    def seen(self, vocab_size: int) -> Tensor:
        """(B, V) bool: the tokens in each row's context."""
        written = torch.arange(self.limit) < self.lengths[:, None]
        row = torch.arange(len(self.tokens))[:, None].expand_as(written)
        seen = torch.zeros(len(self.tokens), vocab_size, dtype=torch.bool)
        seen[row[written], self.tokens[written]] = True
        return seen

    def uniform(self) -> Tensor:
        """(B,) the next number in [0, 1) of each row that is alive: a row draws once for each token of its own."""
        drawn = torch.zeros(len(self.draws), dtype=torch.float64)
        for row in self.alive.nonzero()[:, 0].tolist():
            drawn[row] = torch.rand((), generator=self.draws[row], dtype=torch.float64)
        return drawn

    def draw_from(self, row: int, seed: int) -> None:
        """The row draws anew, as a text of this seed does from its first token on."""
        self.draws[row] = torch.Generator().manual_seed(seed)

    def _surplus(self, total: int) -> int:
        """The fewest halves of the context, in tokens, whose loss leaves room for one token more."""
        half = self.limit // 2
        return -(-max(0, total - self.limit + 1) // half) * half
