"""Initialisation of a model's weights, applied from outside: the constructor draws nothing, so that a model whose
weights are loaded draws none to overwrite them."""

import hashlib
import math

import torch

from model.layout import Kind, Role
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
    for name, layout in model.layout().items():
        parameter = model.get_parameter(name)
        is_residual_output = layout.role is Role.RESIDUAL_OUTPUT
        if layout.kind is Kind.BIAS or (is_residual_output and model.config.zero_init):
            parameter.zero_()
        elif layout.kind is not Kind.VECTOR:  # norms are constructed as ones
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            weight = torch.empty(parameter.shape).normal_(0, layout.fan_in**-0.5, generator=generator)
            parameter.copy_(weight / math.sqrt(2 * model.config.n_layers) if is_residual_output else weight)
    for matrix in (model.embedding, model.head):
        if matrix is not None:
            matrix.weight[matrix.vocab_size :] = 0
    _initialise_final_norm(model)
    return model


def _initialise_final_norm(model: TransformerLM) -> None:
    """Initialise the weight of the norm ahead of the LM head with c / sqrt(d), c = own_logit_init, so that the first
    loss is about ln V.

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
    if c is not None:
        for norm in [model.norm] if model.mtp is None else [model.norm, model.mtp.norm]:  # both are ahead of the head
            norm.weight.fill_(c * model.config.d_model**-0.5)


def initialised(config: ModelConfig, vocab_size: int, seed: int = 0, *, causal: bool = True) -> TransformerLM:
    """Build a model with freshly initialised weights, on the CPU. causal: see TransformerLM."""
    return initialise(TransformerLM(config, vocab_size, causal=causal), seed)
