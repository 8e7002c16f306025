"""Decoding: the one loop for every attention."""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import NotFinite
from generation.sampler import NO_TOKEN, Sampler
from generation.state import GenerationState, bucket
from model.cache import Cache
from model.transformer import TransformerLM

ENDED = -1  # what `generate` yields for a row that has ended


@torch.no_grad()
def generate(
    model: TransformerLM, texts: GenerationState, sampler: Sampler, *, max_new_tokens: int, end_token: int | None = None
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


def next_logits(model: TransformerLM, texts: GenerationState) -> Tensor:
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
    return model(text, positions=positions, contiguous=True, caches=caches, only=lengths[:, None] - 1).logits[:, 0]


def decode_step(
    model: TransformerLM,
    tokens: Tensor,
    positions: Tensor,
    caches: list[Cache],
    kv_len: int,
    last: Tensor | None = None,
) -> Tensor:
    """New tokens (B, T) at positions (B, T) -> logits (B, V) after the first of each row, or after that of index `last`
    (B, 1)."""
    return model(tokens, positions=positions, caches=caches, kv_len=kv_len, only=last).logits[:, 0]
