"""What a run is said to cost, held against what it costs."""

import gc
import itertools
import re

import pytest
import torch

from benchmarks.memory import allocated_peak
from common.console import clock
from data.batches import count_windows
from data.shards.prepare import prepare
from model import cost
from model.transformer import TransformerLM
from runtime.precision import MixedPrecision
from tests.support import ATTENTIONS, SMOKE, call, load_composed, some_tokens
from training import step
from training.dry_run import memory
from training.step import accumulate_gradients, losses_of

VOCAB, CPU = 100, torch.device("cpu")


CLASSIC = ("model=classic_gpt", "model.n_layers=2", "model.d_model=64", "model.context_length=64")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "options",
    ["precision=fp32", "precision=bf16", "model.dropout=0.1", "kernel=naive", "activation_checkpointing=true"],
)
def test_the_peak_memory_is_what_the_allocator_says(attention, options):
    check_memory(f"attention={attention}", "precision=fp32", options)


@pytest.mark.parametrize(
    "options",
    [
        ("attention=mla", "attention.dropout=0.1", "attention.qk_norm=head"),
        CLASSIC,
        (*CLASSIC, "attention.dropout=0", "precision=bf16"),
    ],
    ids=" ".join,
)
def test_the_peak_memory_where_attention_weights_are_dropped(options):
    """A CPU's fused kernel does not drop them: all T×T of the products that take its place are counted."""
    check_memory("precision=fp32", *options)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("options", ["precision=fp32", "precision=bf16"])
def test_the_peak_memory_of_masked_documents_too(attention, options):
    """In windows of several tiles of queries, whose masks are the larger part of it."""
    window = ["model.context_length=600", "batch_tokens=4800"]
    masked = check_memory(f"attention={attention}", options, *window, "data.document_mask=true")
    plain = memory(load_composed(*SMOKE, f"attention={attention}", options, *window, "micro_batch_size=4"), VOCAB, CPU)
    assert masked > 1.2 * sum(plain.values())


def check_memory(*options: str) -> int:
    """Within 1 %, asking PyTorch's allocator of a CPU for every block it gave and took back -> the bytes predicted."""
    run = load_composed(*SMOKE, "micro_batch_size=4", *options)
    tokens = some_tokens(4, run.model.context_length, VOCAB)
    predicted = memory(run, VOCAB, CPU)
    gc.collect()
    mixed = None

    def step() -> None:
        nonlocal mixed
        mixed = MixedPrecision(TransformerLM(run.model, VOCAB), run.precision)
        loss = losses_of(run.data, VOCAB - 1, activation_checkpointing=run.activation_checkpointing)[0]
        accumulate_gradients(mixed, [(tokens, tokens)] * 2, (0, 0), loss)

    peak = allocated_peak(step)
    assert predicted["weights"] == predicted["gradients"] == sum(p.grad.nbytes for p in mixed.parameters)
    assert sum(predicted.values()) - predicted["optimizer"] == pytest.approx(peak, rel=0.01)
    return sum(predicted.values())


def test_the_state_of_the_optimizer_is_what_it_keeps():
    run = load_composed(*SMOKE)
    model = TransformerLM(run.model, VOCAB)
    optimizer = run.optim.build(model)
    model(some_tokens(1, 8)).logits.sum().backward()
    optimizer.step()
    kept = sum(part.nbytes for state in optimizer.state.values() for part in state.values() if part.ndim)
    assert run.optim.state_bytes(cost.on_meta(run.model, VOCAB)) == kept


def test_a_dry_run_says_the_costs_and_leaves_no_run(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "dry_run=true", "steps=3000"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "parameters   119,424: embedding 20,480, attention 33,024, mlp 65,536, norms 384, head 0 (tied" in out
    assert "flops        762,624 per token of training, 254,208 forward (7% of it attention, over 32.5 keys" in out
    assert "cache        1,024 bytes per token" in out
    assert "micro-batches of 16 x 64" in out and "optimizer 562 kB" in out
    both = re.search(r"activations ([\d.]+) MB .*; activation_checkpointing=true: activations ([\d.]+) MB\n", out)
    kept, anew = both.groups()
    assert 0 < float(anew) < 0.8 * float(kept)
    assert "training     3,000 steps of 1,024 tokens each: 3,072,000 tokens, 33.8 epochs of 90,944\n" in out
    assert "\nwarning      the training text is read 33.8 times: beyond 4 epochs" in out
    assert "for 3,000 steps, reading, evaluating and saving not counted: " in out
    assert "tokens per second on this cpu, from 10 micro-batches and one update; the update takes " in out
    assert 0 < int(re.search(r"(\d+)% of a step\n", out)[1]) < 100 and "not known" not in out
    (kept,) = (workplace / "cache").glob("[!.]*")
    assert f"nothing was trained, and nothing kept but the prepared documents, in cache/{kept.name}: " in out
    assert [path.name for path in workplace.iterdir()] == ["cache"]


def test_a_dry_run_does_not_change_the_run_it_would_resume(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "steps=20", "run_dir=run"], monkeypatch) == 0
    before = {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=50", "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "50 steps (20 are done) of" in out and "for 30 steps" in out
    assert {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()} == before
    assert call("train", ["resume=run", "dry_run=true"], monkeypatch) == 2
    assert "error: 20 steps of this run are done, steps=20: give a larger steps=" in capsys.readouterr().err
    assert call("train", ["resume=run", "steps=21"], monkeypatch) == 0


def test_a_model_beyond_this_machine_is_counted_all_the_same(workplace, monkeypatch, capsys):
    huge = [*SMOKE, "model.d_model=65536", "precision=bf16", "dry_run=true"]
    assert call("train", huge, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "time         n/a: no step can be timed here (it may take" in out
    assert f"mlp {2 * 8 * 65536**2:,}" in out
    assert call("train", [*huge, "peak_flops=1e15"], monkeypatch) == 0
    assert "if 40% of 1e+15 FLOPs per second are reached" in capsys.readouterr().out


def test_a_dry_run_that_meets_too_little_memory_says_so(workplace, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("training.dry_run.train_step", full)
    assert call("train", [*SMOKE, "dry_run=true"], monkeypatch) == 0
    assert "n/a: no step can be timed here (CUDA out of memory. Tried" in capsys.readouterr().out


def test_times_as_a_person_reads_them():
    assert [clock(seconds) for seconds in (0.4, 65, 3599.7, 100_000)] == ["0:00", "1:05", "1:00:00", "27:46:40"]


def counted(monkeypatch, name: str) -> list:
    """Fills with the windows that each call of a loss was given."""
    shapes, original = [], getattr(step, name)
    monkeypatch.setattr(
        step, name, lambda model, x, *rest, **how: shapes.append(x.shape) or original(model, x, *rest, **how)
    )
    return shapes


def test_a_step_of_many_micro_batches_is_not_run_whole(workplace, monkeypatch, capsys):
    shapes = counted(monkeypatch, "mean_loss")
    options = [*SMOKE, "dry_run=true", "steps=2", f"batch_tokens={2**20 * 64}", "micro_batch_size=4"]
    assert call("train", options, monkeypatch) == 0
    found = capsys.readouterr()
    assert "from 10 micro-batches and one update" in found.out and "timing up to 10 micro-batches" in found.err
    assert [shape[0] for shape in shapes if shape[0] == 4][4:] == [4] * 11  # after those on the meta device
    (seconds,) = re.findall(r"time +about (\d+):(\d\d):(\d\d) for 2 steps", found.out)
    (speed,) = re.findall(r"([\d,]+) tokens per second on", found.out)
    hours, minutes, rest = map(int, seconds)
    expected = 2 * 2**20 * 64 / int(speed.replace(",", ""))
    assert hours * 3600 + minutes * 60 + rest == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("settings", [["optim=adamw", "precision=fp16"], ["optim=muon", "model.n_layers=6"]])
def test_what_takes_longer_than_the_deadline_is_told_from_a_few_tokens(workplace, monkeypatch, capsys, settings):
    """On a machine where all takes as long as its arithmetic and a second more."""
    monkeypatch.setattr("training.dry_run.PART", 32)
    shapes, counts = counted(monkeypatch, "mean_loss"), cost.flops(load_composed(*SMOKE, *settings).model, 257)

    def seconds(device, what):
        shapes.clear()
        what()
        return 1.0 + sum(shape.numel() * counts.training((shape[1] + 1) / 2) * 1e-8 for shape in shapes)

    monkeypatch.setattr("training.dry_run._seconds", seconds)
    assert call("train", [*SMOKE, *settings, "dry_run=true", "steps=1"], monkeypatch) == 0
    out = capsys.readouterr().out
    (speed,) = re.findall(r"([\d,]+) tokens per second on this cpu, from 32 tokens and one update \(a micro-batch", out)
    micro_batch = 1 + 1024 * counts.training() * 1e-8
    assert int(speed.replace(",", "")) == pytest.approx(1024 / (micro_batch + 1), abs=1)
    assert f"the update takes {1 / (micro_batch + 1):.0%} of a step" in out


def test_nothing_is_timed_where_the_memory_would_not_suffice(workplace, monkeypatch, capsys):
    monkeypatch.setattr("runtime.memory.memory_left", lambda: 3_000_000)
    monkeypatch.setattr("training.dry_run.TrainState", None)
    assert call("train", [*SMOKE, "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "no step can be timed here (it may take" in out and "3 MB are free)" in out
    assert "parameters   119,424" in out and "epochs of 90,944" in out


def test_without_the_vocabulary_all_else_is_said(workplace, monkeypatch, capsys):
    options = [*SMOKE, "tokenizer=gpt2", "dry_run=true"]
    assert call("train", options, monkeypatch) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert f"embedding {50304 * 64:,}" in rows["parameters"]
    assert {"flops", "cache", "memory", "dry"} <= rows.keys()
    assert rows["training"].endswith("30 steps of 1,024 tokens each: 30,720 tokens")
    assert " and one update" in rows["time"]
    assert rows["not"].endswith("how many epochs that is; the vocabulary is taken as 50,257 tokens")
    assert rows["missing"].startswith("missing      tokenizer=gpt2: there is no")
    assert "nothing was trained or kept: " in rows["dry"]
    assert list(workplace.iterdir()) == []
    assert call("train", options[:-1], monkeypatch) == 2  # the run itself does not begin


def test_a_dry_run_downloads_nothing(workplace, monkeypatch, capsys):
    monkeypatch.setattr("data.sources.hub._commit_of", lambda path, revision: "0" * 40)
    monkeypatch.setattr("data.sources.hub.HubCorpus.read", None)
    assert call("train", [*SMOKE, "data=hub", "data.path=owner/name", "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "257 tokens\nmissing      the documents of data=hub are not in cache yet: a run downloads them\n" in out
    assert "parameters   119,424" in out and "from 10 micro-batches" in out


def test_a_dry_run_says_all_that_is_missing(workplace, monkeypatch, capsys):
    options = [*SMOKE, "data=hub", "data.path=owner/name", "tokenizer=gpt2", "dry_run=true"]
    assert call("train", options, monkeypatch) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing ")]
    assert len(missing) == 3
    for line, complaint in zip(missing, ("gpt2.tiktoken", "HF_HUB_OFFLINE", "a run downloads them"), strict=True):
        assert complaint in line


def test_documents_too_short_for_the_run_are_refused_as_by_the_run(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "data.size=10", "model.context_length=2048", "batch_tokens=2048", "dry_run=true"],
                monkeypatch) == 2  # fmt: skip
    assert "give more text, or a shorter context" in capsys.readouterr().err


def test_masked_documents_count_their_own_pairs_and_without_them_an_upper_bound_is_said(workplace, monkeypatch, capsys):
    said = {}
    for tokenizer in ("byte", "gpt2"):
        options = [*SMOKE, f"tokenizer={tokenizer}", "data.document_mask=true", "dry_run=true"]
        assert call("train", options, monkeypatch) == 0
        (said[tokenizer],) = re.findall(r"over ([\d.]+) keys on average(.*)\)", capsys.readouterr().out)
    assert said["gpt2"] == ("32.5", ", an upper bound: pairs across documents are counted")
    run = load_composed(*SMOKE)
    corpus = prepare(run.data, run.tokenizer, workplace / "cache")
    inputs = corpus.train.read(0, count_windows(corpus.train, 64) * 64).reshape(-1, 64)  # all of it, token by token
    keys = seen = 0
    for token, first in zip(inputs.flat, itertools.cycle([True] + [False] * 63), strict=False):
        seen = 1 if first or token == 256 else seen + 1
        keys += seen
    assert said["byte"] == (f"{keys / inputs.size:.1f}", " within documents") and keys / inputs.size < 32
