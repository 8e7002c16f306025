"""The prefill of a long text, in tiles of bounded memory."""

import pytest
import torch

from generation import decode
from generation.sampler import Sampler
from generation.state import GenerationState
from model import mask
from model.attention import core
from model.kernels import sdpa
from model.kernels.auto import Auto
from runtime.memory import PeakTensorBytes
from tests.support import relative_error, small_model, some_tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [
        ("attention=gqa",),
        ("attention=gqa", "attention.window=9"),
        ("attention=mha", "attention.position=alibi"),
        ("attention=mla",),
        ("attention=mla", "attention.qk_norm=latent", "attention.execution=expanded"),
        ("attention=mla", "attention.execution=absorbed"),
        ("attention=mla", "attention.position=alibi"),
    ],
    ids=" ".join,
)
def test_prefill_in_tiles_is_that_of_the_whole_text(monkeypatch, case):
    """Rows that end in the first tile, at its end, and in others; of MLA a span of the keys after the other."""
    model = small_model(*case, kernel=Auto())
    prompts = [some_tokens(1, length, seed=length)[0].tolist() for length in (3, 8, 9, 40, 57)]
    found = []
    for tile in (1000, 8):
        monkeypatch.setattr(decode, "TILE", tile)
        monkeypatch.setattr(decode, "MIN_TILE", tile)
        monkeypatch.setattr(core, "SPAN", tile)
        state = GenerationState(model, prompts, range(5))
        state.rows = state.rows.read_back()
        first = decode.next_logits(model, state)
        tokens = torch.cat(list(decode.generate(model, state, Sampler(temperature=0), max_new_tokens=5)), 1)
        found.append((first, tokens))
    assert relative_error(found[1][0], found[0][0]) <= 1e-5 and torch.equal(found[1][1], found[0][1])


@torch.no_grad()
@pytest.mark.parametrize("case", [("attention=mla",), ("attention=mla", "attention.position=alibi")], ids=" ".join)
def test_prefill_of_long_turns_after_texts_of_several_lengths_sees_what_stands_before(monkeypatch, case):
    """A row whose queries see nothing of the last spans, which are of a longer one; and a turn longer than a tile."""
    monkeypatch.setattr(decode, "TILE", 16)
    monkeypatch.setattr(decode, "MIN_TILE", 8)
    monkeypatch.setattr(core, "SPAN", 8)
    model = small_model(*case, "attention.execution=expanded", kernel=Auto())
    found = []
    for cached in (True, False):
        state = GenerationState(model, [[1] * 40, [2, 3, 4]], range(2), cached=cached)
        list(decode.generate(model, state, Sampler(temperature=0), max_new_tokens=1))
        state.append(0, [5])
        state.append(1, list(range(20, 40)))
        state.rows = state.rows.read_back()
        found.append(decode.next_logits(model, state))
    assert relative_error(*found) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_prefill_of_a_long_text_takes_the_memory_of_a_tile(monkeypatch, attention):
    monkeypatch.setattr(decode, "TILE", 256)
    monkeypatch.setattr(core, "SPAN", 256)
    monkeypatch.setattr(sdpa, "MAX_MASK", 2**14)  # as small as the model, like those above
    monkeypatch.setattr(mask, "MAX_SHARED", 2**10)
    model = small_model(f"attention={attention}", "model.context_length=4096", "batch_tokens=4096", kernel=Auto())
    peaks = []
    for length in (512, 4000):
        state = GenerationState(model, some_tokens(1, length).tolist(), [0])
        state.rows = state.rows.read_back()
        with PeakTensorBytes() as peak:
            decode.next_logits(model, state)
        columns = [column for cache in state.caches for column in cache.columns.values()]
        peaks.append(peak.bytes - sum(column.untyped_storage().nbytes() for column in columns))
    assert peaks[1] <= 1.2 * peaks[0]
