"""Decoding against the uncached whole text: ragged rows, ends, KV caches, and what a caller may do to the state between
two turns."""

import pytest

from generation.compiled_step import bucket
from generation.decode import ENDED, generate
from generation.sampler import Sampler
from generation.state import GenerationState
from tests.support import DISTINCT, mostly_slow, small_model

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42]]
# That an attention decodes as it computes uncached is a law; what the loop has to do with is what they cache.
CACHES = [
    ("attention=gqa",),
    ("attention=mla",),
    ("attention=mqa", "attention.window=4", "attention.global_tokens=2"),
    ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
    ("attention=mha", "position=learned", "model.norm=layer"),
]
often = pytest.mark.parametrize("case", mostly_slow(DISTINCT, often=CACHES))


def generated(model, prompts, seeds, *, cached=True, slide=False, **options) -> list[list[int]]:
    return continued(model, GenerationState(model, prompts, seeds, cached=cached, slide=slide), **options)


def continued(model, state: GenerationState, **options) -> list[list[int]]:
    steps = list(generate(model, state, options.pop("sampler", Sampler(temperature=1.0)), **options))
    return [[int(step[i]) for step in steps if step[i] != ENDED] for i in range(len(state.tokens))]


@often
def test_generate_of_ragged_prompts_equals_each_alone_and_uncached(case):
    model = small_model(*case, "model.context_length=256")
    prompts = [PROMPTS[0], list(range(20, 78)), PROMPTS[2]]
    options = {"max_new_tokens": 24}  # the cache, which began at 64, grows for the second row
    together = generated(model, prompts, [1, 2, 3], **options)
    assert together == generated(model, prompts, [1, 2, 3], cached=False, **options)
    for prompt, seed, text in zip(prompts, [1, 2, 3], together, strict=True):
        assert generated(model, [prompt], [seed], **options) == [text]
        assert len(text) == 24


def test_generate_depends_on_the_seed_unless_greedy():
    model = small_model("attention=mha")
    first, again, other = (generated(model, PROMPTS[:1], [seed], max_new_tokens=20) for seed in (1, 1, 2))
    assert first == again != other
    options = {"max_new_tokens": 20, "sampler": Sampler(temperature=0)}
    assert generated(model, PROMPTS, [1, 2, 3], **options) == generated(model, PROMPTS, [4, 5, 6], **options)


def test_generate_with_a_full_context_ends_that_row_only():
    model = small_model("attention=gqa")  # a context of 64
    long, short = generated(model, [[1] * 60, [2] * 10], [1, 2], max_new_tokens=1000)
    assert len(long) == 4
    assert len(short) == 54
    assert short == generated(model, [[2] * 10], [2], max_new_tokens=1000)[0]


def test_generate_at_the_end_token_ends_the_row():
    model = small_model("attention=mla")
    free = generated(model, PROMPTS, [1, 2, 3], max_new_tokens=30)
    end = free[0][7]
    stopped = generated(model, PROMPTS, [1, 2, 3], max_new_tokens=30, end_token=end)
    for row, text in zip(stopped, free, strict=True):
        assert row == (text[: text.index(end) + 1] if end in text else text)


def test_generate_with_one_seed_is_the_same_in_any_batch():
    """Whatever the neighbours' number, prompts, seeds, and whether they end early or drop the half of their context."""
    model, seed = small_model("attention=gqa"), 3
    options = {
        "max_new_tokens": 100,
        "slide": True,
        "sampler": Sampler(temperature=1.0, repetition_penalty=1.3, top_p=0.95),
    }
    alone = generated(model, [PROMPTS[1]], [seed], **options)[0]
    end = next(token for token in range(100) if token not in alone)
    for neighbours in ([PROMPTS[1]] * 5, [PROMPTS[0]], [[8] * 63, PROMPTS[2], [9] * 200]):
        prompts = [*neighbours, PROMPTS[1]]
        seeds = [*range(10, 10 + len(neighbours)), seed]
        assert generated(model, prompts, seeds, end_token=end, **options)[-1] == alone


@often
def test_generate_over_several_turns_equals_the_uncached_whole_text(case):
    """The caller appends to some rows, ends others, revives them: what is remembered stays in step."""
    model = small_model(*case, "model.context_length=256")
    options = {"max_new_tokens": 7, "sampler": Sampler(temperature=0)}
    state = GenerationState(model, PROMPTS, [0, 0, 0])
    wrote = continued(model, state, **options)
    whole = [[*prompt, *new] for prompt, new in zip(PROMPTS, wrote, strict=True)]
    for turn, lines in enumerate([[[11, 12], [13] * 90, []], [[], [14], None], [None, [], [15, 16, 17]]]):
        for row, line in enumerate(lines):
            state.end(row)
            if line is not None:
                state.append(row, line)
                whole[row] += line
        found = continued(model, state, **options)
        for row, line in enumerate(lines):
            expected = [] if line is None else generated(model, [whole[row]], [0], cached=False, **options)[0]
            assert found[row] == expected, (turn, row)
            whole[row] += expected


@often
def test_generate_with_a_sliding_context_equals_the_uncached_second_half(case):
    model = small_model(*case, "model.context_length=32")
    prompts = [[5, 6, 7], [42] * 25, list(range(50))]
    greedy = Sampler(temperature=0)
    options = {"max_new_tokens": 34, "sampler": greedy, "slide": True}  # the first row loses a half once
    found = generated(model, prompts, [0, 0, 0], **options)
    assert found == generated(model, prompts, [0, 0, 0], cached=False, **options)
    windows = [[*prompt] for prompt in prompts]
    for tokens in zip(*found, strict=True):  # by the definition: one token at a time, each from a fresh forward pass
        for window in windows:
            while len(window) >= 32:
                del window[:16]
        expected = [[token] for token in tokens]
        assert generated(model, windows, [0, 0, 0], max_new_tokens=1, sampler=greedy, cached=False) == expected
        windows = [[*window, token] for window, token in zip(windows, tokens, strict=True)]


@pytest.mark.parametrize("slide", [False, True])
def test_generate_in_parts_or_of_a_text_so_far_continues_as_in_one_go(slide):
    """Also beyond a context of 64, by dropping its first half; and beside a row that does not wait."""
    model = small_model("attention=mha")
    prompt = PROMPTS[0]
    whole = generated(model, [prompt], [1], slide=slide, max_new_tokens=100 if slide else 50)[0]
    for first in (1, 30):
        state = GenerationState(model, [prompt, PROMPTS[1]], [1, 2], slide=slide)
        parts = continued(model, state, max_new_tokens=first)[0]
        state.end(0)
        continued(model, state, max_new_tokens=9)
        state.append(0, [])
        parts += continued(model, state, max_new_tokens=len(whole) - first)[0]
        assert parts == whole
        again = generated(model, [prompt + whole[:first]], [1], slide=slide, max_new_tokens=len(whole) - first)
        assert again[0] == whole[first:]


def test_generate_over_several_turns_computes_only_new_tokens():
    model = small_model("attention=mla")
    seen = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    state = GenerationState(model, [[1] * 20], [0])
    continued(model, state, max_new_tokens=4)
    state.append(0, [2] * 6)
    continued(model, state, max_new_tokens=3)
    assert seen == [20, 1, 1, 1, 7, 1, 1]  # the last sampled token was not fed yet


def test_state_append_of_a_text_that_does_not_fit_is_refused_and_changes_nothing():
    model = small_model("attention=mha")
    state = GenerationState(model, [[1] * 40], [0])
    with pytest.raises(ValueError, match="a text of 64 tokens: between 1 and 63"):
        state.append(0, [2] * 24)
    assert continued(model, state, max_new_tokens=5) == generated(model, [[1] * 40], [0], max_new_tokens=5)


def test_generate_with_a_row_ended_by_the_caller_leaves_its_neighbours_alone():
    model = small_model("attention=gqa")
    state = GenerationState(model, PROMPTS, [1, 2, 3])
    found = []
    for step in generate(model, state, Sampler(temperature=1.0), max_new_tokens=12):
        found.append(step[:, 0].tolist())
        if len(found) == 5:
            state.end(1)
    columns = [list(column) for column in zip(*found, strict=True)]
    free = generated(model, PROMPTS, [1, 2, 3], max_new_tokens=12)
    assert columns == [free[0], free[1][:5] + [ENDED] * 7, free[2]]


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 65])
def test_state_of_a_prompt_that_leaves_no_room_is_refused(prompt):
    with pytest.raises(ValueError, match="between 1 and 63"):
        generated(small_model("attention=mha"), [prompt], [0], max_new_tokens=1)


def test_bucket_sizes_are_few_and_large_enough():
    sizes = {bucket(n) for n in range(1, 3000)}
    assert sizes == {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072}
    assert all(bucket(n) >= n for n in range(1, 3000))
