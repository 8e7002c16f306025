"""Samplers as functions, each filter against its definition."""

import math

import pytest
import torch
from scipy import stats

from generation import sampler as sampling
from generation.gumbel import hash_seeds
from generation.options import DEFAULTS
from generation.sampler import NO_TOKEN, Sampler, apply_repetition_penalty, keep_min_p, keep_top_k, keep_top_p


def drawn(sampler: Sampler, logits: list[float], draws: int = 20_000) -> torch.Tensor:
    """Tokens of rows with the same logits: of several seeds, at the indices of a text."""
    indices = torch.arange(draws)
    return sampler(torch.tensor(logits).expand(draws, -1), hash_seeds((indices // 500).tolist()), indices % 500)


def assert_frequencies(tokens: torch.Tensor, expected: list[float]) -> None:
    found = torch.bincount(tokens, minlength=len(expected)).tolist()
    likely = [i for i, p in enumerate(expected) if p > 0]
    assert sum(found[i] for i in likely) == len(tokens)  # and none that is impossible
    if len(likely) > 1:
        test = stats.chisquare([found[i] for i in likely], [expected[i] * len(tokens) for i in likely])
        assert test.pvalue > 1e-3, (found, expected)


def test_sampler_with_each_filter_draws_from_its_distribution():
    logits = [2.0, 0.0, 1.0, -1.0, 1.5]
    for sampler, allowed in (
        (Sampler(temperature=1.0), [0, 1, 2, 3, 4]),
        (Sampler(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampler(temperature=1.0, top_k=2), [0, 4]),
        (Sampler(temperature=1.0, top_p=0.6), [0, 4]),  # 0.45 + 0.27
        (Sampler(temperature=1.0, top_p=0.4), [0]),
        (Sampler(temperature=1.0, top_p=0), [0]),
        (Sampler(temperature=1.0, top_k=3, top_p=0.99), [0, 2, 4]),
        (Sampler(temperature=1.0, min_p=0.3), [0, 2, 4]),  # of the likeliest: 1, 0.14, 0.37, 0.05, 0.61
        (Sampler(min_p=0.3, temperature=0.5), [0, 4]),  # 1, 0.02, 0.14, 0.002, 0.37
        (Sampler(temperature=1.0, min_p=1), [0]),
        (Sampler(temperature=1.0, top_k=2, min_p=0.9), [0]),
    ):
        filtered = torch.full((5,), float("-inf"), dtype=torch.float64)
        filtered[allowed] = torch.tensor(logits).double()[allowed]
        assert_frequencies(drawn(sampler, logits), (filtered / sampler.temperature).softmax(-1).tolist())
    assert (drawn(Sampler(temperature=1e-308), logits) == 0).all()
    assert (drawn(Sampler(temperature=0), logits) == 0).all()


def test_sampler_with_a_repetition_penalty_draws_from_what_it_leaves():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    seen = torch.tensor([True, False, True, True, False])
    indices = torch.arange(20_000)
    sampler = Sampler(temperature=0.7, repetition_penalty=1.5)
    tokens = sampler(logits.expand(20_000, -1), hash_seeds([4]).expand(20_000), indices, seen.expand(20_000, -1))
    expected = torch.tensor([2 / 1.5, 0, 1 / 1.5, -1.5, 1.5], dtype=torch.float64) / 0.7
    assert_frequencies(tokens, expected.softmax(-1).tolist())


def test_sampler_without_settings_is_that_of_sample_py_without_flags():
    assert Sampler().model_dump() == {name: DEFAULTS[name] for name in Sampler.model_fields}
    assert Sampler() == Sampler(temperature=0.8)


def test_sampler_with_a_repetition_penalty_applies_it_first():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    at = (hash_seeds([0]), torch.tensor([5]))
    seen = torch.tensor([[True, False, False, True, False]])
    greedy = Sampler(temperature=0, repetition_penalty=1.5)
    assert greedy(logits, *at, seen).tolist() == [4]  # 2 / 1.5 < 1.5
    assert greedy(logits, *at, ~seen).tolist() == [0]
    assert Sampler(top_k=1, repetition_penalty=1.5)(logits, *at, seen).tolist() == [4]
    with pytest.raises(ValueError, match="needs to know which tokens were seen"):
        greedy(logits, *at)


def test_filters_of_random_logits_keep_the_tokens_of_their_definition():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for k in (1, 5, 30, 99):
        assert (keep_top_k(logits, k).isfinite().sum(-1) == min(k, 30)).all()
    for p in (0.1, 0.5, 0.9, 1.0):
        filtered = keep_top_p(logits, p)
        probs = logits.softmax(-1)
        for row in range(50):
            ordered = probs[row].sort(descending=True).values
            fewest = int((ordered.cumsum(0) < p - 1e-6).sum()) + 1
            assert int(filtered[row].isfinite().sum()) in (fewest, min(30, fewest + 1) if p == 1.0 else fewest)

    for p in (0.0, 0.05, 0.5, 1.0):
        for row, filtered in zip(logits, keep_min_p(logits, p), strict=True):
            probs = row.softmax(-1).tolist()
            assert [i for i, logit in enumerate(filtered) if logit > float("-inf")] == [
                i for i, prob in enumerate(probs) if prob >= p * max(probs)
            ]
            assert (filtered[filtered.isfinite()] == row[filtered.isfinite()]).all()


def test_apply_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    found = apply_repetition_penalty(logits, seen, 1.7)
    for row in range(20):
        for token in range(30):
            logit = float(logits[row, token])
            expected = logit if not seen[row, token] else logit / 1.7 if logit > 0 else logit * 1.7
            assert float(found[row, token]) == pytest.approx(expected)
    assert torch.equal(apply_repetition_penalty(logits, seen, 1), logits)


def naive_distribution(logits: list[float], sampler: Sampler) -> list[float] | None:
    """Probabilities by the definitions, in loops; None where there are none."""
    inf = math.inf
    if any(math.isnan(x) for x in logits) or max(logits) == -inf:
        return None
    if max(logits) == inf:
        logits = [0.0 if x == inf else -inf for x in logits]
    if sampler.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = naive_filters([math.exp((x - max(logits)) / sampler.temperature) for x in logits], sampler)
    return [w / sum(weights) for w in weights]


def naive_filters(weights: list[float], sampler: Sampler) -> list[float]:
    """The weights of tokens, in proportion to their probabilities, those that a filter takes out being 0."""
    if sampler.top_k is not None:
        least = sorted(weights, reverse=True)[min(sampler.top_k, len(weights)) - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    if sampler.top_p is not None:
        nucleus = set()
        mass = 0.0
        for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
            if nucleus and mass >= sampler.top_p * sum(weights):
                break
            nucleus.add(i)
            mass += weights[i]
        weights = [w if i in nucleus else 0.0 for i, w in enumerate(weights)]
    if sampler.min_p is not None:
        weights = [w if w >= sampler.min_p * max(weights) else 0.0 for w in weights]
    return weights


INF, NAN = math.inf, math.nan
NOT_FINITE = [
    [1.0, INF, 0.0, -1.0],
    [INF, 2.0, -INF, INF],
    [INF, INF, INF, INF],
    [-INF, 0.5, -INF, 1.0],
    [-INF, -INF, -INF, 3e38],
    [-INF, -INF, -INF, -INF],
    [0.0, NAN, 1.0, 2.0],
    [INF, NAN, -INF, 2.0],
    [NAN, NAN, NAN, NAN],
    [3e38, -3e38, 3e38, 0.0],
]
SETTINGS = [{}, {"temperature": 0}, {"temperature": 1e-300}, {"temperature": 1e300}, {"top_k": 2}, {"top_p": 0.6},
            {"top_p": 0.0}, {"min_p": 0.7}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampler_with_logits_that_are_not_finite_equals_a_naive_one(settings):
    """+inf is certain, several share it; -inf is impossible; NaN, or nothing possible, is no token."""
    sampler = Sampler(**settings)
    for row in NOT_FINITE:
        expected = naive_distribution(row, sampler)
        if expected is None:
            assert (drawn(sampler, row, 100) == NO_TOKEN).all(), row
        else:
            assert_frequencies(drawn(sampler, row, 5000), expected)
    rows = len(NOT_FINITE)  # a row's neighbours do not matter
    seeds = hash_seeds([3] * rows)
    indices = torch.full((rows,), 9)
    alone = [int(sampler(torch.tensor([row]), seeds[:1], indices[:1])) for row in NOT_FINITE]
    assert sampler(torch.tensor(NOT_FINITE), seeds, indices).tolist() == alone


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 1e-300}], ids=str)
def test_sampler_with_top_k_of_a_large_vocabulary_draws_as_from_all_its_tokens(settings, monkeypatch):
    """As from a row of fewer than k possible tokens, from one of equals around the k-th, and beside such rows."""
    sampler = Sampler(top_k=3, **settings)
    logits = torch.randn(400, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([[*row, *row[:2], *row[:2], *row] for row in NOT_FINITE], dtype=torch.float64)
    seeds, indices = hash_seeds(range(400)), torch.arange(400)
    halves = (2 * logits).round() / 2
    ordered = halves.sort(-1).values
    tied_within = halves[(ordered[:, -4] < ordered[:, -3]) & (ordered.diff(dim=-1)[:, -2:] == 0).any(-1)]
    assert len(tied_within) > 9
    for case in (logits, halves, tied_within, torch.cat([odd, logits[len(odd) :]])):
        before = case.clone()
        drawn_from = {}
        for large in (1, 100):
            monkeypatch.setattr(sampling, "LARGE_VOCABULARY", large)
            drawn_from[large] = sampler(case, seeds[: len(case)], indices[: len(case)])
            assert torch.equal(case.nan_to_num(7), before.nan_to_num(7))
        assert torch.equal(drawn_from[1], drawn_from[100])
