"""The compiled decode step: traced once, with the texts of the eager one."""

import functools
import shutil
import sys

import pytest
import torch

from common.errors import UserError
from generation import compiled_step
from generation.compiled_step import CompiledStep, bucket, check_compiler, decode_step, offer
from generation.decode import generate
from generation.options import parse_arguments
from generation.sampler import Sampler
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.flat_model import FlatModel
from model.kernels.auto import Auto
from model.kernels.naive import Naive
from model.transformer import TransformerLM
from tests.support import EACH, assert_one_line, relative_error, small_model

SAMPLER = Sampler(temperature=1.0)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation, which takes its time; a second trace is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(tokens: int) -> CompiledStep:
    return CompiledStep(tokens, torch.device("cpu"))


def text(model, prompt: list[int], step: CompiledStep | None, tokens: int = 40) -> list[int]:
    state = GenerationState(model, [prompt, prompt[::-1]], [1, 2], compiled=step)
    return torch.cat(list(generate(model, state, SAMPLER, max_new_tokens=tokens)), 1).tolist()


@pytest.mark.parametrize(
    ("attention", "kernel"),
    [
        pytest.param(["attention=mla"], Auto(), id="mla flat"),
        pytest.param(["attention=gqa", "model.position_embedding=learned"], Naive(), id="learned general"),
        pytest.param(["attention=mla"], Naive(), id="mla general", marks=pytest.mark.slow),
        pytest.param(
            ["attention=gqa", "model.position_embedding=learned"], Auto(), id="learned flat", marks=pytest.mark.slow
        ),
        pytest.param(["attention=mqa", "attention.window=4"], Auto(), id="window general", marks=pytest.mark.slow),
        pytest.param(["attention=dsa", "attention.indexer.top_k=4"], Auto(), id="dsa general", marks=pytest.mark.slow),
    ],
)
def test_compiled_step_traces_once_for_texts_of_all_lengths(traced, attention, kernel, caplog):
    """40 tokens after prompts of 27, 41 and 50: the caches grow to 96, and would have grown to it in between."""
    model = small_model(*attention, "model.context_length=128", kernel=kernel)
    lay_out_for_decoding(model, rows=2)
    step = compiled(40)
    for length in (27, 41, 50):
        prompt = list(range(20, 20 + length))
        assert text(model, prompt, step) == text(model, prompt, None)
    assert traced() == 1
    assert "failed" not in caplog.text
    (kind,) = {kind for kind, *_ in step.compiled}
    flat = isinstance(kernel, Auto) and not any("window" in part or "top_k" in part for part in attention)
    assert kind is (FlatModel if flat else TransformerLM)


@pytest.mark.parametrize("attention", ["dsa", pytest.param("gqa", marks=pytest.mark.slow)])
def test_compiled_step_that_begins_to_choose_keys_traces_once_more(traced, attention):
    """A text of 3 tokens and then 43, of which an indexer chooses 8."""
    model = small_model(f"attention={attention}", "attention.indexer.top_k=8", kernel=Auto())
    step = compiled(40)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert text(model, [1, 2, 3], step) == text(model, [1, 2, 3], None)
    assert traced() == 2 and not step.failed


def test_compiled_step_of_rows_that_become_unlike_traces_once_more(traced):
    model = small_model("attention=gqa", kernel=Auto(), n_layers=1)
    lay_out_for_decoding(model, rows=2)
    found = []
    step = compiled(40)
    for used in (None, step):
        state = GenerationState(model, [[1, 2, 3], [4, 5, 6]], [1, 2], compiled=used)
        with torch._dynamo.config.patch(error_on_recompile=False):
            list(generate(model, state, SAMPLER, max_new_tokens=10))
            state.append(1, [7, 8])
            list(generate(model, state, SAMPLER, max_new_tokens=10))
        found.append([state.tokens[row, : state.rows.lengths[row]].tolist() for row in (0, 1)])
    assert found[0] == found[1] and not step.failed
    assert [kind for kind, *_ in step.compiled].count(FlatModel) == 1 and traced() == 2


@torch.no_grad()
@pytest.mark.parametrize(("on_gpu", "graphs"), [(False, 1), pytest.param(True, 12, marks=pytest.mark.slow)])
def test_compiled_step_of_a_long_text_never_falls_back(traced, on_gpu, graphs):
    """One text through 12 buckets. As on a GPU, but for CUDA graphs: a graph each, of which torch.compile makes 8."""
    lengths = sorted({bucket(n) for n in range(1, 3000)})
    assert len(lengths) == 12
    model = small_model("attention=gqa", "model.n_layers=1", "model.context_length=3072", "batch_tokens=3072")
    step = compiled(3000)
    step.on_gpu = on_gpu
    step.step = torch.compile(decode_step, dynamic=False, fullgraph=True)
    caches, token = model.make_caches(1, 3072), torch.tensor([[1]])
    with torch._dynamo.config.patch(error_on_recompile=not on_gpu):
        for length in lengths:
            position = torch.tensor([[length - 2]])
            expected = decode_step(model, token, position, caches, torch.empty(length, 0))
            found = step(model, token, position, caches, length - 1, lambda: torch.zeros(1, 100))
            assert relative_error(found, expected) <= 1e-5
    assert traced() == graphs


@torch.no_grad()
def test_compiled_step_beyond_all_graphs_says_so(traced, monkeypatch, caplog):
    monkeypatch.setattr(compiled_step, "MAX_GRAPHS", 2)
    model = small_model("attention=gqa", "model.n_layers=1", "model.context_length=512")
    step = compiled(400)
    step.on_gpu = True
    step.step = torch.compile(decode_step, dynamic=False, fullgraph=True)
    caches, token = model.make_caches(1, 512), torch.tensor([[1]])
    with torch._dynamo.config.patch(error_on_recompile=False):
        for length in (64, 96, 128):
            assert not step.failed
            step(model, token, torch.tensor([[length - 2]]), caches, length, lambda: torch.zeros(1, 100))
    assert step.failed and "--compile failed, running eagerly" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH, ids=" ".join)
def test_compiled_step_with_generated_code_writes_the_text_without_a_cache(case):
    """Greedy, by what torch.compile really makes: half a minute each."""
    torch._dynamo.reset()
    model = small_model(*case, kernel=Auto())
    lay_out_for_decoding(model, rows=2)
    texts = []
    for options in ({"compiled": compiled(30)}, {"cached": False}):
        state = GenerationState(model, [[1, 2, 3], [4, 5, 6]], [1, 2], **options)
        texts.append(torch.cat(list(generate(model, state, Sampler(temperature=0), max_new_tokens=30)), 1))
        assert not (state.compiled and state.compiled.failed)
    assert torch.equal(*texts)


def test_compiled_step_of_a_conversation_traces_once(traced):
    """Turns of several tokens each, which run eagerly; the text slides."""
    model = small_model("attention=gqa", kernel=Auto(), n_layers=1)
    lay_out_for_decoding(model)
    found = []
    step = compiled(64)
    for used in (None, step):
        state = GenerationState(model, [[1, 2, 3]], [5], slide=True, compiled=used)
        for _ in range(4):
            state.append(0, [7, 8])
            list(generate(model, state, SAMPLER, max_new_tokens=25))
        found.append(state.tokens[0, : state.rows.lengths[0]].tolist())
    assert found[0] == found[1] and traced() == 1 and not step.failed


def test_compiled_step_that_fails_runs_eagerly_with_a_warning(caplog, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    model = small_model("attention=gqa", kernel=Auto())
    assert text(model, [1, 2, 3], compiled(40)) == text(model, [1, 2, 3], None)
    assert caplog.text.count("--compile failed, running eagerly: no compiler here") == 1


@pytest.mark.parametrize(
    ("tokens", "saying"),
    [(99, "saves 0.6 s in 99 tokens: leave it out, or write more"), (100_000, "saves 600.0 s in 100,000 tokens")],
)
def test_compiled_step_says_what_it_took_and_saves(caplog, monkeypatch, tokens, saying):
    model = small_model("attention=gqa", kernel=Auto())
    seconds = iter([30.0, *[0.010] * compiled_step.TIMED_STEPS, *[0.004] * compiled_step.TIMED_STEPS])
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(compiled_step, "_seconds", lambda step: next(seconds))
    monkeypatch.setattr(compiled_step.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    text(model, [1, 2, 3], compiled(tokens))
    assert caplog.messages == [f"--compile took 30 s and {saying}"]


@pytest.mark.parametrize(
    ("device", "flat", "seconds", "share", "there", "offered"),
    [
        ("cuda", False, 300, 0.3, True, True),
        ("cuda", False, 300, 0.3, False, False),
        ("cuda", False, 20, 0.3, True, False),
        ("cuda", False, 300, 0.9, True, False),
        ("cpu", True, 300, 0.3, True, True),
        ("cpu", False, 300, 0.3, True, False),
    ],
)
def test_compile_offer_is_made_where_it_may_save_much_and_a_compiler_is_there(
    monkeypatch, capsys, device, flat, seconds, share, there, offered
):
    monkeypatch.setenv("CXX", sys.executable if there else "/nowhere")
    monkeypatch.setattr(compiled_step.importlib.util, "find_spec", lambda name: name)
    offer(seconds, lambda: share, flat, torch.device(device))
    assert ("[this took 300 s: --compile may save" in capsys.readouterr().err) is offered


@pytest.mark.parametrize(
    ("device", "compiler", "missing"),
    [
        ("cpu", None, "there is no (g|clang)[+][+]: install it"),
        ("cpu", "/nowhere", "CXX=/nowhere is none: unset CXX"),
        ("cpu", "no program", "CXX=.*text is none"),
        ("cpu", shutil.which("false"), "CXX=.*false is none"),
        ("cuda", sys.executable, "triton"),
    ],
)
def test_compile_flag_without_a_compiler_is_refused(monkeypatch, tmp_path, device, compiler, missing):
    monkeypatch.delenv("CXX", raising=False)
    if compiler is None:
        monkeypatch.setenv("PATH", "/nowhere")
    elif compiler == "no program":  # but a file that may be run
        (tmp_path / "text").write_bytes(b"\0")
        (tmp_path / "text").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "text"))
    else:
        monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(compiled_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--compile needs .*{missing}") as caught:
        check_compiler(torch.device(device))
    assert_one_line(caught.value)


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
