"""What is predicted of a model without running it, held against what is counted when it runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batches import document_positions
from model import cost
from model.kernels.sdpa import SDPA
from model.mask import Mask
from model.transformer import TransformerLM
from tests.support import ATTENTIONS, CASES, load_composed, small_config, some_tokens

MLPS = [
    (f"mlp={mlp}", f"model.tie_embeddings={tied}")
    for mlp in ("gelu", "relu", "relu2", "swiglu")
    for tied in (True, False)
]
VOCAB = 100


def label(case) -> str:
    return " ".join(case)


@pytest.mark.parametrize("case", [*CASES, *MLPS], ids=label)
def test_parameters_by_part_are_those_of_the_model(case):
    config = small_config(*case)
    model = TransformerLM(config, VOCAB)
    parts = cost.parameters(cost.on_meta(config, VOCAB))
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    learned = 64 * 64 if "position=learned" in case else 0
    assert parts["embedding"] == model.embedding.weight.numel() + learned
    assert parts["head"] == (0 if config.tie_embeddings else model.head.weight.numel())
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert parts["mlp"] == sum(p.numel() for layer in model.layers for p in layer.mlp.parameters())


@pytest.mark.parametrize("case", [*CASES, *MLPS], ids=label)
def test_flops_are_those_that_pytorch_counts(case):
    """To the last one, forward and backward, on the naive kernel: it computes all T keys of every query, and then hides
    those that the mask forbids."""
    config = small_config(*case)
    model, tokens = TransformerLM(config, VOCAB), some_tokens(2, config.context_length, VOCAB)
    predicted = cost.flops(config, VOCAB)
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens).logits
        assert counter.get_total_flops() == tokens.numel() * predicted.forward(keys=config.context_length)
        logits.sum().backward()
    assert counter.get_total_flops() == tokens.numel() * predicted.training(keys=config.context_length)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_causal_query_attends_to_half_the_window_on_average(attention):
    config = small_config(f"attention={attention}")
    predicted = cost.flops(config, VOCAB)
    assert predicted.keys == (config.context_length + 1) / 2
    assert predicted.forward() == predicted.per_token + predicted.per_pair * 32.5
    assert predicted.training() == 3 * predicted.forward()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_documents_that_do_not_see_each_other_cost_the_pairs_within_them(attention):
    config, length = small_config(f"attention={attention}"), 64
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[0, ::16] = tokens[1, 32] = 9  # four documents of 16 tokens, and two of 32
    predicted = cost.flops(config, VOCAB, document_positions(tokens, end_of_text=9))
    assert predicted.keys == (17 / 2 + 33 / 2) / 2
    assert predicted.forward() == predicted.per_token + predicted.per_pair * 12.5


def test_which_keys_count_is_what_the_mask_says(monkeypatch):
    """So that a mask that hides more costs less, without a word here."""
    visible = Mask.visible

    def two_keys(mask: Mask, rows: slice = slice(None)) -> torch.Tensor:
        return visible(mask, rows) & (mask.q_pos[:, rows, None] - mask.k_pos[:, None, :] < 2)

    monkeypatch.setattr(Mask, "visible", two_keys)
    assert cost.flops(small_config(), VOCAB).keys == (1 + 63 * 2) / 64


def test_the_formulas_by_hand():
    """d_model 768, 12 heads of 64, 12 layers, T = 1024: scores and values, 2 · 12 · (64 + 64) a pair and layer, however
    few the key heads; MLA as wide when expanded, c + r = 208 twice when absorbed."""
    for attention, width in {"mha": 128, "gqa": 128, "mqa": 128, "mla": 128}.items():
        config = load_composed("model=gpt2", "batch_tokens=1024", f"attention={attention}").model
        assert cost.flops(config, 50257).per_pair == 12 * 2 * 12 * width
    absorbed = load_composed("model=gpt2", "batch_tokens=1024", "attention=mla", "attention.execution=absorbed").model
    assert cost.flops(absorbed, 50257).per_pair == 12 * 2 * 12 * 2 * 208
    mha = load_composed("model=gpt2", "batch_tokens=1024", "attention=mha", "mlp=gelu").model
    assert cost.flops(mha, 50257).per_token == 2 * (12 * 12 * 768**2 + 50304 * 768)


def test_keys_of_a_long_window_are_counted_well_enough():
    for length in (4096, 5000, 20000):
        found = cost._visible(Mask(None, None, contiguous=True), torch.arange(length)[None])
        assert found == pytest.approx((length + 1) / 2, rel=1e-9 if length == 4096 else 1e-3)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_cache_bytes_are_those_of_the_caches(case):
    config = small_config(*case)
    caches = TransformerLM(config, VOCAB).make_caches(3, 7)
    held = sum(column[:, 1:].nbytes / (3 * cache.rows) for cache in caches for column in cache.columns.values())
    assert cost.cache_bytes_per_token(cost.on_meta(config, VOCAB)) == held


@pytest.mark.parametrize(("attention", "kernel"), list(itertools.product(ATTENTIONS, [None, SDPA()])), ids=str)
def test_the_meta_device_holds_what_the_cpu_holds(attention, kernel):
    """Tensor by tensor; the allocator's own word is asked in tests/training/test_dry_run.py."""
    config = small_config(f"attention={attention}", kernel=kernel)
    peaks = []
    for device in ("meta", "cpu"):
        model = cost.on_meta(config, VOCAB) if device == "meta" else TransformerLM(config, VOCAB)
        with cost.LivePeak() as live:
            model(torch.zeros(4, 64, dtype=torch.int64, device=device)).logits.sum().backward()
        peaks.append(live.bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.parametrize("attention", ["gqa", "mla", "stack"])
def test_flops_are_the_same_where_a_layer_is_too_large_to_run(monkeypatch, attention):
    config = small_config(f"attention={attention}")
    expected = cost.flops(config, VOCAB)
    monkeypatch.setattr(cost, "MOST_WEIGHTS", 0)
    assert cost.flops(config, VOCAB) == expected
