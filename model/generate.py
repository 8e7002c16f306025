"""Decoding: the state of texts that grow, and the one loop for every attention."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.errors import NotFinite
from model.cache import Cache
from model.sampler import NO_TOKEN, Sampler
from model.transformer import TransformerLM

ENDED = -1  # what `generate` yields for a row that has ended


def bucket(n: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds n: few enough shapes for a compiled decode step."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class Texts:
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


@torch.no_grad()
def generate(
    model: TransformerLM, texts: Texts, sampler: Sampler, *, max_new_tokens: int, end_token: int | None = None
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64 on the CPU, up to max_new_tokens times; `texts` holds it by then.

    A row's text does not depend on its neighbours (but where two tokens are as likely up to rounding, of which bfloat16
    has a lot). It ends after `end_token`, which is yielded, when its context is
    full, or when the caller says so; from then on ENDED stands for it, and when all rows have ended the iteration does.
    A row after which the model's output is no distribution ends too (`texts.not_finite`), its neighbours go on, and
    where the iteration would end NotFinite is raised.
    """
    broken = torch.zeros_like(texts.alive)
    for _ in range(max_new_tokens):
        if not texts.alive.any():
            break
        logits = next_logits(model, texts).float().cpu()
        seen = texts.seen(model.vocab_size) if sampler.repetition_penalty != 1 else None
        tokens = sampler(logits, texts.uniform(), seen)
        broken |= texts.alive & (tokens == NO_TOKEN)
        texts.not_finite |= broken
        texts.alive &= ~broken
        if broken.any() and not texts.alive.any():
            break
        tokens = tokens.where(texts.alive, ENDED)
        texts.add(tokens)
        texts.alive &= tokens != (ENDED if end_token is None else end_token)
        yield tokens
    if broken.any():
        row = int(broken.nonzero()[0])
        which = f" of text {row + 1}" if len(broken) > 1 else ""
        raise NotFinite(f"the model's output is not finite after {int(texts.lengths[row])} tokens{which}")


def next_logits(model: TransformerLM, texts: Texts) -> Tensor:
    """Logits (B, V) after each live row's last token; the caches hold all tokens then."""
    caches, device, longest = texts.caches, next(model.parameters()).device, int(texts.lengths.max())
    for cache in caches or []:
        if cache.capacity < longest:
            cache.grow(max(2 * cache.capacity, bucket(longest)))
    if caches is None or not texts.held.any():
        logits = _whole_text(model, texts.tokens.to(device), texts.lengths.to(device), caches)
    else:
        new = (texts.lengths - texts.held) * texts.alive
        ahead = torch.arange(int(new.max()))
        index = texts.held[:, None] + ahead  # (B, T)
        positions = index.where(ahead < new[:, None], ENDED)  # rows with fewer new tokens, or none, are padded
        tokens = texts.tokens.gather(1, index.clamp(max=texts.limit - 1))
        last = (new[:, None] - 1).clamp(min=0) if len(ahead) > 1 else None
        last = last if last is None else last.to(device)
        logits = decode_step(model, tokens.to(device), positions.to(device), caches, bucket(longest), last)
    texts.held = texts.lengths.where(texts.alive, texts.held)
    return logits


def _whole_text(model: TransformerLM, text: Tensor, lengths: Tensor, caches: list[Cache] | None = None) -> Tensor:
    """Logits (B, V) after each row's last token, filling the caches where there are any.

    Rows shorter than the longest are padded on the right, so the batch is plain: no real token sees the padding.
    """
    text = text[:, : int(lengths.max())]
    positions = torch.arange(text.shape[1], device=text.device)[None]
    if (lengths != lengths[0]).any():
        positions = positions.where(positions < lengths[:, None], -1)
    return model(text, positions=positions, plain=True, caches=caches, only=lengths[:, None] - 1).logits[:, 0]


def decode_step(
    model: TransformerLM,
    tokens: Tensor,
    positions: Tensor,
    caches: list[Cache],
    extent: int,
    last: Tensor | None = None,
) -> Tensor:
    """New tokens (B, T) at positions (B, T) -> logits (B, V) after the first of each row, or after that of index `last`
    (B, 1)."""
    return model(tokens, positions=positions, caches=caches, extent=extent, only=last).logits[:, 0]
