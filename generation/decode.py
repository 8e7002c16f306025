"""Autoregressive decoding through KV caches: the one loop for every attention."""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import NotFinite
from generation.sampler import NO_TOKEN, Sampler
from generation.state import GenerationState, bucket
from model.cache import Cache
from model.placement import PADDING_POSITION, Placement
from model.transformer import TransformerLM

ENDED = -1  # what `generate` yields, in place of a token, for a row that has ended


@torch.no_grad()
def generate(
    model: TransformerLM, state: GenerationState, sampler: Sampler, *, max_new_tokens: int, end_token: int | None = None
) -> Iterator[Tensor]:
    """Generate text: yield the next token of every row, (B,) int64 on the CPU, up to max_new_tokens times, after
    appending it to `state`.

    A row's text does not depend on the other rows of the batch (except where two tokens are equally likely up to
    rounding, which bfloat16 has a lot of). It ends after `end_token`, which is yielded, when its context is full, or
    when the caller sets `state.alive[row] = False`; from then on ENDED is yielded for it. When all rows have ended, the
    iteration ends. A row for which the model's output is no distribution ends too (`state.not_finite`); the others go
    on, and NotFinite is raised at the end of the iteration.
    """
    broken = torch.zeros_like(state.alive)
    for _ in range(max_new_tokens):
        if not state.alive.any():
            break
        logits = next_logits(model, state).float().cpu()
        seen = state.seen_tokens(model.vocab_size) if sampler.repetition_penalty != 1 else None
        tokens = sampler(logits, state.seeds, state.indices, seen)
        broken |= state.alive & (tokens == NO_TOKEN)
        state.not_finite |= broken
        state.alive &= ~broken
        if broken.any() and not state.alive.any():
            break
        tokens = tokens.where(state.alive, ENDED)
        state.append_token(tokens)
        if end_token is not None:
            state.alive &= tokens != end_token
        yield tokens
    if broken.any():
        row = int(broken.nonzero()[0])
        which = f" of text {row + 1}" if len(broken) > 1 else ""
        raise NotFinite(f"the model's output is not finite after {int(state.lengths[row])} tokens{which}")


def next_logits(model: TransformerLM, state: GenerationState) -> Tensor:
    """Logits (B, V) after each live row's last token, computed from the tokens that are not in the KV caches yet, and
    cache these."""
    caches = state.caches
    device = next(model.parameters()).device
    longest = int(state.lengths.max())
    for cache in caches or []:
        if cache.capacity < longest:
            cache.grow(max(2 * cache.capacity, bucket(longest)))
    if caches is None or not state.num_cached.any():
        logits = _prefill(model, state.tokens.to(device), state.lengths.to(device), caches)
    else:
        new = (state.lengths - state.num_cached) * state.alive
        ahead = torch.arange(int(new.max()))
        index = state.num_cached[:, None] + ahead  # (B, T)
        positions = index.where(ahead < new[:, None], PADDING_POSITION)
        tokens = state.tokens.gather(1, index.clamp(max=state.context_length - 1))
        last = (new[:, None] - 1).clamp(min=0).to(device) if len(ahead) > 1 else None
        logits = decode_step(model, tokens.to(device), positions.to(device), caches, bucket(longest), last)
    state.num_cached = state.lengths.where(state.alive, state.num_cached)
    return logits


def _prefill(model: TransformerLM, text: Tensor, lengths: Tensor, caches: list[Cache] | None = None) -> Tensor:
    """Logits (B, V) after each row's last token from the whole text, filling the KV caches where there are any.

    Rows shorter than the longest are padded on the right, so the batch is contiguous: no real token sees the padding.
    """
    at = Placement.prefill(lengths, caches)
    hidden = model(text[:, : at.positions.shape[1]], at)
    return model.logits(hidden.x.take_along_dim(lengths[:, None, None] - 1, dim=1))[:, 0]


def decode_step(
    model: TransformerLM,
    tokens: Tensor,
    positions: Tensor,
    caches: list[Cache],
    kv_len: int,
    last: Tensor | None = None,
) -> Tensor:
    """Decode new tokens (B, T) at positions (B, T) -> logits (B, V) after the first of each row, or after that of index
    `last` (B, 1)."""
    x = model(tokens, Placement.decode(positions, caches, kv_len)).x
    return model.logits(x[:, :1] if last is None else x.take_along_dim(last[..., None], dim=1))[:, 0]
