"""Samplers as functions, and the loop: its rows, its ends, its cache."""

import pytest
import torch

from model.generate import ENDED, Sampler, bucket, generate, keep_top_k, keep_top_p
from tests.support import CASES, small_model

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42]]


def texts(model, prompts, seeds, **options) -> list[list[int]]:
    steps = list(generate(model, prompts, options.pop("sampler", Sampler()), seeds=seeds, **options))
    return [[int(step[i]) for step in steps if step[i] != ENDED] for i in range(len(prompts))]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_ragged_prompts_continue_as_each_does_alone_and_as_without_a_cache(case):
    model = small_model(*case, "model.context_length=128")
    options = {"max_new_tokens": 90}  # across the first two sizes of a cache that began at 64
    together = texts(model, PROMPTS, [1, 2, 3], **options)
    assert together == texts(model, PROMPTS, [1, 2, 3], cached=False, **options)
    for prompt, seed, text in zip(PROMPTS, [1, 2, 3], together, strict=True):
        assert texts(model, [prompt], [seed], **options) == [text]
        assert len(text) == 90


def test_the_seed_decides_and_greedy_needs_none():
    model = small_model("attention=mha")
    first, again, other = (texts(model, PROMPTS[:1], [seed], max_new_tokens=20) for seed in (1, 1, 2))
    assert first == again != other
    greedy = Sampler(temperature=0)
    assert texts(model, PROMPTS, [1, 2, 3], max_new_tokens=20, sampler=greedy) == texts(
        model, PROMPTS, [4, 5, 6], max_new_tokens=20, sampler=greedy
    )


def test_a_full_context_ends_a_row_and_its_neighbours_go_on():
    model = small_model("attention=gqa")  # a context of 64
    long, short = texts(model, [[1] * 60, [2] * 10], [1, 2], max_new_tokens=1000)
    assert len(long) == 4
    assert len(short) == 54
    assert short == texts(model, [[2] * 10], [2], max_new_tokens=1000)[0]


def test_the_end_token_ends_a_row():
    model = small_model("attention=mla")
    free = texts(model, PROMPTS, [1, 2, 3], max_new_tokens=30)
    end = free[0][7]
    stopped = texts(model, PROMPTS, [1, 2, 3], max_new_tokens=30, end_token=end)
    for row, text in zip(stopped, free, strict=True):
        assert row == (text[: text.index(end) + 1] if end in text else text)


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 65])
def test_prompts_that_leave_no_room_are_refused(prompt):
    with pytest.raises(ValueError, match="between 1 and 63"):
        texts(small_model("attention=mha"), [prompt], [0], max_new_tokens=1)


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
    ):
        kept = torch.full((1, 5), float("-inf"))
        kept[0, allowed] = logits[0, allowed]
        expected = (kept / sampler.temperature).softmax(-1)[0]
        chosen = sampler(logits.expand(len(draws), -1), draws)
        found = torch.bincount(chosen, minlength=5) / len(draws)
        assert torch.allclose(found, expected, atol=2e-3), sampler
    assert (Sampler(temperature=1e-308)(logits.expand(len(draws), -1), draws) == 0).all()
    assert Sampler(temperature=0)(logits, torch.tensor([0.99])).tolist() == [0]


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


def test_buckets_are_few_and_large_enough():
    sizes = {bucket(n) for n in range(1, 3000)}
    assert sizes == {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072}
    assert all(bucket(n) >= n for n in range(1, 3000))
