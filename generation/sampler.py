"""Sampling of the next token: pure functions from logits seeds and indices to tokens."""

import torch
from pydantic import Field
from torch import Tensor

from common.settings import FrozenSettings
from generation.defaults import SAMPLING
from generation.gumbel import gumbel

NO_TOKEN = -1  # sampled from a row whose logits define no distribution
LARGE_VOCABULARY = 4096  # where noise for every token takes longer than to find those that top-k keeps


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty: logits (B, V) of the seen tokens, (B, V) bool, are divided by the penalty where positive and
    multiplied by it where not (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Top-k filter (Fan et al. 2018, arXiv:1805.04833): all logits (B, V) but the k largest, and their
    equals, become -inf."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (top-p) filter (Holtzman et al. 2020, arXiv:1904.09751, section 3.1): all logits (B, V) but those of the
    fewest tokens whose probabilities together reach p become -inf."""
    ordered, order = logits.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    surplus = probs.cumsum(-1) - probs >= p  # what precedes a token already reaches p
    surplus[..., 0] = False
    return ordered.masked_fill(surplus, float("-inf")).gather(-1, order.argsort(-1))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Min-p filter (Nguyen et al. 2024, arXiv:2407.01082): the logits (B, V) of tokens less likely than p times the
    most likely token become -inf."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.max(-1, keepdim=True).values, float("-inf"))


class Sampler(FrozenSettings):
    """Sampling settings, and the choice of the next token by them. They apply in this order: repetition penalty,
    temperature, top-k, nucleus (top-p), min-p; each filter sees the distribution that the ones before it left."""

    repetition_penalty: float = Field(SAMPLING["repetition_penalty"], ge=1, le=100)  # 1 is none
    temperature: float = Field(SAMPLING["temperature"], ge=0)  # 0 is greedy: the most likely token, filtered or not
    top_k: int | None = Field(SAMPLING["top_k"], ge=1)
    top_p: float | None = Field(SAMPLING["top_p"], ge=0, le=1)
    min_p: float | None = Field(SAMPLING["min_p"], ge=0, le=1)

    def __call__(self, logits: Tensor, hashed_seeds: Tensor, indices: Tensor, seen: Tensor | None = None) -> Tensor:
        """Sample the tokens at the indices (B,) of texts: logits (B, V) -> (B,), on their device; NO_TOKEN for a row
        without a distribution, which has a NaN or rules out every token. +inf is certain, -inf impossible.

        hashed_seeds (B,): as `generation.gumbel.hash_seeds` makes them.
        seen (B, V) bool: the tokens in each row's context; only a repetition penalty asks for them.
        """
        logits = logits.float() if logits.device.type == "mps" else logits.double()  # which mps does not have
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError(f"repetition_penalty={self.repetition_penalty} needs to know which tokens were seen")
            logits = apply_repetition_penalty(logits, seen, self.repetition_penalty)
        largest, tokens = logits.max(-1)  # NaN where any is
        if self.temperature != 0:
            drawable, tokens_of = self._drawable(self._divided(logits - largest[:, None]))
            noise = gumbel(hashed_seeds, indices, tokens_of)
            drawn = (self._filtered(drawable) + noise).argmax(-1, keepdim=True)
            tokens = tokens_of.expand(len(drawn), -1).gather(-1, drawn)[:, 0]
        return tokens.where(largest > float("-inf"), NO_TOKEN)

    def _divided(self, logits: Tensor) -> Tensor:
        """Divide by the temperature, in place, logits (B, V) of which the largest in each row is 0."""
        logits = logits.nan_to_num_(0.0, neginf=float("-inf"))  # inf - inf: where tokens are certain
        limits = torch.finfo(logits.dtype)
        return logits.div_(min(max(self.temperature, limits.tiny), limits.max))

    def _drawable(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the tokens that top-k keeps, and those tokens, both (B, k): noise for them alone is less work
        in large vocabularies. Where equals make them more than k, and on other devices than CPUs, which would wait to
        know: the logits (B, V) as they are, and all tokens (V,)."""
        vocab_size = logits.shape[-1]
        if self.top_k is not None and self.top_k < vocab_size >= LARGE_VOCABULARY and logits.is_cpu:
            largest, tokens = logits.topk(self.top_k + 1)
            if (largest[:, -1] < largest[:, -2]).all():
                tokens = tokens[:, :-1].sort(-1).values  # as in the whole vocabulary, where filters break ties by it
                return logits.gather(-1, tokens), tokens
        return logits, torch.arange(vocab_size, device=logits.device)

    def _filtered(self, logits: Tensor) -> Tensor:
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits
