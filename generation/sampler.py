"""Which token comes next: pure functions from logits, and one uniform number per row, to tokens."""

import torch
from pydantic import Field
from torch import Tensor

from common.settings import FrozenSettings

NO_TOKEN = -1  # what a row gives that is no distribution


def no_distribution(logits: Tensor) -> Tensor:
    """(B, V) -> (B,) bool: rows with a NaN, and those that rule out every token, all of their logits being -inf. A
    softmax of either is NaN throughout."""
    return logits.isnan().any(-1) | logits.isneginf().all(-1)


def share_infinity(logits: Tensor) -> Tensor:
    """(B, V) -> the same, but where logits of a row are +inf, these at 0 and the others at -inf: the limit of a softmax
    as they grow alike. Of inf - inf it would make NaN."""
    infinite = logits.isposinf()
    shared = torch.where(infinite, 0.0, float("-inf")).to(logits)
    return torch.where(infinite.any(-1, keepdim=True), shared, logits)


def penalise_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V), seen (B, V) bool -> the same with the logits of seen tokens divided by the penalty where they are
    positive and multiplied by it where they are not (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) -> the same with the tokens less likely than p times the likeliest at -inf (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.max(-1, keepdim=True).values, float("-inf"))


class Sampler(FrozenSettings):
    """Chooses the next token. What it is told applies in this order: repetition penalty, temperature, top-k, top-p,
    min-p; each filter sees the distribution that the ones before it left."""

    repetition_penalty: float = Field(1.0, ge=1, le=100)  # 1 is none
    temperature: float = Field(1.0, ge=0)  # 0 is greedy: the likeliest token, which no filter would remove
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)

    def __call__(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """logits (B, V), uniform (B,) numbers in [0, 1) -> tokens (B,), by inverting the distribution function;
        NO_TOKEN for a row of logits that is none. +inf is certain, -inf impossible.

        seen (B, V) bool: the tokens that a row's text holds; only a repetition penalty asks for them.
        """
        undefined, logits = no_distribution(logits), share_infinity(logits.double())
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError(f"repetition_penalty={self.repetition_penalty} needs to know which tokens were seen")
            logits = penalise_seen(logits, seen, self.repetition_penalty)
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
