"""Sampling of the next token: pure functions from logits, and one uniform random number per row, to tokens."""

import torch
from pydantic import Field
from torch import Tensor

from common.settings import FrozenSettings
from generation.defaults import SAMPLING

NO_TOKEN = -1  # sampled from a row whose logits define no distribution


def has_no_distribution(logits: Tensor) -> Tensor:
    """Rows of logits (B, V) whose softmax is NaN throughout -> (B,) bool: those with a NaN, and those that rule out
    every token, all of their logits being -inf."""
    return logits.isnan().any(-1) | logits.isneginf().all(-1)


def resolve_infinite_logits(logits: Tensor) -> Tensor:
    """Logits (B, V) with the same limit of their softmax, but no +inf: where a row has some, these are 0 and its others
    -inf. Softmax itself would make NaN of inf - inf."""
    infinite = logits.isposinf()
    shared = torch.where(infinite, 0.0, float("-inf")).to(logits)
    return torch.where(infinite.any(-1, keepdim=True), shared, logits)


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

    def __call__(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Sample by inverting the cumulative distribution: logits (B, V), uniform (B,) numbers in [0, 1) -> tokens
        (B,); NO_TOKEN for a row without a distribution. +inf is certain, -inf impossible.

        seen (B, V) bool: the tokens in each row's context; only a repetition penalty asks for them.
        """
        undefined = has_no_distribution(logits)
        logits = resolve_infinite_logits(logits.double())
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError(f"repetition_penalty={self.repetition_penalty} needs to know which tokens were seen")
            logits = apply_repetition_penalty(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1).masked_fill(undefined, NO_TOKEN)
        logits = (logits - logits.max(-1, keepdim=True).values) / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        cumulative = logits.softmax(-1).cumsum(-1)
        threshold = uniform[:, None].to(cumulative) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return tokens.masked_fill(undefined, NO_TOKEN)
