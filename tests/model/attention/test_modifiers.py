"""What is written once for every attention: a modifier of the heads, and what one layer hands to the next."""

import pytest
import torch
from torch import nn

from model.attention.base import Attention
from model.attention.gqa import GQA, GQAConfig
from model.attention.mla import MLA, MLAConfig
from model.initialise import initialised
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.layout import Role, linear
from model.linear import Linear
from model.transformer import TransformerLM
from runtime.activation_checkpointing import checkpoint_activations
from tests.model.attention import laws
from tests.support import logits_of, relative_error, sharpened, small_config, some_tokens


class Gate(Attention):
    """A head output gate (arXiv:2505.06708), y ∘ σ(W x), in front of any attention's class."""

    def modify(self, heads, x, ctx):
        return heads * torch.sigmoid(self.gate_proj(x)).view_as(heads)

    def layout(self):
        return super().layout() | linear("gate_proj", self.gate_proj, Role.GATE)


class ValueResidual(GQA):
    """Mixes the first layer's values into those of every other one (arXiv:2410.17897), before they are cached."""

    def heads(self, x, ctx, cache, carried):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        first = v if carried is None else carried
        q, k = ctx.rotated(self.q_norm(q), self.rope), ctx.rotated(self.k_norm(k), self.rope)
        return self.core(q, {"k": k, "v": (v + first) / 2}, ctx, cache)._replace(carried=first)


class GatedGQA(Gate, GQA):
    pass


class GatedMLA(Gate, MLA):
    pass


def with_gate(attention: nn.Module) -> nn.Module:
    attention.gate_proj = Linear(attention.o_proj.out_features, attention.o_proj.in_features, bias=False)
    return attention


class ValueResidualConfig(GQAConfig):
    def build(self, dimensions, kernel, causal=True):
        return ValueResidual(self, dimensions, kernel, causal)


class GatedGQAConfig(GQAConfig):
    def build(self, dimensions, kernel, causal=True):
        return with_gate(GatedGQA(self, dimensions, kernel, causal))


class GatedMLAConfig(MLAConfig):
    def build(self, dimensions, kernel, causal=True):
        return with_gate(GatedMLA(self, dimensions, kernel, causal))


VARIANTS = {
    "value residual": (ValueResidualConfig, ("attention=gqa",)),
    "value residual, window": (ValueResidualConfig, ("attention=mha", "attention.window=5")),
    "gate": (GatedGQAConfig, ("attention=gqa",)),
    "gate, MLA": (GatedMLAConfig, ("attention=mla",)),
    "gate, absorbed MLA": (GatedMLAConfig, ("attention=mla", "attention.execution=absorbed")),
}
DEEPER = {"n_layers": 3}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def model_of(variant: str, kernel=None, **fields) -> TransformerLM:
    cls, overrides = VARIANTS[variant]
    config = small_config(*overrides, kernel=kernel, **DEEPER, **fields)
    attention = cls(**config.attention.model_dump())
    return sharpened(initialised(config.model_copy(update={"attention": attention}), 100))


@every_variant
@pytest.mark.parametrize("kernel", [pytest.param(Naive(), marks=pytest.mark.slow), SDPA()], ids=["naive", "sdpa"])
def test_modified_attention_obeys_the_laws(variant, kernel):
    laws.check_causality(model_of(variant, kernel, tie_embeddings=False))
    laws.check_cached(model_of(variant, kernel), model_of(variant))
    laws.check_ragged(model_of(variant, kernel), model_of(variant))
    laws.check_packed_documents(model_of(variant, kernel))


@every_variant
def test_modified_attention_recomputed_in_backward_gives_equal_gradients(variant):
    tokens, gradients = some_tokens(2, 20), []
    for recomputes in (False, True):
        model = model_of(variant)
        if recomputes:
            checkpoint_activations(model)
        logits_of(model, tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@every_variant
def test_modified_attention_computes_something_else(variant):
    _, overrides = VARIANTS[variant]
    model, tokens = model_of(variant), some_tokens(2, 20)
    unmodified = TransformerLM(small_config(*overrides, **DEEPER), 100)
    unmodified.load_state_dict(model.state_dict(), strict="gate" not in variant)
    assert relative_error(logits_of(model, tokens), logits_of(unmodified, tokens)) > 1e-2


def test_value_residual_carries_the_first_layers_values_past_layers_that_carry_nothing():
    model = model_of("value residual")
    model.layers[1].attention.__class__ = GQA  # as in a stack of different attentions
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[2]))
    model(some_tokens(1, 8))
    assert seen[0] is not None and all(carried is seen[0] for carried in seen)
