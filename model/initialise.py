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

    The std is 1/sqrt(fan-in) for matrices and 1/sqrt(d_model) for embeddings, so that a tied LM head begins with
    logits of about unit size. Biases start at zero. So do the matrices that write to the residual stream, and
    every block begins as the identity (Zhang et al. 2019, arXiv:1901.09321); without `zero_init` their std is
    divided by sqrt(2 · n_layers), so that together they add about as much as one alone would (Radford et al. 2019,
    section 2.3).
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
    return model


def initialised(config: ModelConfig, vocab_size: int, seed: int = 0, *, causal: bool = True) -> TransformerLM:
    """Build a model with freshly initialised weights, on the CPU. causal: see TransformerLM."""
    return initialise(TransformerLM(config, vocab_size, causal=causal), seed)
