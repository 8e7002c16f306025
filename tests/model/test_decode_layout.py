"""Laid out for decoding a model computes what it did, and sees what happens to its weights."""

import copy

import pytest
import torch

from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.linear import Linear, apply_each, join
from model.transformer import TransformerLM
from tests.support import ATTENTIONS, logits_of, relative_error, small_model, some_tokens

EVERY_CASE = [(f"attention={attention}",) for attention in ATTENTIONS] + [
    ("attention=mla", "attention.q_lora_rank=24"),
    ("attention=gqa", "mlp=swiglu", "model.bias=true", "model.tie_embeddings=false"),
]


def laid_out(model: TransformerLM) -> TransformerLM:
    model = copy.deepcopy(model)
    lay_out_for_decoding(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE, ids=" ".join)
def test_model_laid_out_for_decoding_computes_the_same(case):
    model, tokens = small_model(*case), some_tokens(2, 20)
    other = laid_out(model)
    assert relative_error(logits_of(other, tokens), logits_of(model, tokens)) <= 1e-5
    texts = []
    for one in (model, other):
        state = GenerationState(one, tokens[:, :5].tolist(), [1, 2])
        texts.append(torch.cat(list(generate(one, state, Sampler(top_k=5), max_new_tokens=20)), 1))
    assert torch.equal(*texts)
    expected = model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in other.state_dict().items())


@torch.no_grad()
def test_model_laid_out_for_decoding_reads_long_runs_in_few_products(monkeypatch):
    sizes = []
    product = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        sizes.append((*weight.shape, weight.stride()))
        return product(x, weight, bias)

    model = laid_out(small_model("attention=mha", "model.n_layers=1", "mlp=swiglu"))
    monkeypatch.setattr("torch.nn.functional.linear", counted)
    logits_of(model, some_tokens(1, 1))
    # Queries, keys and values; output; gate and up; down; logits of 100 tokens, padded:
    by_columns = [(192, 64, (1, 192)), (384, 64, (1, 384)), (128, 64, (1, 128))]
    by_rows = [(64, 64, (64, 1)), (64, 192, (192, 1))]
    assert sizes == [by_columns[0], by_rows[0], by_columns[1], by_rows[1], by_columns[2]]


def test_layers_that_were_joined_learn_like_others_and_see_what_they_learned():
    torch.manual_seed(0)
    one = [Linear(8, 6, bias=True), Linear(8, 4, bias=False)]
    for layer in one:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    other = copy.deepcopy(one)
    join(*other)
    x = torch.randn(3, 8)
    for group in (one, other):
        optimizer = torch.optim.SGD([p for layer in group for p in layer.parameters()], lr=0.1)
        sum(y.square().sum() for y in apply_each(x, *group)).backward()
        optimizer.step()
    with torch.no_grad():
        for found, layer in zip(apply_each(x, *other), one, strict=True):
            torch.testing.assert_close(found, layer(x))
        for layer in one + other:
            layer.to(torch.float64)  # which leaves the joined matrix behind
        for found, layer in zip(apply_each(x.double(), *other), one, strict=True):
            torch.testing.assert_close(found, layer(x.double()), rtol=1e-5, atol=1e-5)
