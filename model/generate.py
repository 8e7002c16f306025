"""Decoding: samplers as pure functions, and the one loop for every attention."""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from model.cache import FullCache
from model.config import Config
from model.transformer import TransformerLM

ENDED = -1  # what `generate` yields for a row that has ended


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) -> the same with all but the k largest (and their equals) at -inf."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) -> the same with all but the fewest tokens whose probabilities reach p at -inf (Holtzman et al. 2020)."""
    ordered, order = logits.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    surplus = probs.cumsum(-1) - probs >= p  # what precedes a token already reaches p
    surplus[..., 0] = False
    return ordered.masked_fill(surplus, float("-inf")).gather(-1, order.argsort(-1))


class Sampler(Config):
    """Chooses the next token. Filters apply in the order temperature, top-k, top-p."""

    temperature: float = Field(1.0, ge=0)  # 0 is greedy
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, ge=0, le=1)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (B, V), uniform (B,) numbers in [0, 1) -> tokens (B,), by inverting the distribution function."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double()
        logits = (logits - logits.max(-1, keepdim=True).values) / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        cumulative = logits.softmax(-1).cumsum(-1)
        threshold = uniform[:, None].to(cumulative) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def bucket(n: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds n: few enough shapes for a compiled decode step."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


@torch.no_grad()
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    end_token: int | None = None,
    cached: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64 on the CPU, up to max_new_tokens times.

    Prompts may differ in length. Row i draws from a generator of seeds[i] alone, so its text does not depend on its
    neighbours. A row ends after `end_token`, which is yielded, or when prompt and text fill the context; from then on
    ENDED stands for it, and when all rows have ended the iteration does. `cached=False` computes the whole text
    anew for each token: the slow twin.

    Raises ValueError for an empty prompt, and for one that leaves no room in the context.
    """
    limit, device = model.config.context_length, next(model.parameters()).device
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            raise ValueError(f"a prompt of {len(prompt)} tokens: between 1 and {limit - 1} fit a context of {limit}")
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    text = torch.zeros(len(prompts), limit, dtype=torch.int64)  # padded on the right
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    caches = model.make_caches(len(prompts), bucket(int(lengths.max()) + 1)) if cached else None

    for n in range(max_new_tokens):
        if caches is None or n == 0:
            logits = _whole_text(model, text.to(device), lengths.to(device), caches)
        else:
            longest = int(lengths.max())
            for cache in caches:
                if cache.capacity < longest:
                    cache.grow(2 * cache.capacity)
            last = text.gather(1, lengths[:, None] - 1)
            positions = torch.where(alive, lengths - 1, ENDED)[:, None]  # rows that ended are padding
            logits = decode_step(model, last.to(device), positions.to(device), caches, bucket(longest))
        uniform = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
        tokens = sampler(logits.float().cpu(), uniform).where(alive, ENDED)
        yield tokens
        text[alive, lengths[alive]] = tokens[alive]
        lengths = lengths + alive
        alive = alive & (lengths < limit) & (tokens != (ENDED if end_token is None else end_token))
        if not alive.any():
            return


def _whole_text(model: TransformerLM, text: Tensor, lengths: Tensor, caches: list[FullCache] | None = None) -> Tensor:
    """Logits (B, V) after each row's last token, filling the (empty) caches where there are any.

    Rows shorter than the longest are padded on the right with positions that run on, so the batch is plain: no real
    token sees the padding, and decoding overwrites its cache rows before any query can.
    """
    text = text[:, : int(lengths.max())]
    positions = torch.arange(text.shape[1], device=text.device)[None]
    return model(text, positions=positions, plain=True, caches=caches, only=lengths[:, None] - 1).logits[:, 0]


def decode_step(
    model: TransformerLM, tokens: Tensor, positions: Tensor, caches: list[FullCache], extent: int
) -> Tensor:
    """One token (B, 1) per row at positions (B, 1) -> logits (B, V) of the next."""
    return model(tokens, positions=positions, caches=caches, extent=extent).logits[:, 0]
