"""Costs in closed form, held against what is counted when a model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batches import document_positions
from model import cost
from model.initialise import initialised
from model.mask import CAUSAL, Mask
from model.transformer import ModelConfig, TransformerLM
from tests.support import (
    ATTENTIONS,
    CASES,
    DISTINCT,
    composed_run,
    logits_of,
    mostly_slow,
    small_config,
    some_tokens,
)

MLPS = [("mlp=gelu",), ("mlp=relu",), ("mlp=swiglu", "model.tie_embeddings=false")]  # relu2 is what the others have
EXECUTIONS = [case for case in CASES if any("execution" in part for part in case)]
VOCAB = 100


@pytest.mark.parametrize("case", mostly_slow([*CASES, *MLPS], often=[*DISTINCT, *EXECUTIONS[:2], *MLPS]))
def test_cost_in_closed_form_equals_that_of_the_model(case):
    """Parameters by part, operations and the cache's bytes."""
    config = small_config(*case)
    model = initialised(config, VOCAB)
    check_parameters(config, model, learned=64 * 64 if "position=learned" in case else 0)
    check_flops(config, model)
    caches = model.make_caches(3, 7)
    held = sum(column[:, 1:].nbytes / (3 * cache.rows) for cache in caches for column in cache.columns.values())
    assert cost.cache_bytes_per_token(cost.on_meta(config, VOCAB)) == held


def check_parameters(config: ModelConfig, model: TransformerLM, learned: int) -> None:
    """learned: of positions."""
    parts = cost.parameters(cost.on_meta(config, VOCAB))
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["embedding"] == model.embedding.weight.numel() + learned
    assert parts["head"] == (0 if config.tie_embeddings else model.head.weight.numel())
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert parts["mlp"] == sum(p.numel() for layer in model.layers for p in layer.mlp.parameters())


def check_flops(config: ModelConfig, model: TransformerLM) -> None:
    """To the last one, forward and backward, on the naive kernel. One thing is counted differently: cost.flops takes
    the pairs that the mask shows, (T + 1) / 2 keys a query where causal; the naive kernel computes all T and hides
    some, so here it is asked for T. The backward pass of an indexer is that of its own loss, which is left out here."""
    tokens = some_tokens(2, config.context_length, VOCAB)
    predicted = cost.flops(config, VOCAB)
    with FlopCounterMode(display=False) as counter:
        logits = logits_of(model, tokens)
        assert counter.get_total_flops() == tokens.numel() * predicted.forward(keys=config.context_length)
        logits.sum().backward()
    indexers = model.indexers().values()
    matrices = sum(p.numel() for one in indexers for p in one.parameters() if p.ndim == 2)
    of_indexers = 2 * matrices + 2 * config.context_length * sum(one.macs_per_pair for one in indexers)
    executed = predicted.training(keys=config.context_length) - 2 * of_indexers
    assert counter.get_total_flops() == tokens.numel() * executed


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters", "active"),
    [
        ("gpt2", 50257, 124_439_808, 124_439_808),
        ("qwen2_5_32b", 152064, 32.76e9, 32.76e9),  # as its values' biases, 65,536 numbers, were counted
        ("deepseek_v3", 129280, 671.0e9, 37.5e9),
        ("kimi_k2", 163840, 1026e9, 32.8e9),
    ],
)
def test_published_shapes_have_as_many_parameters_as_their_models(name, vocab_size, parameters, active):
    model = cost.on_meta(composed_run(f"experiment=shape/{name}").model, vocab_size)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == pytest.approx(parameters, rel=5e-3)
    assert cost.active_parameters(model) == pytest.approx(active, rel=5e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flops_keys_of_a_causal_mask_are_half_the_window(attention):
    config = small_config(f"attention={attention}")
    predicted = cost.flops(config, VOCAB)
    assert predicted.keys == (config.context_length + 1) / 2
    assert predicted.forward() == predicted.per_token + predicted.per_pair * 32.5
    assert predicted.training() == 3 * predicted.forward()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flops_with_documents_count_the_pairs_within_them(attention):
    config, length = small_config(f"attention={attention}"), 64
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[0, ::16] = tokens[1, 32] = 9  # four documents of 16 tokens, and two of 32
    predicted = cost.flops(config, VOCAB, document_positions(tokens, document_start=9))
    assert predicted.keys == (17 / 2 + 33 / 2) / 2
    assert predicted.forward() == predicted.per_token + predicted.per_pair * 12.5


def test_flops_keys_follow_the_predicate_of_the_mask(monkeypatch):
    """So that a mask that hides more costs less, without a word here."""
    visible = Mask.visible_in

    def two_keys(mask: Mask, rows: slice, keys: slice) -> torch.Tensor:
        return visible(mask, rows, keys) & (mask.q_pos[:, rows, None] - mask.k_pos[:, None, :] < 2)

    monkeypatch.setattr(Mask, "visible_in", two_keys)
    assert cost.flops(small_config(), VOCAB).keys == (1 + 63 * 2) / 64


def test_flops_of_gpt2_equal_the_formulas_by_hand():
    """d_model 768, 12 heads of 64, 12 layers, T = 1024: scores and values, 2 · 12 · (64 + 64) a pair and layer, however
    few the key heads; MLA as wide when expanded, c + r = 240 twice when absorbed."""
    for attention, width in {"mha": 128, "gqa": 128, "mqa": 128, "mla": 128}.items():
        config = composed_run("model=gpt2", "batch_tokens=1024", f"attention={attention}").model
        assert cost.flops(config, 50257).per_pair == 12 * 2 * 12 * width
    absorbed = composed_run("model=gpt2", "batch_tokens=1024", "attention=mla", "attention.execution=absorbed").model
    assert cost.flops(absorbed, 50257).per_pair == 12 * 2 * 12 * 2 * 240
    mha = composed_run("model=gpt2", "batch_tokens=1024", "attention=mha", "mlp=gelu").model
    assert cost.flops(mha, 50257).per_token == 2 * (12 * 12 * 768**2 + 50304 * 768)


def test_flops_keys_of_a_long_window_are_sampled_within_a_thousandth():
    for length in (4096, 5000, 20000):
        found = cost._visible(CAUSAL, torch.arange(length)[None])
        assert found == pytest.approx((length + 1) / 2, rel=1e-9 if length == 4096 else 1e-3)
