"""Initialisation is applied from outside: constructing a model draws nothing."""

import torch

from model.initialise import initialise, initialised
from model.transformer import TransformerLM
from tests.support import small_config


def test_constructing_a_model_leaves_the_random_generator_as_it_was():
    before = torch.get_rng_state()
    TransformerLM(small_config("attention=gqa", "model.bias=true"), 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_initialise_fills_the_model_it_is_given():
    config = small_config("attention=mla", "model.bias=true")
    model = TransformerLM(config, 100)
    assert initialise(model, 3) is model
    expected = initialised(config, 100, seed=3).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
