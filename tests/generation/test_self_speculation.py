"""Self-speculation: drafts of the model's own module leave the text as it is, whatever they are."""

import copy
import functools

import pytest
import torch

from common.errors import UserError
from generation import decode
from generation.decode import ENDED, generate
from generation.options import parse_arguments
from generation.sampler import Sampler
from generation.self_speculation import SelfSpeculation
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.kernels.sdpa import SDPA
from model.norm import LayerNorm
from model.placement import Placement
from model.transformer import TransformerLM
from tests.support import small_model, training_state
from tests.training.test_mtp import ON, windows
from training.step import train_step

PROMPTS = [[5, 6, 7, 8] * 3, [1, 2, 3], [4] * 20]
SAMPLERS = [
    Sampler(temperature=0),
    Sampler(temperature=0.3),
    Sampler(temperature=1.0, min_p=0.1, repetition_penalty=1.05),
]
ATTENTIONS = [
    ("attention=mha",),
    ("attention=mla",),
    ("attention=gqa", "attention.window=5"),
    ("attention=dsa", "attention.indexer.top_k=6"),
    ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
]


@functools.cache
def drafting_model(*choice: str) -> TransformerLM:
    """Whose drafts are now right, now wrong: its module was made to agree with it by a little training. Trained once
    for all tests, which must not change it."""
    model = small_model(*choice, ON, "model.context_length=32", vocab_size=12)
    state = training_state(model, torch.optim.Adam(model.parameters(), lr=0.003))
    for _ in range(10):
        train_step(state, [windows(8, 30, masked=False)], 1.0)
    model.double()
    for module in model.modules():
        if isinstance(module, LayerNorm):  # computes in float32
            module.float()
    return model


def states(model, prompts=PROMPTS, **options) -> tuple[GenerationState, GenerationState]:
    """The same texts to be continued one by one, and with drafts."""
    plain, drafting = (GenerationState(model, prompts, range(1, 1 + len(prompts)), **options) for _ in range(2))
    drafting.speculation = SelfSpeculation(model, len(prompts))
    return plain, drafting


def written(model, state: GenerationState, sampler: Sampler, max_new_tokens: int, **options) -> list[list[int]]:
    steps = list(generate(model, state, sampler, max_new_tokens=max_new_tokens, **options))
    return [[token for step in steps for token in step[row].tolist() if token != ENDED] for row in range(len(steps[0]))]


@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=" ".join)
def test_generate_with_drafts_of_the_module_writes_the_undrafted_text(attention, slide):
    model = drafting_model(*attention)
    drafted = accepted = 0
    for sampler in SAMPLERS:
        plain, drafting = states(model, slide=slide)
        expected = written(model, plain, sampler, 45, end_token=0)
        assert written(model, drafting, sampler, 45, end_token=0) == expected
        assert torch.equal(drafting.rows.lengths, plain.rows.lengths)
        drafted += drafting.speculation.drafted
        accepted += drafting.speculation.accepted
    assert 0 < accepted < drafted


def naive_draft(model: TransformerLM, text: list[int]) -> int:
    """What the module predicts to follow a text, without any cache, greedily."""
    at = Placement.contiguous(len(text) - 1)
    stream = model(torch.tensor([text[:-1]]), at).stream
    x = model.look_ahead(stream, torch.tensor([text[1:]]), at).x
    return int(model.logits(x)[0, -1].argmax())


@pytest.mark.parametrize("tile", [256, 3])
@pytest.mark.parametrize("attention", ATTENTIONS[:3], ids=" ".join)
def test_drafts_are_what_the_module_predicts_without_a_cache(monkeypatch, attention, tile):
    """Right ones and refused ones alike, in a row among others, after a turn of the caller's, and where texts slid."""
    monkeypatch.setattr(decode, "MIN_TILE", tile)
    monkeypatch.setattr(decode, "TILE", tile)
    model = drafting_model(*attention)
    _, state = states(model, slide=True)
    found, real = [], state.speculation.drafts

    def noted(tokens, lengths, *rest):
        drafts = real(tokens, lengths, *rest)
        found.extend((tokens[row, : lengths[row]].tolist(), draft) for row, draft in enumerate(drafts) if draft)
        return drafts

    monkeypatch.setattr(state.speculation, "drafts", noted)
    written(model, state, SAMPLERS[0], 9)
    state.append(1, [7, 8, 7, 9])
    written(model, state, SAMPLERS[0], 26)
    assert len(found) > 40 and int(state.rows.dropped.min()) > 0
    assert all(draft == [naive_draft(model, text)] for text, draft in found)


@pytest.mark.parametrize("attention", ATTENTIONS[:3], ids=" ".join)
def test_module_reads_each_place_of_a_text_once(monkeypatch, attention):
    """Whatever is refused, and over several turns: all but the last, whose next token is not known."""
    model = drafting_model(*attention)
    _, state = states(model, PROMPTS[:2])
    read, real = torch.zeros(2, 33, dtype=torch.int64), model.look_ahead

    def noted(stream, after, at, **options):
        read.scatter_add_(1, at.positions.where(at.positions >= 0, 32), torch.ones_like(at.positions))
        return real(stream, after, at, **options)

    monkeypatch.setattr(model, "look_ahead", noted)
    written(model, state, SAMPLERS[1], 5)
    for row in range(2):
        state.append(row, [7, 8, 7])
    written(model, state, SAMPLERS[1], 9)
    assert read[:, :32].max() == 1
    assert (read[:, :32].sum(1) >= state.rows.lengths - 4).all()  # the last pass had no room for a draft


def test_steps_that_return_logits_alone_are_not_taken():
    """Of one row, on the kernel that they are made for: what they leave out is what drafts are made of."""
    model = small_model("attention=gqa", ON, kernel=SDPA(), vocab_size=12)
    lay_out_for_decoding(model)
    plain, drafting = states(model, PROMPTS[:1])
    for turn in range(2):
        for state in (plain, drafting):
            written(model, state, SAMPLERS[0], 6)
            state.append(0, [turn])
    assert plain.flat and drafting.flat is None
    assert drafting.speculation.streams.columns["stream"][0, 1 : int(drafting.rows.num_cached[0])].any(-1).all()


def edited(model, state: GenerationState) -> list:
    """What is written where the caller changes the text after every fifth token, or breaks off and goes on."""
    found = []
    for seed, change in enumerate(["append", "reseed", "end", "break"] * 2):
        if not state.rows.alive[0]:
            state.append(0, [3, 4])
        for step in generate(model, state, Sampler(temperature=0.3), max_new_tokens=14):
            found += step.flatten().tolist()
            if len(found) % 5 == 0:
                if change == "append":
                    state.append(0, [7, 8, 7])
                elif change == "reseed":
                    state.reseed(0, seed)
                elif change == "end":
                    state.end(0)
                else:
                    break
        found.append(state.tokens[0, : int(state.rows.lengths[0])].tolist())
    return found


@pytest.mark.parametrize("attention", ATTENTIONS[:3], ids=" ".join)
def test_generate_with_drafts_of_the_module_goes_on_from_whatever_the_caller_changes(attention):
    model = drafting_model(*attention)
    plain, drafting = states(model, PROMPTS[:1], slide=True)
    assert edited(model, drafting) == edited(model, plain)
    assert drafting.speculation.accepted > 5


def test_perfect_module_gives_two_tokens_a_pass(monkeypatch):
    """And each pass after the first is of the last token and a draft."""
    model = drafting_model("attention=gqa")
    plain, drafting = states(model, [[5]])
    text = [5, *written(model, plain, SAMPLERS[0], 25)[0]]
    perfect = lambda tokens, unread: torch.eye(12)[[text[int(drafting.rows.lengths[0])]]]  # noqa: E731
    monkeypatch.setattr(drafting.speculation, "_logits", perfect)
    assert written(model, drafting, SAMPLERS[0], 25)[0] == text[1:]
    stats = drafting.speculation.stats()
    # one token first, whose text of one token is no place for the module; a last one that leaves no room for a draft
    assert stats == {"drafted_tokens": 12, "accepted_tokens": 12, "accepted_share": 1.0, "tokens_per_step": 1.92}


def test_module_whose_output_is_not_finite_drafts_nothing():
    model = copy.deepcopy(drafting_model("attention=gqa"))
    with torch.no_grad():
        model.mtp.norm.weight.fill_(float("nan"))
    plain, drafting = states(model)
    assert written(model, drafting, SAMPLERS[1], 12) == written(model, plain, SAMPLERS[1], 12)
    assert drafting.speculation.drafted == 0


def test_caches_of_the_module_grow_with_the_text_and_are_counted():
    model = drafting_model("attention=gqa")
    _, drafting = states(model)
    written(model, drafting, SAMPLERS[0], 8)
    streams, cache = drafting.speculation.caches
    assert streams.capacity >= 28 and cache.capacity >= 28
    assert streams.bytes_per_token == 64 * 8 and cache.bytes_per_token == drafting.caches[-1].bytes_per_token


def test_compiled_step_with_speculate_self_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", "--speculate", "self", "--compile"])
    with pytest.raises(UserError, match="--compile with --speculate self: what is compiled drafts nothing"):
        parse_arguments("")


def test_shortfall_of_self_speculation_is_said():
    speculation = SelfSpeculation(small_model("attention=gqa", ON), 3)
    speculation.steps, speculation.tokens, speculation.drafted = 100, 105, 99
    assert speculation.remark().startswith("--speculate: 1.05 tokens per pass: too few of the drafted tokens")
    speculation.tokens = 150
    assert speculation.remark() is None
