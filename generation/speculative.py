"""Prompt-lookup speculation: draft what followed the last tokens where they stood before, and keep what the model draws
itself.

One pass over the last token and k drafts gives what the model draws at 1 + k places (speculative decoding, Leviathan et
al. 2023, arXiv:2211.17192; drafts from the text: Saxena 2023, "Prompt Lookup Decoding"). With the noise of (seed,
index), these are the tokens that it would draw one by one: up to the first that differs from its draft, that one
included. What is behind it followed a token that is not in the text. So drafts change the time, never the text.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from model.cache import Cache
from model.placement import Placement

Draw = Callable[[Tensor], Tensor]  # logits (B, V) -> the next token of each row (B,), as the text's own are drawn

LONGEST_MATCH = 4  # tokens at the end of a text that are looked up, and
SHORTEST_MATCH = 2
MAX_DRAFT = 12  # tokens; every cache can take back 16
FIRST_DRAFT = 4
PAYS_FROM = 1.3  # tokens per pass; in a batch, whose rows no longer stand at one position, half as many again
MIN_DRAFT = 1 / 8  # one token every 8 steps


def look_up(text: np.ndarray, k: int) -> np.ndarray:
    """Draft k tokens: those behind the latest earlier occurrence of the longest end of a text (n,), of 2 to 4 tokens,
    that has one. Where the text ends before k, the drafts are read on: a text that repeats itself goes on to. Empty
    where there is no occurrence."""
    last = np.flatnonzero(text[:-1] == text[-1])  # where the earlier ones end
    matched = 1
    while matched < LONGEST_MATCH and len(last):
        longer = last[(last >= matched) & (text[last - matched] == text[-1 - matched])]
        if not len(longer):
            break
        last, matched = longer, matched + 1
    if matched < SHORTEST_MATCH:
        return text[:0]
    start = last[-1] + 1
    return text[start + np.arange(k) % (len(text) - start)]


def num_kept(draws: Sequence[int], drafts: Sequence[int], end_token: int | None) -> int:
    """Count the draws that follow the text: up to the first that differs from its draft, or ends the text."""
    for place, draft in enumerate(drafts):
        if draws[place] != draft or draft == end_token:
            return place + 1
    return len(drafts) + 1


def next_limit(limit: float, drafted: int, accepted: int) -> float:
    """How many tokens a row may draft next: twice as many after all were accepted, half as many after none. Below 1, it
    is one token in that fraction of the steps."""
    if accepted == drafted:
        return min(2 * max(1.0, limit), MAX_DRAFT)
    return limit if accepted else max(limit / 2, MIN_DRAFT)


class Speculation:
    """How much each row of a batch drafts, by what was accepted of it so far, and the sums of all."""

    reads_hidden = False  # whether `observe` needs the residual stream of every pass
    caches: Sequence[Cache] = ()  # besides the model's, to grow with them
    shortfall = "the text repeats itself too little, and is written sooner without it"

    def __init__(self, batch_size: int):
        self.limits = [FIRST_DRAFT] * batch_size
        self.waited = [0] * batch_size  # steps since the last draft
        self.passes = 0  # of the model, over all rows
        self.steps = 0  # of each row
        self.tokens = 0
        self.drafted = 0
        self.accepted = 0

    def draft(self, row: int, text: np.ndarray, room: int) -> list[int]:
        """Draft at most `room` tokens that may follow a text (n,); none where nothing is found, or it is not due."""
        k = self.allowed(row, room)
        return look_up(text, k).tolist() if k else []

    def allowed(self, row: int, room: int) -> int:
        """How many tokens a row may draft in this step, at most `room`; 0 where none is due."""
        limit = self.limits[row]
        self.waited[row] += 1
        return 0 if self.waited[row] * limit < 1 else max(0, min(max(1, int(limit)), room))

    def drafts(self, tokens: Tensor, lengths: Tensor, rooms: Sequence[int], draw: Draw) -> list[list[int]]:
        """Draft for each row of tokens (B, >= longest), of which `lengths` (B,) are its text, at most `rooms`."""
        texts = tokens.cpu().numpy()
        rows = enumerate(zip(lengths.tolist(), rooms, strict=True))
        return [self.draft(row, texts[row, :length], room) for row, (length, room) in rows]

    def observe(self, at: Placement, stream: Tensor) -> None:
        """Called after each pass of the model over tokens `at` some places, with its residual stream (B, T, d)."""

    def limit_after(self, limit: float, drafted: int, accepted: int) -> float:
        """How many tokens a row may draft after a step."""
        return next_limit(limit, drafted, accepted)

    def draft_little(self) -> None:
        """Let no row draft more than if nothing had been accepted for long."""
        self.limits = [MIN_DRAFT] * len(self.limits)
        self.waited = [0] * len(self.limits)

    def judge(self, row: int, draws: Sequence[int], drafts: Sequence[int], end_token: int | None) -> int:
        """Count the draws to keep, and adapt to them what the row drafts next."""
        kept = num_kept(draws, drafts, end_token)
        accepted = sum(draw == draft for draw, draft in zip(draws[:kept], drafts, strict=False))
        if drafts:
            self.limits[row] = self.limit_after(self.limits[row], len(drafts), accepted)
            self.waited[row] = 0
        self.steps += 1
        self.tokens += kept
        self.drafted += len(drafts)
        self.accepted += accepted
        return kept

    @property
    def pays_from(self) -> float:
        """Tokens per pass from which drafts are worth their time."""
        return PAYS_FROM * (1 if len(self.limits) == 1 else 1.5)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a pass gave a row, in the mean."""
        return self.tokens / max(1, self.steps)

    def remark(self) -> str | None:
        """Say in a line where drafts cost more than they saved, by the rule of PAYS_FROM; None where they did not."""
        if not self.drafted or self.tokens_per_step >= self.pays_from:
            return None
        found = f"{self.tokens_per_step:.2f} tokens per pass"
        return f"--speculate: {found}: {self.shortfall}"

    def stats(self) -> dict[str, float | None]:
        """What was drafted and accepted, by name. None where there is nothing to divide by."""
        return {
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "accepted_share": round(self.accepted / self.drafted, 3) if self.drafted else None,
            "tokens_per_step": round(self.tokens_per_step, 2) if self.steps else None,
        }
