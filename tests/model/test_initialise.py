"""Initialisation is applied from outside: constructing a model draws nothing. The loss that training begins with."""

import math

import pytest
import torch

from model.initialise import initialise, initialised
from model.loss import token_losses
from model.transformer import TransformerLM
from tests.support import composed_run, logits_of, small_config, some_tokens

VOCABULARY = 4096  # tokenizer=bpe


def test_model_constructed_leaves_the_random_generator_as_it_was():
    before = torch.get_rng_state()
    TransformerLM(small_config("attention=gqa", "model.bias=true"), 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_initialise_fills_the_model_it_is_given():
    config = small_config("attention=mla", "model.bias=true")
    model = TransformerLM(config, 100)
    assert initialise(model, 3) is model
    expected = initialised(config, 100, seed=3).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def first_loss(*overrides: str) -> float:
    """Of a freshly initialised model, on tokens of any kind."""
    tokens = some_tokens(4, 65, VOCABULARY)
    with torch.no_grad():
        logits = logits_of(initialised(composed_run(*overrides).model, VOCABULARY), tokens[:, :-1])
        return token_losses(logits, tokens[:, 1:]).mean().item()


@pytest.mark.parametrize("size", ["mini", "tiny", "small"])
def test_first_loss_by_default_is_that_of_a_guess(size):
    assert first_loss(f"model={size}") == pytest.approx(math.log(VOCABULARY), rel=0.02)


@pytest.mark.parametrize(
    ("size", "init", "tied"),
    [("mini", 0.5, "true"), ("mini", 4, "false"), ("tiny", 1, "false"), ("tiny", 4, "true"), ("small", 0.5, "false")],
)
def test_first_loss_with_own_logit_init_is_that_of_a_guess(size, init, tied):
    found = first_loss(f"model={size}", f"model.own_logit_init={init}", f"model.tie_embeddings={tied}")
    assert found == pytest.approx(math.log(VOCABULARY), rel=0.02)


@pytest.mark.parametrize(
    "choice", ["attention=mla", "model.norm=layer", "model.zero_init=false", "position=sinusoidal"]
)
def test_first_loss_of_other_parts_with_own_logit_init_is_that_of_a_guess(choice):
    assert first_loss(choice, "model.own_logit_init=1") == pytest.approx(math.log(VOCABULARY), rel=0.02)


@pytest.mark.parametrize(
    ("width", "init", "expected"),
    [(96, "1", 1.0), (96, "null", None), (128, "3", 3.0), (384, "null", None), (768, "1", 1.0)],
)
def test_own_logit_at_the_start_is_as_set_at_any_width(width, init, expected):
    size = ("model.n_layers=1", f"model.d_model={width}", "model.n_heads=6", "attention.head_dim=16")
    model = initialised(composed_run(*size, f"model.own_logit_init={init}").model, VOCABULARY)
    gain = 1.0 if expected is None else expected / math.sqrt(width)
    assert torch.equal(model.norm.weight, torch.full((width,), gain))
    assert model.embedding.weight.std().item() == pytest.approx(width**-0.5, rel=0.01)
    tokens = some_tokens(2, 200, VOCABULARY)
    with torch.no_grad():
        logits = logits_of(model, tokens)
    own = logits.gather(-1, tokens[..., None]).mean().item()
    assert own == pytest.approx(gain * math.sqrt(width), rel=0.03)
    assert logits.std().item() == pytest.approx(gain, rel=0.1)  # of the others, one in 4096 being its own
    spread = math.log((VOCABULARY - 1) * math.exp(gain**2 / 2) + math.exp(own))
    targets = some_tokens(2, 200, VOCABULARY, seed=1)
    assert token_losses(logits, targets).mean().item() == pytest.approx(spread, rel=0.03)


def test_initialise_again_gives_the_final_norm_its_weight_back():
    config = small_config("attention=mha", "model.own_logit_init=1")
    model = initialised(config, 100)
    with torch.no_grad():
        model.norm.weight.mul_(3)
    assert torch.equal(initialise(model, 0).norm.weight, initialised(config, 100).norm.weight)
