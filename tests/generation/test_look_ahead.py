"""Decoding that begins a step before the tokens of the one before were read, as on a GPU: here on the CPU, as if it
worked alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from generation import decode
from generation.decode import ENDED, generate
from generation.sampler import Sampler
from generation.state import GenerationState
from tests.support import small_model

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42]]
SAMPLER = Sampler(temperature=1.0, repetition_penalty=1.3, top_p=0.95)
ATTENTIONS = [["attention=gqa"], ["attention=mla"], ["attention=mqa", "attention.window=4"]]


@pytest.fixture
def look_ahead(monkeypatch):
    return lambda on: monkeypatch.setattr(decode, "works_alone", lambda device: on)


def edited(model, *, slide: bool, rewound: list) -> tuple[list, ...]:
    """What is written where the caller ends rows and appends to them between steps, and breaks off and goes on."""
    state = GenerationState(model, PROMPTS, [1, 2, 3], slide=slide)
    for cache in state.caches:
        cache.rewind = lambda lengths, rewind=cache.rewind: (rewound.append(lengths), rewind(lengths))
    found = []
    for step in generate(model, state, SAMPLER, max_new_tokens=90, end_token=13):
        found.append(step.flatten().tolist())
        match len(found):
            case 5:
                state.end(1)
            case 9:
                state.append(1, [11, 12])
            case 10:
                state.reseed(0, 99)
            case 12:
                break
    for _ in range(2):
        state.append(2, [4] * 9)
        steps = generate(model, state, SAMPLER, max_new_tokens=40 if slide else 12)
        found += [step.flatten().tolist() for step in steps]
    rows = [row[:length].tolist() for row, length in zip(state.tokens, state.rows.lengths, strict=True)]
    return found, rows, [column.tolist() for column in state.rows[:-1]]


@pytest.mark.parametrize(
    ("attention", "slide"),
    [(ATTENTIONS[0], True), (ATTENTIONS[1], False), (ATTENTIONS[2], False), (ATTENTIONS[2], True)],
    ids=["gqa slides", "mla", "window", "window slides"],
)
def test_generate_looking_ahead_equals_without_whatever_the_caller_changes(look_ahead, attention, slide):
    model = small_model(*attention)
    rewound: list = []
    look_ahead(False)
    expected = edited(model, slide=slide, rewound=rewound)
    assert not rewound
    look_ahead(True)
    assert edited(model, slide=slide, rewound=rewound) == expected
    assert rewound


def test_generate_looking_ahead_of_rows_that_end_equals_without(look_ahead):
    model = small_model("attention=gqa")
    texts = {}
    for on in (False, True):
        look_ahead(on)
        state = GenerationState(model, [*PROMPTS, [9] * 50], range(4))  # the last row's context is full first
        steps = generate(model, state, SAMPLER, max_new_tokens=500, end_token=13)
        texts[on] = [step.flatten().tolist() for step in steps], [column.tolist() for column in state.rows[:-1]]
    assert texts[True] == texts[False]
    assert [ENDED] * 4 not in texts[True][0]


def test_generate_begins_the_next_step_before_it_yields_only_where_it_looks_ahead(look_ahead):
    model = small_model("attention=mha")
    seen = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for on, expected in ((False, [20]), (True, [20, 1])):
        look_ahead(on)
        seen.clear()
        steps = generate(model, GenerationState(model, [[1] * 20], [0]), SAMPLER, max_new_tokens=4)
        next(steps)
        assert seen == expected
        assert len(list(steps)) == 3 and seen == [20, 1, 1, 1]  # none beyond what was asked for


class ReadBacks(TorchDispatchMode):
    """Names of the operations for which the host would wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in (args[1] or ())
        )
        if masks or name in self.WAITING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ATTENTIONS, ids=" ".join)
def test_generate_looking_ahead_reads_nothing_back_but_the_tokens(look_ahead, attention):
    look_ahead(True)
    model = small_model(*attention)
    for sampler in (Sampler(temperature=0), SAMPLER, Sampler(top_k=5, min_p=0.1)):
        state = GenerationState(model, PROMPTS, [1, 2, 3])
        steps = generate(model, state, sampler, max_new_tokens=20)
        next(steps)
        with torch.no_grad(), ReadBacks() as found:
            for _ in range(5):
                decode._begin(model, state, sampler, 3)
                state.rows = state.ahead.rows
        assert not found.names
