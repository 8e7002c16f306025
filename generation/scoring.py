"""Scoring of a text: the cross-entropy of its tokens under a model, in nats per token and bits per byte, and how each
was predicted."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from common.errors import NotFinite, UserError
from common.streams import print_stderr
from data.batches import Batch, count_windows, evaluation_batches
from data.shards.token_files import TokenStream
from data.tokenizers.base import Tokenizer
from model.loss import chunked_losses
from model.placement import Placement, Windows
from model.score import Score, score_batches, token_losses

BATCH_WINDOWS = 8  # of one forward pass
MAX_LOGITS = 2**24  # numbers that exist at one time to rank tokens
SECONDS_OF_SILENCE = 10
OTHERS = 3  # likeliest tokens that are kept beside the one that came


T = TypeVar("T")


class TokenScore(NamedTuple):
    """How a token was predicted from those before it in its window. Of the text's first one, which nothing precedes,
    there is no more than the token."""

    token: int
    nats: float | None = None  # -ln of its probability
    rank: int | None = None  # 1 + the number of tokens that were more likely; None where nats are not finite
    others: tuple[tuple[int, float], ...] = ()  # the likeliest other tokens, each with its probability

    @property
    def probability(self) -> float | None:
        return None if self.rank is None else math.exp(-self.nats)


Watcher = Callable[[list[TokenScore]], None]


def score_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    context_length: int,
    watchers: Sequence[Watcher] = (),
    begin: Callable[[], None] | None = None,
) -> Score:
    """Score a text in consecutive windows of the context length. Unlike validation, it also scores the tail that fills
    no window. Every token but the first is predicted once, from those before it in its window; the first one's bytes do
    not count. watchers: called with every token of the text, in order, those of a few windows at a time.
    begin: called before the first. Raises UserError where there is nothing to predict."""
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise UserError("the text is empty or a single token, which leaves nothing to predict: score a longer one")
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
    whole = TokenStream([tokens])
    rest = tokens[count_windows(whole, context_length) * context_length :]
    batches = evaluation_batches(whole, context_length, BATCH_WINDOWS)
    if len(rest) > 1:
        batches += evaluation_batches(TokenStream([rest]), len(rest) - 1, 1)
    if begin is not None:
        begin()
    for watch in watchers:
        watch([TokenScore(int(tokens[0]))])
    losses = _watched(watchers) if watchers else token_losses
    return score_batches(model, (read() for read in _announced(batches)), byte_lengths, losses)


def _announced(batches: Sequence[T]) -> Iterator[T]:
    """The batches, with a line on stderr now and then, of how far one is."""
    said = time.monotonic()
    for done, batch in enumerate(batches):
        if time.monotonic() - said > SECONDS_OF_SILENCE:
            said = time.monotonic()
            print_stderr(f"[{done / len(batches):.0%} of the text is scored]")
        yield batch


def _watched(watchers: Sequence[Watcher]) -> Callable[[nn.Module, Windows], Tensor]:
    """Make a function that returns the same numbers as token_losses, after handing what it finds of each token to the
    watchers."""

    def losses(model: nn.Module, batch: Windows) -> Tensor:
        hidden = model(batch.inputs, Placement.of_batch(batch)).x
        nats = chunked_losses(hidden, model.lm_head, batch.targets)
        scores = list(_token_scores(model, hidden.flatten(0, 1), batch.targets.flatten(), nats.flatten()))
        for watch in watchers:
            watch(scores)
        return nats

    return losses


def _token_scores(model: nn.Module, hidden: Tensor, targets: Tensor, nats: Tensor) -> Iterator[TokenScore]:
    """hidden (N, d), targets (N), nats (N) -> N scores, from logits of a part of the tokens at a time."""
    size = max(1, MAX_LOGITS // model.vocab_size)
    for x, target, lost in zip(hidden.split(size), targets.split(size), nats.split(size), strict=True):
        logits = model.logits(x).float()  # (n, V)
        ranks = 1 + (logits > logits.gather(1, target[:, None])).sum(1)  # (n,)
        likeliest = logits.topk(min(OTHERS + 1, model.vocab_size))  # (n, 4): one of them may be the target
        probabilities = (likeliest.values - logits.logsumexp(1, keepdim=True)).exp()
        table = (target, lost, ranks, likeliest.indices, probabilities)
        for token, loss, rank, *found in zip(*(column.tolist() for column in table), strict=True):
            if not math.isfinite(loss):
                yield TokenScore(token, loss)
                continue
            others = tuple(pair for pair in zip(*found, strict=True) if pair[0] != token)
            yield TokenScore(token, loss, rank, others[:OTHERS])


@torch.no_grad()
def check_finite(score: Score, model: nn.Module, tokenizer: Tokenizer, text: str, context_length: int) -> None:
    """Raise NotFinite, naming the first token, where the score of the text is NaN or infinite."""
    if math.isfinite(score.nats):
        return
    tokens = torch.from_numpy(tokenizer.encode(text).astype("int64"))[None]
    device = next(model.parameters()).device
    for start in range(0, tokens.shape[1] - 1, context_length):
        window = tokens[:, start : start + context_length + 1].to(device)
        broken = (~token_losses(model, Batch(window[:, :-1], window[:, 1:])).isfinite()).nonzero()
        if len(broken):
            index = start + 2 + int(broken[0, 1])
            raise NotFinite(f"the loss of token {index:,} of the text's {tokens.shape[1]:,} is not finite")
    raise NotFinite("the loss of the text is not finite")
