"""Initialisation of a model's weights, applied from outside: the constructor draws nothing, so that a model whose
weights are loaded draws none to overwrite them."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.layout import Kind, ParamLayout, Role
from model.transformer import ModelConfig, TransformerLM


@torch.no_grad()
def initialise(model: TransformerLM, seed: int) -> TransformerLM:
    """Initialise the weights in place, each matrix from a generator seeded by (seed, its name): models that differ in
    one part share the weights of the rest. The same seed gives the same float32 weights on every kernel, device and
    precision.

    The std is 1/sqrt(fan-in) for matrices and 1/sqrt(d_model) for embeddings, whose rows so have a norm of about one.
    Norms start at one, but for the last (_initialise_final_norm). Biases start at zero. So do the matrices that write
    to the residual stream, and every block begins as the identity (Zhang et al. 2019, arXiv:1901.09321); without
    `zero_init` their std is divided by sqrt(2 · n_layers), so that together they add about as much as one alone would
    (Radford et al. 2019, section 2.3).
    """
    layouts = model.layout()
    for name in layouts:
        model.get_parameter(name).copy_(initial_weight(model, layouts, name, seed))
    return model


def initial_weight(model: TransformerLM, layouts: Mapping[str, ParamLayout], name: str, seed: int) -> Tensor:
    """What a parameter begins with, as `initialise` says, whole, whatever of it the model holds: of the model's own
    weights only those are read that are constructed with what they begin with, as norms are. layouts: the model's."""
    parameter, layout, config = model.get_parameter(name), layouts[name], model.config
    if layout.kind is Kind.VECTOR:
        c = _final_norm_scale(model) if any(parameter is norm for norm in _final_norms(model)) else None
        return parameter.detach() if c is None else torch.full_like(parameter, c)
    is_residual_output = layout.role is Role.RESIDUAL_OUTPUT
    if layout.kind is Kind.BIAS or (is_residual_output and config.zero_init):
        return torch.zeros((), device="cpu").expand(parameter.shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    weight = torch.empty(parameter.shape, device="cpu").normal_(0, layout.fan_in**-0.5, generator=generator)
    if is_residual_output:
        weight /= math.sqrt(2 * config.n_layers)
    if layout.role in (Role.EMBEDDING, Role.HEAD):
        weight[model.vocab_size :] = 0
    return weight


def _final_norms(model: TransformerLM) -> list[Tensor]:
    """The weights of the norms ahead of the LM head."""
    return [norm.weight for norm in ([model.norm] if model.mtp is None else [model.norm, model.mtp.norm])]


def _final_norm_scale(model: TransformerLM) -> float | None:
    """What the weight of the norm ahead of the LM head begins with: c / sqrt(d), c = own_logit_init, so that the first
    loss is about ln V. None: what it is constructed with.

    Where every block begins as the identity, the hidden state x ahead of that norm is the embedding e of its token, a
    row of norm one. With a weight g the norm gives g · sqrt(d) · e, and with tied embeddings the token's own logit is
    g · sqrt(d), each of the others normal with std g, and the target's zero on average. So

        loss ≈ ln((V - 1) e^(g² / 2) + e^(g · sqrt(d)))

    With g = 1 it is 11.4 at d = 128 and V = 4096, and 19.6 at d = 384: each token predicts itself. With
    g = c / sqrt(d) the width is left in c² / 2d only: at c = 1 it is 8.322 and 8.320, and ln V is 8.318. Blocks that
    do more turn x away from e, which makes the own logit smaller; the logits of an untied head have the std g.

    The embeddings stay as they are, and with them what the blocks read, and what the optimizer's rate is measured by.
    The weight learns its size: in d / 2 steps or more to be one, at AdamW's rate of 2 / d beside Muon."""
    c = model.config.own_logit_init
    assert c != "auto", "a Run fills it in"
    return None if c is None else c * model.config.d_model**-0.5


def initialised(config: ModelConfig, vocab_size: int, seed: int = 0, *, causal: bool = True) -> TransformerLM:
    """Build a model with freshly initialised weights, on the CPU. causal: see TransformerLM."""
    return initialise(TransformerLM(config, vocab_size, causal=causal), seed)


class _UndefinedOnMeta(TorchFunctionMode):
    """Within its `with` block what torch.empty makes is on the meta device: what is undefined takes no memory."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        return function(*args, **(given | {"device": "meta"} if function is torch.empty else given))


def without_matrices(config: ModelConfig, vocab_size: int) -> TransformerLM:
    """Build a model whose matrices are on the meta device, without memory; norms and buffers are there. It is for
    processes of which each takes some rows of every matrix."""
    with _UndefinedOnMeta():
        return TransformerLM(config, vocab_size)
