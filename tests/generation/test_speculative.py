"""Prompt-lookup speculation: what is drafted, and that the text is the undrafted one whatever is drafted."""

import numpy as np
import pytest
import torch

from common.errors import NotFinite, UserError
from generation import speculative
from generation.compiled_step import CompiledStep
from generation.decode import ENDED, generate
from generation.gumbel import gumbel, hash_seeds
from generation.options import parse_arguments
from generation.sampler import Sampler
from generation.speculative import FIRST_DRAFT, MAX_DRAFT, MIN_DRAFT, Speculation, look_up, next_limit, num_kept
from generation.state import GenerationState
from tests.support import logits_of, small_model

PROMPTS = [[5, 6, 7, 8] * 3, [1, 2, 3], [4] * 20]
GREEDY = Sampler(temperature=0)
SAMPLERS = [
    GREEDY,
    Sampler(temperature=0.3),
    Sampler(temperature=0.6, top_k=4, top_p=0.9),
    Sampler(temperature=1.0, min_p=0.1, repetition_penalty=1.05),
]
ATTENTIONS = [
    ("attention=mha",),
    ("attention=mla",),
    ("attention=gqa", "attention.window=5"),
    ("attention=mla", "attention.execution=expanded"),
    ("attention=mla", "attention.execution=naive", "attention.window=6"),
    ("attention=mla", "attention.execution=absorbed", "attention.qk_norm=latent"),
    ("attention=mqa", "attention.window=4", "attention.global_tokens=2"),
    ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
]
QUICK = 3  # of them


def states(model, prompts=PROMPTS, seeds=range(1, 100), **options) -> tuple[GenerationState, GenerationState]:
    """The same texts to be continued one by one, and with drafts."""
    plain, drafting = (GenerationState(model, prompts, seeds[: len(prompts)], **options) for _ in range(2))
    drafting.speculation = Speculation(len(prompts))
    return plain, drafting


def written(model, state: GenerationState, sampler: Sampler, max_new_tokens: int, **options) -> list[list[int]]:
    """The new tokens of each row."""
    steps = list(generate(model, state, sampler, max_new_tokens=max_new_tokens, **options))
    return [[token for step in steps for token in step[row].tolist() if token != ENDED] for row in range(len(steps[0]))]


def where_they_stand(state: GenerationState) -> list:
    """Each row's text, and what is known of it besides."""
    texts = [text[:length].tolist() for text, length in zip(state.tokens, state.rows.lengths, strict=True)]
    return [texts, *(column.tolist() for column in state.rows[:-1])]


def check_equal(
    model, sampler: Sampler, max_new_tokens: int = 70, *, slide: bool = True, prompts=PROMPTS
) -> Speculation:
    """Assert that drafts leave the text as it is, an end token included -> what was drafted."""
    plain, drafting = states(model, prompts, slide=slide)
    expected = written(model, plain, sampler, max_new_tokens, end_token=0)
    assert written(model, drafting, sampler, max_new_tokens, end_token=0) == expected
    assert where_they_stand(drafting) == where_they_stand(plain)
    return drafting.speculation


@pytest.mark.parametrize(
    ("text", "k", "drafts"),
    [
        ([1, 2, 9, 1, 2, 8, 7, 1, 2], 2, [8, 7]),  # the latest
        ([3, 1, 2, 9, 7, 1, 2, 8, 3, 1, 2], 3, [9, 7, 1]),  # the longest
        ([1, 2, 9, 1, 2], 8, [9, 1, 2, 9, 1, 2, 9, 1]),  # read on
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 9, 2, 9], 3, []),  # one token is not enough
        ([1, 2, 3], 3, []),
        ([5], 3, []),
    ],
)
def test_look_up_drafts_what_followed_the_latest_of_the_longest_matches(text, k, drafts):
    assert look_up(np.array(text), k).tolist() == drafts


@pytest.mark.parametrize(
    ("draws", "kept"), [([7, 1, 2, 3], 1), ([5, 7, 2, 3], 2), ([5, 6, 0, 3], 3), ([5, 6, 0], 3), ([5, 6, 9, 3], 3)]
)
def test_num_kept_counts_to_the_first_difference_or_the_end_token(draws, kept):
    assert num_kept(draws, [5, 6, 0], end_token=0) == kept


def test_next_limit_grows_with_what_is_accepted_and_shrinks_to_rare_drafts():
    assert next_limit(4, 4, 4) == 8 and next_limit(8, 8, 8) == MAX_DRAFT == next_limit(MAX_DRAFT, 2, 2)
    assert next_limit(4, 4, 3) == 4 and next_limit(4, 4, 0) == 2
    assert next_limit(MIN_DRAFT, 1, 0) == MIN_DRAFT and next_limit(MIN_DRAFT, 1, 1) == 2


def test_speculation_that_fails_drafts_ever_less():
    speculation = Speculation(1)
    drafts = []
    for _ in range(100):
        drafts.append(len(speculation.draft(0, np.array([1, 2, 1, 2]), room=50)))
        speculation.judge(0, [9] * (1 + drafts[-1]), [1] * drafts[-1], None)
    assert drafts[:3] == [FIRST_DRAFT, FIRST_DRAFT // 2, 1] and set(drafts[3:]) == {0, 1}
    assert sum(drafts[-64:]) == 64 * MIN_DRAFT


@pytest.mark.parametrize("attention", ATTENTIONS[:QUICK], ids=" ".join)
def test_generate_with_drafts_writes_the_undrafted_text(attention):
    model = small_model(*attention, "model.context_length=32", vocab_size=12).double()
    accepted = sum(check_equal(model, sampler, 30).accepted for sampler in SAMPLERS)
    assert accepted > 30


@pytest.mark.slow
def test_generate_with_drafts_writes_the_same_ten_thousand_tokens():
    counts = {"tokens": 0, "accepted": 0}
    for attention in ATTENTIONS:
        model = small_model(*attention, "model.context_length=32", vocab_size=20, seed=1).double()
        for sampler in SAMPLERS:
            for slide in (False, True):
                found = check_equal(model, sampler, 36, slide=slide, prompts=PROMPTS * 3)
                counts = {name: count + getattr(found, name) for name, count in counts.items()}
    print(counts)
    assert counts["tokens"] > 10_000 and counts["accepted"] > 1000


@pytest.mark.parametrize("attention", ATTENTIONS[1:QUICK], ids=" ".join)
def test_generate_with_drafts_in_float32_differs_only_where_two_tokens_tie(attention):
    model = small_model(*attention, vocab_size=12)
    sampler = Sampler(temperature=0.3)
    for seed in range(2):
        plain, drafting = (written(model, state, sampler, 40)[0] for state in states(model, PROMPTS[:1], seeds=(seed,)))
        if plain != drafting:
            i = next(i for i, pair in enumerate(zip(plain, drafting, strict=True)) if len(set(pair)) > 1)
            text = torch.tensor([PROMPTS[0] + plain[:i]])
            with torch.no_grad():
                logits = logits_of(model, text)[:, -1]
            noise = gumbel(hash_seeds([seed]), torch.tensor([text.shape[1]]), torch.arange(12))
            scores = logits / sampler.temperature + noise
            gap = float(scores.topk(2).values.diff().abs())
            print(f"{' '.join(attention)}, seed {seed}: token {i} differs, the best two by {gap:.1g}")
            assert gap <= 1e-4


class OneIndex(Sampler):
    """Draws all places of a pass with the noise of the first one."""

    def __call__(self, logits, hashed_seeds, indices, seen=None):
        return super().__call__(logits, hashed_seeds, indices[:1].expand_as(indices), seen)


@pytest.mark.parametrize("error", ["one token too many", "one index for all places", "cached though not kept"])
def test_law_of_drafts_catches_a_planted_error(monkeypatch, error):
    sampler = SAMPLERS[1]
    if error == "one token too many":
        monkeypatch.setattr(speculative, "num_kept", lambda draws, *_: min(num_kept(draws, *_) + 1, len(draws)))
    elif error == "one index for all places":
        sampler = OneIndex(**sampler.model_dump())
    else:
        update = GenerationState.append_sampled

        def too_much(state, *arguments):
            found = update(state, *arguments)
            state.rows = state.rows._replace(num_cached=state.rows.num_cached + 1)
            return found

        monkeypatch.setattr(GenerationState, "append_sampled", too_much)
    model = small_model("attention=gqa", vocab_size=12).double()
    with pytest.raises((AssertionError, IndexError)):
        check_equal(model, sampler, 40, prompts=PROMPTS[:1])


def test_generate_of_a_text_that_repeats_itself_takes_few_steps():
    """Greedily, a small model falls into a cycle."""
    model = small_model("attention=gqa", "model.context_length=256", vocab_size=12).double()
    widths = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    _, state = states(model, PROMPTS[:1])
    assert len(written(model, state, GREEDY, 200)[0]) == 200
    assert len(widths) == state.speculation.steps < 200 / 1.5
    assert max(widths[1:]) <= 1 + MAX_DRAFT
    found = state.speculation.stats()
    assert found["tokens_per_step"] == round(200 / len(widths), 2) > 1.5
    assert found["accepted_share"] == round(found["accepted_tokens"] / found["drafted_tokens"], 3) > 0.3


def test_generate_without_repeats_drafts_nothing():
    model = small_model("attention=mha", vocab_size=5000)
    _, state = states(model, [list(range(20))])
    written(model, state, Sampler(temperature=5.0), 30)
    assert state.speculation.stats() == {
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "accepted_share": None,
        "tokens_per_step": 1.0,
    }


def edit(state: GenerationState, change: str, seed: int) -> None:
    if change == "append" and (state.slide or state.rows.lengths[0] < 60):
        state.append(0, [7, 8, 7])
    elif change == "reseed":
        state.reseed(0, seed)
    elif change == "end":
        state.end(0)


def edited(model, state: GenerationState) -> list:
    """What is written where the caller changes the text after every fifth token, or breaks off and goes on."""
    found = []
    for seed, change in enumerate(["append", "reseed", "end", "break"] * 2):
        if not state.rows.alive[0] and (state.slide or state.rows.lengths[0] < 60):
            state.append(0, [3, 4])
        for step in generate(model, state, Sampler(temperature=0.05), max_new_tokens=14):
            found += step.flatten().tolist()
            if len(found) % 5 == 0:
                edit(state, change, seed)
                if change == "break":
                    break
        found.append(where_they_stand(state))
    return found


@pytest.mark.parametrize(
    ("attention", "slide"),
    [(ATTENTIONS[0], True), (ATTENTIONS[1], False), (ATTENTIONS[2], False), (ATTENTIONS[2], True)],
    ids=["mha slides", "mla", "window", "window slides"],
)
def test_generate_with_drafts_goes_on_from_whatever_the_caller_changes(attention, slide):
    """After any token, those of a pass that has others left too: so a stop string ends a row, or a turn."""
    model = small_model(*attention, vocab_size=12).double()
    plain, drafting = states(model, PROMPTS[:1], slide=slide)
    assert edited(model, drafting) == edited(model, plain)
    assert drafting.speculation.accepted > 5


def test_generate_with_drafts_and_a_row_ended_by_the_caller_leaves_its_neighbours_alone():
    model = small_model("attention=gqa", vocab_size=12).double()
    plain, drafting = states(model)
    expected = written(model, plain, GREEDY, 40)
    found: list[list[int]] = [[], [], []]
    for step in generate(model, drafting, GREEDY, max_new_tokens=40):
        for row, tokens in enumerate(step.tolist()):
            found[row] += [token for token in tokens if token != ENDED]
        if len(found[2]) == 7:
            drafting.end(2)
    assert found == [*expected[:2], expected[2][:7]]


def test_generate_with_drafts_that_are_not_finite_writes_the_undrafted_text(monkeypatch):
    """What they would leave in the caches is hidden by a mask, and 0 · NaN is NaN."""
    model = small_model("attention=gqa", "model.tie_embeddings=false", vocab_size=12).double()
    with torch.no_grad():
        model.embedding.weight[11] = float("nan")
        model.lm_head.weight[11] = 0
    monkeypatch.setattr(speculative, "look_up", lambda text, k: np.full(k, 11))
    plain, drafting = states(model)
    assert written(model, drafting, GREEDY, 20) == written(model, plain, GREEDY, 20)
    assert drafting.speculation.limits == [MIN_DRAFT] * 3


def test_generate_with_drafts_of_a_model_that_breaks_ends_as_undrafted():
    model = small_model("attention=mha", vocab_size=12).double()
    texts = written(model, states(model)[0], SAMPLERS[1], 40)
    token = texts[0][20]
    with torch.no_grad():
        model.embedding.weight[token] = float("nan")
    found = []
    for state in states(model, [[t for t in prompt if t != token] for prompt in PROMPTS]):
        rows: list[list[int]] = [[], [], []]
        with pytest.raises(NotFinite) as failure:
            for step in generate(model, state, SAMPLERS[1], max_new_tokens=40):
                for row, tokens in enumerate(step.tolist()):
                    rows[row] += [t for t in tokens if t != ENDED]
        found.append((rows, str(failure.value), where_they_stand(state)))
    assert found[0] == found[1]


def test_generate_with_drafts_compiles_the_steps_of_one_token_alone(monkeypatch):
    widths = []

    def compiled(function, **_):
        def step(model, tokens, *others):
            widths.append(tokens.shape[1])
            return function(model, tokens, *others)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    model = small_model("attention=mla", vocab_size=12).double()
    plain, drafting = states(model, PROMPTS[:1], compiled=CompiledStep(40, torch.device("cpu")))
    expected = written(model, plain, SAMPLERS[1], 40)
    widths.clear()
    assert written(model, drafting, SAMPLERS[1], 40) == expected
    assert set(widths) == {1} and len(widths) < 39


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--no-cache"], "drafts are checked"),
        (["--score", "a.txt"], "a text is read"),
        (["--attention-map", "a.png"], "a prompt is drawn"),
    ],
)
def test_speculate_flag_with_what_drafts_nothing_is_refused(monkeypatch, flags, reason):
    monkeypatch.setattr("sys.argv", ["sample.py", "--speculate", "lookup", *flags])
    with pytest.raises(UserError, match=reason):
        parse_arguments("")


@pytest.mark.parametrize(
    ("rows", "tokens", "drafted", "says"),
    [(1, 110, 5, True), (1, 200, 5, False), (3, 170, 5, True), (1, 100, 0, False)],
)
def test_speculation_says_where_it_cost_more_than_it_saved(rows, tokens, drafted, says):
    speculation = Speculation(rows)
    speculation.steps, speculation.tokens, speculation.drafted = 100, tokens, drafted
    remark = speculation.remark()
    assert (remark is not None) is says
    if says:
        assert remark.startswith(f"--speculate: {tokens / 100:.2f} tokens per pass: the text repeats itself too little")
