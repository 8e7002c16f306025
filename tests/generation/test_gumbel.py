"""The noise of sampling against its distribution, and numbers that ought to be independent of each other."""

import math

import pytest
import torch
from scipy import stats

from generation.gumbel import gumbel, hash_seeds, mix

DRAWS = 100_000
ALPHA = 1e-3  # all numbers here are functions of fixed seeds: a test that passes does so always


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def noise(seeds, indices, vocab_size: int) -> torch.Tensor:
    """Seeds and indices, broadcast -> (draws, V)."""
    seeds, indices = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(indices))
    return gumbel(hash_seeds(seeds.tolist()), indices, torch.arange(vocab_size))


def uniform(seeds, indices, vocab_size: int) -> torch.Tensor:
    return (-(-noise(seeds, indices, vocab_size).double()).exp()).exp()


def test_gumbel_mix_equals_splitmix64_in_unsigned_integers():
    numbers = [0, 1, 2, 2**62, 2**63 - 1, *range(10**15, 10**15 + 50)]
    assert [x % 2**64 for x in hash_seeds(numbers).tolist()] == [splitmix64(x) for x in numbers]
    negative = torch.tensor([-1, -(2**63)])
    assert [x % 2**64 for x in mix(negative).tolist()] == [splitmix64(2**64 - 1), splitmix64(2**63)]


@pytest.mark.parametrize(
    ("seeds", "indices"),
    [
        (7, torch.arange(DRAWS)),
        (torch.arange(DRAWS), 3),
        (torch.arange(2**63 - DRAWS, 2**63 - 1), 1),
        (torch.arange(DRAWS) // 400, torch.arange(DRAWS) % 400),
        (torch.arange(DRAWS), -torch.arange(DRAWS) + DRAWS),
    ],
    ids=["indices of a seed", "seeds", "large seeds", "a grid of both", "seeds as indices fall"],
)
def test_gumbel_largest_sum_of_logits_and_noise_is_drawn_as_often_as_softmax_says(seeds, indices):
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    drawn = (logits + noise(seeds, indices, 60)).argmax(-1)
    expected = len(drawn) * logits.double().softmax(-1)  # from 20,000 down to 9
    assert stats.chisquare(torch.bincount(drawn, minlength=60).numpy(), expected.numpy()).pvalue > ALPHA


def test_gumbel_noise_has_its_distribution_to_the_tails():
    numbers = noise(torch.arange(1000), 5, 2000).flatten()
    assert stats.kstest(numbers[:: len(numbers) // 100_000].double().numpy(), "gumbel_r").pvalue > ALPHA
    for limit in (4.0, 8.0, 11.0):  # expected: 36,000, 670 and 33 above
        expected = -math.expm1(-math.exp(-limit)) * len(numbers)
        assert abs(int((numbers > limit).sum()) - expected) < 4 * math.sqrt(expected)
    assert int((numbers < -2.5).sum()) < 30 and numbers.isfinite().all()  # expected: 10


def test_gumbel_noise_of_a_hash_of_all_ones_or_zeros_is_finite(monkeypatch):
    for value in (0, -1):
        monkeypatch.setattr("generation.gumbel._fold", lambda x, shift, value=value: x.fill_(value))
        zero = torch.zeros(1, dtype=torch.int64)
        assert gumbel(zero, zero, torch.arange(3)).isfinite().all()


@pytest.mark.parametrize(
    "other",
    [
        lambda s, i: uniform(s + 1, i, 1),
        lambda s, i: uniform(s, i + 1, 1),
        lambda s, i: uniform(s + 1, i - 1, 1),
        lambda s, i: uniform(i, s, 1),
        lambda s, i: uniform(s + 2**32, i, 1),
        lambda s, i: uniform(s, i, 2)[:, 1:],
        lambda s, i: uniform(s, i, 1 + 2**10)[:, -1:],
        lambda s, i: uniform(s + 1, i, 2)[:, 1:],
    ],
    ids=["next seed", "next index", "next seed, index before", "swapped", "far seed", "next token", "far token",
         "next seed and token"],
)  # fmt: skip
def test_gumbel_noise_of_neighbours_is_independent(other):
    count = 20_000
    seeds = 2 * (torch.arange(count) // 100)  # even, so that no number is in two pairs
    indices = 1000 + 2 * (torch.arange(count) % 100)
    cells = 8 * (8 * uniform(seeds, indices, 1)).long() + (8 * other(seeds, indices)).long()
    assert stats.chisquare(torch.bincount(cells.flatten(), minlength=64).numpy()).pvalue > ALPHA


def test_gumbel_noise_of_a_grid_of_seeds_and_indices_never_meets():
    seeds = torch.arange(300).repeat_interleave(300)
    found = noise(seeds, torch.arange(300).repeat(300), 4)
    assert len(found.unique(dim=0)) == 300 * 300


@pytest.mark.slow
def test_gumbel_noise_compiled_equals_eager():
    seeds, indices = hash_seeds(range(50)), torch.arange(50)
    compiled = torch.compile(gumbel, dynamic=False)
    eager = gumbel(seeds, indices, torch.arange(300))
    assert torch.allclose(compiled(seeds, indices, torch.arange(300)), eager, rtol=1e-6, atol=1e-6)
    assert torch.equal(compiled(seeds, indices, torch.arange(300)).argmax(-1), eager.argmax(-1))
