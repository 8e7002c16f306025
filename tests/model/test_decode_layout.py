"""Laid out for decoding a model computes what it did, and sees what happens to its weights."""

import copy

import pytest
import torch

from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.linear import product
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


@pytest.fixture
def threads():
    """A function that sets how many threads there are, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "number"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_lay_out_for_decoding_stores_matrices_as_products_of_that_many_rows_read_them(rows, number, threads):
    threads(number)
    model = small_model("attention=mha", "model.n_layers=1", "mlp=swiglu")
    lay_out_for_decoding(model, rows)
    block = model.layers[0]
    joined = block.attention.joined().weight, block.mlp.joined().weight
    matrices = [joined[0], block.attention.o_proj.weight, joined[1], block.mlp.down_proj.weight, model.lm_head.weight]
    assert [matrix.shape for matrix in matrices] == [(192, 64), (64, 64), (384, 64), (64, 192), (128, 64)]
    by_columns = [matrix.stride(0) == 1 for matrix in matrices]
    tall = [True, False, True, False, True]
    assert by_columns == ([False] * 5 if rows > 1 else tall if number == 1 else [True] * 5)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_product_is_that_of_linear_however_the_matrix_is_stored(rows, number, threads):
    threads(number)
    draw = torch.Generator().manual_seed(rows)
    for out, width in ((24, 9), (9, 24), (16, 16)):
        x, weight, bias = (torch.randn(*s, generator=draw) for s in ((rows, 1, width), (out, width), (out,)))
        for stored in (weight, weight.mT.contiguous().mT):
            for given in (None, bias):
                expected = torch.nn.functional.linear(x, weight, given)
                assert relative_error(product(x, stored, given), expected) <= 1e-6


@torch.no_grad()
def test_lay_out_for_decoding_stores_matrices_wider_than_high_by_rows(threads):
    threads(1)
    model = laid_out(small_model("attention=mla", "attention.q_lora_rank=8", "attention.kv_lora_rank=8"))
    attention = model.layers[0].attention
    assert sum(layer.out_features for layer in attention.of_one_input()) < 64
    assert [layer.weight.stride() for layer in attention.of_one_input()] == [(64, 1), (64, 1)]


def test_model_laid_out_learns_like_another():
    model, tokens = small_model("attention=gqa", "mlp=swiglu", "model.bias=true"), some_tokens(2, 20)
    other = laid_out(model)
    for one in (model, other):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        logits_of(one, tokens).logsumexp(-1).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert relative_error(logits_of(other, tokens), logits_of(model, tokens)) <= 1e-5


class Doubled(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def new_data(attention):
    attention.v_proj.weight.data = attention.v_proj.weight.data.clone().mul_(3)


def new_parameter(attention):
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight * 3)


def new_bias(attention):
    attention.q_proj.bias = torch.nn.Parameter(attention.q_proj.bias + 1)


def wrapped_first(attention):
    attention.q_proj = Doubled(attention.q_proj)


def wrapped_last(attention):
    attention.v_proj = Doubled(attention.v_proj)


def hooked(attention):
    attention.v_proj.register_forward_hook(lambda layer, inputs, y: 3 * y)


def converted(attention):
    attention.double().float()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [new_data, new_parameter, new_bias, wrapped_first, wrapped_last, hooked, converted],
    ids=lambda f: f.__name__,
)
def test_model_laid_out_sees_what_becomes_of_its_layers(change):
    model, tokens = small_model("attention=gqa", "model.bias=true"), some_tokens(2, 20)
    other = laid_out(model)
    for one in (model, other):
        change(one.layers[0].attention)
    for one in (other, laid_out(model)):  # after it was laid out, and before
        assert relative_error(logits_of(one, tokens), logits_of(model, tokens)) <= 1e-5
