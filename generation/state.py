"""The state of generation: token sequences that grow, their KV caches, and the seed of each."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from generation.compiled_step import CompiledStep, bucket
from generation.gumbel import hash_seeds
from generation.speculative import Speculation
from model.flat_model import FlatModel, flat_model
from model.transformer import TransformerLM

ENDED = -1  # in place of a token, for a row that has ended


class Known(NamedTuple):
    """What the host knows of the rows that are alive without reading anything back: upper bounds, which shapes are
    chosen by. Each of these rows grows by one token in a step."""

    live: int  # how many there are
    longest: int  # tokens in a row's context
    new: int  # of these, not in the KV caches yet
    fresh: bool  # whether the KV caches are empty, those of rows that have ended too
    aligned: bool  # whether all rows are alive, and of one length


class Rows(NamedTuple):
    """Where each row of a batch stands, on the model's device. Replaced as a whole, and never changed in place: what
    was computed ahead is discarded by keeping the rows from before it."""

    lengths: Tensor  # (B,) int64 tokens in the context
    num_cached: Tensor  # (B,) int64 of these, in the KV caches: all but the last sampled
    dropped: Tensor  # (B,) int64 tokens that were before them, and slid out of the context
    alive: Tensor  # (B,) bool
    not_finite: Tensor  # (B,) bool rows that ended because no next token followed
    seeds: Tensor  # (B,) int64 hashed
    known: Known | None = None  # None: must be read back, after a change that no step made

    def changed(self, row: int, **values: Any) -> Self:
        """Return these rows with other values of one of them."""
        fresh = {name: getattr(self, name).clone() for name in values}
        for name, value in values.items():
            fresh[name][row] = value
        return self._replace(known=None, **fresh)

    def read_back(self) -> Self:
        """Return these rows with what the host has to know of them, for which it waits."""
        table = torch.stack((self.lengths, self.num_cached, self.alive)).T.tolist()
        live = [(length, length - cached) for length, cached, alive in table if alive]
        longest = max((length for length, _ in live), default=0)
        new = max((new for _, new in live), default=0)
        fresh = not any(cached for _, cached, _ in table)
        aligned = len(live) == len(table) and len(set(live)) == 1
        return self._replace(known=Known(len(live), longest, new, fresh, aligned))


class Step:
    """A step that was begun: the rows after it, and its tokens on their way to the host."""

    def __init__(self, rows: Rows, tokens: Tensor, live: int):
        self.rows = rows
        self.live = live  # rows, before it
        on_gpu = tokens.is_cuda
        # To the CPU from a GPU, `non_blocking` copies into pinned memory.
        self.sent = torch.stack((tokens, rows.alive)).to("cpu", non_blocking=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> tuple[Tensor, list[int]]:
        """Wait for the step: its tokens (B, 1) on the CPU, and whether each row is alive after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.sent[0][:, None], self.sent[1].tolist()


class GenerationState:
    """A batch of token sequences with their KV caches: all that `generate` reads and changes, on the model's device.

    The caller owns it. Between two steps, or two calls of `generate`, it may `append` to a row, which then goes on, or
    `end` it. Only tokens that are not in the KV caches yet are computed.

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
        compiled: CompiledStep | None = None,
    ):
        """Row i is sampled with seeds[i] alone. cached=False recomputes the whole text for each token: the slow twin.
        compiled: what to decode single tokens with; rows may share it, and states one after the other.
        Raises ValueError for a prompt that cannot be appended."""
        self.context_length = model.config.context_length
        self.slide = slide
        self.compiled = compiled
        self.speculation: Speculation | None = None  # set it to have tokens drafted; the text is the same
        self.caches = None
        self.flat: FlatModel | bool | None = None  # of these caches, once made; False where there is none
        self.ahead: Step | None = None  # the next step, begun before the caller had the tokens of this one
        # Padded on the right. The last column is what rows with a full context write to.
        self.tokens = torch.zeros(len(prompts), self.context_length + 1, dtype=torch.int64)
        none = torch.zeros(len(prompts), dtype=torch.int64)
        self.rows = Rows(none, none, none, none.bool(), none.bool(), hash_seeds(seeds))
        for row, (prompt, _) in enumerate(zip(prompts, seeds, strict=True)):
            self.append(row, prompt)
        longest = int(self.rows.lengths.max())
        device = next(model.parameters()).device
        self.tokens = self.tokens.to(device)
        self.rows = Rows(*(column.to(device) for column in self.rows[:-1]))
        if cached:
            self.caches = model.make_caches(len(prompts), bucket(longest + 1))

    @property
    def indices(self) -> Tensor:
        """(B,) index of the next token in each row's whole text, what slid out of its context counted."""
        return self.rows.lengths + self.rows.dropped

    def flat_model(self, model: TransformerLM) -> FlatModel | None:
        """The step for one token of every row at one position, on a CPU; None where there is none."""
        if self.flat is None:
            self.flat = flat_model(model, self.caches, len(self.tokens), self.context_length) or False
        return self.flat or None

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Append given tokens, such as a prompt, to a row, and revive it. Raises ValueError, and changes nothing, where
        the row would be empty, or leave no room in the context for one token more (and does not slide)."""
        before = int(self.rows.lengths[row])
        total = before + len(tokens)
        dropped = self._num_dropped(total) if self.slide else 0
        if not 0 < total - dropped < self.context_length:
            raise ValueError(
                f"a text of {total} tokens: between 1 and {self.context_length - 1} "
                f"fit a context of {self.context_length}"
            )
        self.discard_ahead()
        text = torch.cat((self.tokens[row, :before], self.tokens.new_tensor(tokens)))[dropped:]
        self.tokens[row, : len(text)] = text
        self.rows = self.rows.changed(row, lengths=len(text), alive=True, not_finite=False)
        if dropped:  # each token stands elsewhere now
            self.rows = self.rows.changed(row, dropped=self.rows.dropped[row] + dropped, num_cached=0)

    def end(self, row: int) -> None:
        """End a row."""
        self.discard_ahead()
        self.rows = self.rows.changed(row, alive=False)

    def reseed(self, row: int, seed: int) -> None:
        """Sample the row's next tokens with another seed."""
        self.discard_ahead()
        self.rows = self.rows.changed(row, seeds=hash_seeds([seed])[0])

    def discard_ahead(self) -> None:
        """Forget the step that was begun ahead: its token, which is behind the end of each row, and what it cached."""
        if self.ahead is not None:
            self.ahead = None
            for cache in self.caches or []:
                cache.rewind(self.rows.num_cached)

    def forget_known(self) -> None:
        """Have it read back what the host knows, which is more than it need be where a row has ended."""
        self.rows = self.rows._replace(known=None)
        if self.ahead is not None:
            self.ahead.rows = self.ahead.rows._replace(known=None)

    def append_sampled(self, sampled: Tensor, end_token: int | None, growing: Tensor | None = None) -> Tensor:
        """Append one sampled token (B,) to each row that is alive, all others being cached now -> the tokens, ENDED for
        the other rows. A row ends at the end token, where the token is NO_TOKEN, and, unless it slides, where its
        context is full. growing: (B,) bool, the rows that this concerns; unset, all."""
        rows = self.rows
        concerned = rows.alive if growing is None else rows.alive & growing
        tokens = sampled.where(concerned, ENDED)
        grows = tokens != ENDED
        self.tokens.scatter_(1, rows.lengths[:, None], tokens.clamp(min=0)[:, None])
        longest, aligned = rows.known.longest + 1, rows.known.aligned and growing is None
        self.rows = rows._replace(
            lengths=rows.lengths + grows,
            num_cached=rows.lengths.where(concerned, rows.num_cached),
            alive=grows if growing is None else rows.alive & (grows | ~growing),
            not_finite=rows.not_finite | (concerned & ~grows),
            known=rows.known._replace(longest=longest, new=1, fresh=False, aligned=aligned),
        )
        if longest >= self.context_length:
            self._end_or_slide()
        if end_token is not None:
            self.rows = self.rows._replace(alive=self.rows.alive & (tokens != end_token))
        return tokens

    def _end_or_slide(self) -> None:
        full = self.rows.alive & (self.rows.lengths == self.context_length)
        self.rows = self.rows._replace(known=None)
        if not self.slide:
            self.rows = self.rows._replace(alive=self.rows.alive & ~full)
            return
        for row in full.nonzero()[:, 0].tolist():
            self.append(row, [])

    def seen_tokens(self, vocab_size: int) -> Tensor:
        """(B, V) bool: the tokens in each row's context, which a repetition penalty applies to."""
        written = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.rows.lengths[:, None]
        seen = torch.zeros(len(self.tokens), vocab_size + 1, dtype=torch.bool, device=self.tokens.device)
        return seen.scatter_(1, self.tokens.where(written, vocab_size), True)[:, :vocab_size]

    def _num_dropped(self, total: int) -> int:
        """Number of tokens to drop, in halves of the context, so that one more token fits."""
        half = self.context_length // 2
        return -(-max(0, total - self.context_length + 1) // half) * half
