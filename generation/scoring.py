"""Scoring of a text: the cross-entropy of its tokens under a model, in nats per token and bits per byte."""

import math
from typing import Any

import torch
from torch import nn

from common.errors import NotFinite, UserError
from data.batches import Batch, count_windows, evaluation_batches
from data.shards.token_files import TokenStream
from data.tokenizers.base import Tokenizer
from model.score import Score, score_batches, token_losses

BATCH_WINDOWS = 8  # of one forward pass


def score_text(model: nn.Module, tokenizer: Tokenizer, text: str, context_length: int) -> Score:
    """Score a text in consecutive windows of the context length. Unlike validation, it also scores the tail that fills
    no window. Every token but the first is predicted once, from those before it in
    its window; the first one's bytes do not count. Raises UserError where there is nothing to predict."""
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise UserError("the text is empty or a single token, which leaves nothing to predict: score a longer one")
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
    whole = TokenStream([tokens])
    rest = tokens[count_windows(whole, context_length) * context_length :]
    batches = evaluation_batches(whole, context_length, BATCH_WINDOWS)
    if len(rest) > 1:
        batches += evaluation_batches(TokenStream([rest]), len(rest) - 1, 1)
    return score_batches(model, (read() for read in batches), byte_lengths)


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


def as_line(score: Score) -> str:
    """Format the score as one line of text."""
    return (
        f"{score.loss:.4f} nats per token, {score.bpb:.4f} bits per byte, "
        f"{score.tokens:,} tokens predicted, {score.text_bytes:,} bytes"
    )


def as_json(score: Score) -> dict[str, Any]:
    """Convert the score to JSON values, not rounded; null for a number that is not finite."""
    numbers = {"nats_per_token": score.loss, "bpb": score.bpb}
    finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return finite | {"tokens": score.tokens, "bytes": score.text_bytes}
