"""Where the choices of a model, of keys by an indexer and of experts by a router, are decided by more than rounding.
Where they are not, two ways to compute the same differ by any amount: with equal keys, as of a token that is repeated
where nothing tells positions apart, a last bit chooses."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.attention.indexed import IndexedAttention
from model.attention.indexer import Index
from model.moe import Router, Routes
from model.transformer import TransformerLM

ROUNDING = 1e-5  # relative changes, well above float32's
DRAWS = 24  # of two equal scores, that none of so many exchanges them is no matter of chance


def decided(model: TransformerLM, tokens: Tensor) -> Tensor:
    """(B, T) bool: where no choice, there or at an earlier place, is another one when the input of each block and the
    scores of experts change as rounding changes them."""
    exact, same = choices(model, tokens), torch.ones_like(tokens, dtype=torch.bool)
    for seed in range(DRAWS):
        for chosen, twin in zip(choices(model, tokens, Noise(seed)), exact, strict=True):
            same &= (chosen == twin).all(-1)
    return same.cumprod(1) > 0


class Noise:
    """What rounding may make of a tensor."""

    def __init__(self, seed: int):
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        return x * (1 + ROUNDING * torch.randn(x.shape, generator=self.draw))


@torch.no_grad()
def choices(model: TransformerLM, tokens: Tensor, noise: Callable[[Tensor], Tensor] = torch.clone) -> list[Tensor]:
    """What is chosen, (B, T, keys or experts) bool of each indexer and router, in the order of the forward pass."""
    found: list[Tensor] = []

    def disturb(_, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return noise(given[0]), *given[1:]

    def of_keys(attention: IndexedAttention, _, given: tuple[Any, ...], index: Index) -> None:
        mask = given[2].mask(attention.pattern, None)
        found.append(index.chosen(index.k, mask, slice(0, tokens.shape[1])) & mask.visible())

    def of_experts(router: Router, _, routes: Routes) -> None:
        experts = router.choose(noise(routes.scores))
        chosen = torch.zeros_like(routes.scores, dtype=torch.bool).scatter(1, experts, True)
        found.append(chosen.unflatten(0, tokens.shape))

    hooks = [block.register_forward_pre_hook(disturb) for block in model.layers]
    indexed = [block.attention for block in model.layers if isinstance(block.attention, IndexedAttention)]
    for attention in indexed:
        if attention.indexer is not None and not attention.indexer.warms_up:
            hooks.append(attention.indexer.register_forward_hook(functools.partial(of_keys, attention)))
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks += [router.register_forward_hook(of_experts) for router in routers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found
