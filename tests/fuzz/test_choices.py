"""Comparisons leave out what hangs on an undecided choice, and nothing else."""

import pytest
import torch

from model.moe import Router
from tests.fuzz.choices import decided
from tests.fuzz.test_configs import check_near
from tests.support import logits_of, small_model

# Without positions in its keys, an indexer scores a token that is repeated as it scored the first.
INDEXED = ("attention=gqa", "attention.indexer.top_k=4", "attention.position=alibi")
DISTINCT = torch.arange(40, 56).view(2, 8)
REPEATED = DISTINCT.clone()
REPEATED[1, 3:7] = REPEATED[1, 3]


def test_choice_between_keys_of_one_token_is_undecided_there_and_later():
    model = small_model(*INDEXED)
    assert decided(model, DISTINCT).all()
    places = decided(model, REPEATED)
    assert places[0].all() and places[1, :4].all() and not places[1, 7:].any()


def test_choice_between_equal_experts_is_undecided():
    model = small_model("mlp=moe")
    assert decided(model, DISTINCT).all()
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.weight.data[:] = router.weight.data[0]
    assert not decided(model, DISTINCT).any()


@torch.no_grad()
def test_logits_are_compared_where_choices_are_decided_and_numbers_elsewhere():
    model = small_model(*INDEXED)
    expected, places = logits_of(model, REPEATED), decided(model, REPEATED)
    otherwise = expected.where(places[..., None], expected + 1)
    check_near(model, REPEATED, otherwise, expected)
    for wrong in (expected.clone(), otherwise):
        wrong[1, 2] += 0.01
        with pytest.raises(AssertionError):
            check_near(model, REPEATED, wrong, expected)
    with pytest.raises(AssertionError):
        check_near(model, REPEATED, expected.where(places[..., None], torch.nan), expected)
