"""The compiled decode step: traced once, with the texts of the eager one."""

import functools

import pytest
import torch

from common.errors import UserError
from generation import compiled_step
from generation.compiled_step import CompiledStep
from generation.decode import decode_step, generate
from generation.options import parse_arguments
from generation.sampler import Sampler
from generation.state import GenerationState
from tests.support import small_model

SAMPLER = Sampler(temperature=1.0)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation, which takes its time; a second trace is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def text(model, prompt: list[int], compiled: CompiledStep | None, tokens: int = 40) -> list[int]:
    state = GenerationState(model, [prompt, prompt[::-1]], [1, 2], compiled=compiled)
    return torch.cat(list(generate(model, state, SAMPLER, max_new_tokens=tokens)), 1).tolist()


@pytest.mark.parametrize(
    "attention",
    [
        ["attention=mla"],
        pytest.param(["attention=gqa"], marks=pytest.mark.slow),
        pytest.param(["attention=mqa", "attention.window=4"], marks=pytest.mark.slow),
    ],
)
def test_compiled_step_traces_once_for_prompts_of_one_bucket(traced, attention, caplog):
    """40 tokens after prompts of 27, 41 and 50: the caches grow to 96, and would have grown to it in between."""
    model = small_model(*attention, "model.context_length=128")
    step = CompiledStep(decode_step, 40)
    for length in (27, 41, 50):
        prompt = list(range(20, 20 + length))
        assert text(model, prompt, step) == text(model, prompt, None)
    assert traced() == 1
    assert "failed" not in caplog.text


def test_compiled_step_of_a_conversation_traces_once(traced):
    """Turns of several tokens each, which run eagerly; the text slides."""
    model = small_model("attention=gqa")
    found = []
    for compiled in (None, CompiledStep(decode_step, 64)):
        state = GenerationState(model, [[1, 2, 3]], [5], slide=True, compiled=compiled)
        for _ in range(4):
            state.append(0, [7, 8])
            list(generate(model, state, SAMPLER, max_new_tokens=25))
        found.append(state.tokens[0, : state.rows.lengths[0]].tolist())
    assert found[0] == found[1] and traced() == 1


def test_compiled_step_that_fails_runs_eagerly_with_a_warning(caplog, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    model = small_model("attention=gqa")
    assert text(model, [1, 2, 3], CompiledStep(decode_step, 40)) == text(model, [1, 2, 3], None)
    assert caplog.text.count("--compile failed, running eagerly: no compiler here") == 1


@pytest.mark.parametrize(("tokens", "warns"), [(99, True), (100_000, False)])
def test_compiled_step_warns_where_too_few_tokens_are_asked_for(caplog, monkeypatch, tokens, warns):
    model = small_model("attention=gqa")
    seconds = iter([30.0, *[0.010] * compiled_step.TIMED_STEPS, *[0.004] * compiled_step.TIMED_STEPS])
    monkeypatch.setattr(compiled_step, "_seconds", lambda step, inputs: next(seconds))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    text(model, [1, 2, 3], CompiledStep(decode_step, tokens))
    assert caplog.messages == (
        ["--compile took 30 s and saves 0.6 s in 99 tokens: leave it out, or write more"] if warns else []
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--no-cache"], "the step that reads the cache"),
        (["--kernel", "flex"], "compiles itself"),
        (["--score", "a.txt"], "a text is read"),
        (["--attention-map", "a.png"], "a prompt is drawn"),
    ],
)
def test_compile_flag_with_what_it_cannot_compile_is_refused(monkeypatch, flags, reason):
    monkeypatch.setattr("sys.argv", ["sample.py", "--compile", *flags])
    with pytest.raises(UserError, match=reason):
        parse_arguments("")
