"""Samplers as functions, each filter held against its definition."""

import pytest
import torch

from model.sampler import Sampler, keep_min_p, keep_top_k, keep_top_p, penalise_seen


def test_samplers_draw_from_the_distribution_they_name():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    draws = torch.linspace(0, 1, 20_001)[:-1].double()
    for sampler, allowed in (
        (Sampler(), [0, 1, 2, 3, 4]),
        (Sampler(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampler(top_k=2), [0, 4]),
        (Sampler(top_p=0.6), [0, 4]),  # 0.45 + 0.27
        (Sampler(top_p=0.4), [0]),
        (Sampler(top_p=0), [0]),
        (Sampler(top_k=3, top_p=0.99), [0, 2, 4]),
        (Sampler(min_p=0.3), [0, 2, 4]),  # of the likeliest: 1, 0.14, 0.37, 0.05, 0.61
        (Sampler(min_p=0.3, temperature=0.5), [0, 4]),  # 1, 0.02, 0.14, 0.002, 0.37
        (Sampler(min_p=1), [0]),
        (Sampler(top_k=2, min_p=0.9), [0]),
    ):
        kept = torch.full((1, 5), float("-inf"))
        kept[0, allowed] = logits[0, allowed]
        expected = (kept / sampler.temperature).softmax(-1)[0]
        chosen = sampler(logits.expand(len(draws), -1), draws)
        found = torch.bincount(chosen, minlength=5) / len(draws)
        assert torch.allclose(found, expected, atol=2e-3), sampler
    assert (Sampler(temperature=1e-308)(logits.expand(len(draws), -1), draws) == 0).all()
    assert Sampler(temperature=0)(logits, torch.tensor([0.99])).tolist() == [0]


def test_a_repetition_penalty_applies_before_all_else():
    logits, uniform = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]]), torch.tensor([0.99])
    seen = torch.tensor([[True, False, False, True, False]])
    greedy = Sampler(temperature=0, repetition_penalty=1.5)
    assert greedy(logits, uniform, seen).tolist() == [4]  # 2 / 1.5 < 1.5
    assert greedy(logits, uniform, ~seen).tolist() == [0]
    assert Sampler(top_k=1, repetition_penalty=1.5)(logits, uniform, seen).tolist() == [4]
    with pytest.raises(ValueError, match="needs to know which tokens were seen"):
        greedy(logits, uniform)


def test_filters_keep_what_they_promise():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for k in (1, 5, 30, 99):
        assert (keep_top_k(logits, k).isfinite().sum(-1) == min(k, 30)).all()
    for p in (0.1, 0.5, 0.9, 1.0):
        kept = keep_top_p(logits, p)
        probs = logits.softmax(-1)
        for row in range(50):
            ordered = probs[row].sort(descending=True).values
            fewest = int((ordered.cumsum(0) < p - 1e-6).sum()) + 1
            assert int(kept[row].isfinite().sum()) in (fewest, min(30, fewest + 1) if p == 1.0 else fewest)

    for p in (0.0, 0.05, 0.5, 1.0):
        for row, kept in zip(logits, keep_min_p(logits, p), strict=True):
            probs = row.softmax(-1).tolist()
            assert [i for i, logit in enumerate(kept) if logit > float("-inf")] == [
                i for i, prob in enumerate(probs) if prob >= p * max(probs)
            ]
            assert (kept[kept.isfinite()] == row[kept.isfinite()]).all()


def test_seen_tokens_are_penalised_whatever_their_sign():
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    found = penalise_seen(logits, seen, 1.7)
    for row in range(20):
        for token in range(30):
            logit = float(logits[row, token])
            expected = logit if not seen[row, token] else logit / 1.7 if logit > 0 else logit * 1.7
            assert float(found[row, token]) == pytest.approx(expected)
    assert torch.equal(penalise_seen(logits, seen, 1), logits)
