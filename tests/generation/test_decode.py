"""The loop: its rows, its ends, its cache, and what a caller may do to a text between two turns."""

import pytest
import torch

from generation.decode import ENDED, generate
from generation.sampler import Sampler
from generation.state import GenerationState, bucket
from tests.support import CASES, small_model

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42]]


def texts(model, prompts, seeds, *, cached=True, slide=False, **options) -> list[list[int]]:
    return going_on(model, GenerationState(model, prompts, seeds, cached=cached, slide=slide), **options)


def going_on(model, state: GenerationState, **options) -> list[list[int]]:
    steps = list(generate(model, state, options.pop("sampler", Sampler()), **options))
    return [[int(step[i]) for step in steps if step[i] != ENDED] for i in range(len(state.lengths))]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_ragged_prompts_continue_as_each_does_alone_and_as_without_a_cache(case):
    model = small_model(*case, "model.context_length=128")
    prompts = [PROMPTS[0], list(range(20, 78)), PROMPTS[2]]
    options = {"max_new_tokens": 24}  # the cache, which began at 64, grows for the second row
    together = texts(model, prompts, [1, 2, 3], **options)
    assert together == texts(model, prompts, [1, 2, 3], cached=False, **options)
    for prompt, seed, text in zip(prompts, [1, 2, 3], together, strict=True):
        assert texts(model, [prompt], [seed], **options) == [text]
        assert len(text) == 24


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


@pytest.mark.parametrize("seed", [3, 4])
def test_the_same_seed_writes_the_same_in_any_batch(seed):
    """Whatever the neighbours' number, prompts, seeds, and whether they end early or drop the half of their context."""
    model = small_model("attention=gqa")
    options = {"max_new_tokens": 100, "slide": True, "sampler": Sampler(repetition_penalty=1.3, top_p=0.95)}
    alone = texts(model, [PROMPTS[1]], [seed], **options)[0]
    end = next(token for token in range(100) if token not in alone)
    for neighbours in ([PROMPTS[1]] * 5, [PROMPTS[0]], [[8] * 63, PROMPTS[2], [9] * 200]):
        prompts, seeds = [*neighbours, PROMPTS[1]], [*range(10, 10 + len(neighbours)), seed]
        assert texts(model, prompts, seeds, end_token=end, **options)[-1] == alone


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_turns_continue_as_an_uncached_run_of_the_whole_text(case):
    """The caller appends to some rows, ends others, revives them: what is remembered stays in step."""
    model = small_model(*case, "model.context_length=256")
    options = {"max_new_tokens": 7, "sampler": Sampler(temperature=0)}
    state = GenerationState(model, PROMPTS, [0, 0, 0])
    wrote = going_on(model, state, **options)
    whole = [[*prompt, *new] for prompt, new in zip(PROMPTS, wrote, strict=True)]
    for turn, lines in enumerate([[[11, 12], [13] * 90, []], [[], [14], None], [None, [], [15, 16, 17]]]):
        state.alive[:] = False
        for row, line in enumerate(lines):
            if line is not None:
                state.append(row, line)
                whole[row] += line
        found = going_on(model, state, **options)
        for row, line in enumerate(lines):
            expected = [] if line is None else texts(model, [whole[row]], [0], cached=False, **options)[0]
            assert found[row] == expected, (turn, row)
            whole[row] += expected


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_context_that_slides_goes_on_as_an_uncached_text_of_its_second_half(case):
    model = small_model(*case, "model.context_length=32")
    prompts, greedy = [[5, 6, 7], [42] * 25, list(range(50))], Sampler(temperature=0)
    options = {"max_new_tokens": 34, "sampler": greedy, "slide": True}  # the first row loses a half once
    found = texts(model, prompts, [0, 0, 0], **options)
    assert found == texts(model, prompts, [0, 0, 0], cached=False, **options)
    windows = [[*prompt] for prompt in prompts]
    for tokens in zip(*found, strict=True):  # by the definition: one token at a time, each from a fresh forward pass
        for window in windows:
            while len(window) >= 32:
                del window[:16]
        expected = [[token] for token in tokens]
        assert texts(model, windows, [0, 0, 0], max_new_tokens=1, sampler=greedy, cached=False) == expected
        windows = [[*window, token] for window, token in zip(windows, tokens, strict=True)]


def test_a_row_that_waits_draws_nothing():
    model = small_model("attention=mha")

    def second_turn(rows: int) -> list[int]:
        state = GenerationState(model, PROMPTS[:rows], [1, 2][:rows])
        state.alive[1:] = False
        going_on(model, state, max_new_tokens=2)
        state.alive[:] = torch.arange(rows) == 1  # where there is a neighbour, it writes while row 0 waits
        going_on(model, state, max_new_tokens=9)
        state.append(0, [5])
        return going_on(model, state, max_new_tokens=10)[0]

    assert second_turn(2) == second_turn(1)


def test_only_new_tokens_are_computed():
    model = small_model("attention=mla")
    seen = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    state = GenerationState(model, [[1] * 20], [0])
    going_on(model, state, max_new_tokens=4)
    state.append(0, [2] * 6)
    going_on(model, state, max_new_tokens=3)
    assert seen == [20, 1, 1, 1, 7, 1, 1]  # the last token drawn was not fed yet


def test_a_text_that_does_not_fit_is_refused_and_stays():
    model = small_model("attention=mha")
    state = GenerationState(model, [[1] * 40], [0])
    with pytest.raises(ValueError, match="a text of 64 tokens: between 1 and 63"):
        state.append(0, [2] * 24)
    assert going_on(model, state, max_new_tokens=5) == texts(model, [[1] * 40], [0], max_new_tokens=5)


def test_a_row_that_the_caller_ends_leaves_its_neighbours_alone():
    model = small_model("attention=gqa")
    state, found = GenerationState(model, PROMPTS, [1, 2, 3]), []
    for step in generate(model, state, Sampler(), max_new_tokens=12):
        found.append(step.tolist())
        if len(found) == 5:
            state.alive[1] = False
    columns = [list(column) for column in zip(*found, strict=True)]
    free = texts(model, PROMPTS, [1, 2, 3], max_new_tokens=12)
    assert columns == [free[0], free[1][:5] + [ENDED] * 7, free[2]]


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 65])
def test_prompts_that_leave_no_room_are_refused(prompt):
    with pytest.raises(ValueError, match="between 1 and 63"):
        texts(small_model("attention=mha"), [prompt], [0], max_new_tokens=1)


def test_buckets_are_few_and_large_enough():
    sizes = {bucket(n) for n in range(1, 3000)}
    assert sizes == {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072}
    assert all(bucket(n) >= n for n in range(1, 3000))
