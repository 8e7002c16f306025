"""The dry run: what it prints, and what it leaves alone."""

import importlib
import itertools
import os
import re

import pytest
import torch

from common.console import clock
from data.batches import count_windows
from data.shards.prepare import prepare
from model import cost
from tests.support import QUICK, ROOT, SMOKE, call, composed_run
from training.losses import mean_loss
from training.step_memory import StepMemory

VOCAB, CPU = 100, torch.device("cpu")
WITHOUT_WEIGHT = {
    "steps": 1,
    "data": None,
    "tokenizer": None,
    "cache_dir": None,
    "run_dir": None,
}  # of no weight in a step
PREDICTED = {}  # the memory of runs


@pytest.fixture(autouse=True)
def predicted_once(monkeypatch):
    """To predict memory takes most of a dry run, and is the same for runs of the same step."""
    dry_run = importlib.import_module("training.dry_run")
    predict = dry_run.memory

    def remembered(run, *rest):
        key = (repr(run.model_copy(update=WITHOUT_WEIGHT)), *rest)
        if key not in PREDICTED:
            PREDICTED[key] = predict(run, *rest)
        return PREDICTED[key]

    monkeypatch.setattr(dry_run, "memory", remembered)


def test_dry_run_prints_the_costs_and_leaves_no_run(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "dry_run=true", "steps=3000"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "parameters   119,424: embedding 20,480, attention 33,024, mlp 65,536, norms 384, head 0 (tied" in out
    assert "flops        762,624 per token of training, 254,208 forward (7% of it attention, over 32.5 keys" in out
    assert (
        f"vocabulary   257 tokens; with the 50,257 of tokenizer=gpt2 the model would have {98_944 + 50304 * 64:,} p"
        in out
    )
    assert "cache        1,024 bytes per token" in out
    assert "micro-batches of 16 x 64" in out and "optimizer 562 kB" in out
    both = r"about ([\d.]+) MB .* activations ([\d.]+) MB; with activation_checkpointing=true about ([\d.]+) MB, "
    peak, kept, smaller, recomputed = map(float, re.search(both + r"activations ([\d.]+) MB\n", out).groups())
    assert 0 < recomputed < 0.8 * kept and recomputed < smaller < peak
    assert "\ntext         100,552 tokens of 1.00 bytes on average: 100 kB\n" in out
    assert "\ndocuments    200 documents, 0 of them identical to an earlier one; the longest has " in out
    assert "\ncharacters   0 of 100,352 are no text: " in out
    assert "training     3,000 steps of 1,024 tokens each: 3,072,000 tokens, 33.8 epochs of 90,944\n" in out
    assert "\nwarning      the training text is read 33.8 times: beyond 4 epochs" in out
    assert "for 3,000 steps, reading, evaluating and saving not counted: " in out
    assert "tokens per second on this cpu, from 10 micro-batches and one update; the update takes " in out
    assert 0 < int(re.search(r"(\d+)% of a step\n", out)[1]) < 100 and "not known" not in out
    (kept,) = (workplace / "cache").glob("[!.]*")
    assert f"nothing was trained, and nothing kept but the prepared documents, in cache/{kept.name}: " in out
    assert [path.name for path in workplace.iterdir()] == ["cache"]


def test_dry_run_of_experts_tells_what_a_token_meets_from_all_there_is(workplace, monkeypatch, capsys):
    typed = [*QUICK, "mlp=moe", "mlp.d_ff=24"]
    assert call("train", [*typed, "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    of_expert, router = 3 * 24 * 64, 8 * 64
    rest = 20_480 + 33_024 + 384
    total, active = rest + 2 * (router + 9 * of_expert), rest + 2 * (router + 3 * of_expert)
    assert f"parameters   {total:,} ({active:,} of them for each token): embedding 20,480, " in out
    per_token = 2 * (2 * (64 * 4 * 64 + router + 3 * of_expert) + 320 * 64)
    assert f"flops        {3 * (per_token + 2 * 2 * 2 * 64 * 32.5):,.0f} per token of training, " in out
    assert call("train", [*typed, "steps=1"], monkeypatch) == 0
    assert f"{total:,} parameters ({active:,} of them for each token) on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "gpt2_medium"])
def test_model_sizes_are_those_that_their_comment_states(name):
    """In millions: with GPT-2's vocabulary, and with the default one."""
    model = composed_run(f"model={name}").model
    comment = (ROOT / "conf" / "model" / f"{name}.yaml").read_text().partition("defaults:")[0]
    counts = [sum(cost.parameters(cost.on_meta(model, size)).values()) for size in (50_257, 4096)]
    assert re.findall(r"([\d.]+)M(?: parameters)? with", comment) == [f"{count / 1e6:.0f}" for count in counts]


def test_dry_run_of_a_resumed_run_does_not_change_it(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "steps=4", "run_dir=run"], monkeypatch) == 0
    before = {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=34", "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "34 steps (4 are done) of" in out and "for 30 steps" in out
    assert {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()} == before
    assert call("train", ["resume=run", "dry_run=true"], monkeypatch) == 2
    assert "error: 4 steps of this run are done, steps=4: give a larger steps=" in capsys.readouterr().err
    assert call("train", ["resume=run", "steps=5"], monkeypatch) == 0


def test_dry_run_of_a_resumed_run_reads_its_checkpoints_as_training_does(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "steps=4", "save_every=2", "keep_last=2", "run_dir=run"], monkeypatch) == 0
    newest, older = ((workplace / f"run/checkpoints/step_{step:08d}") for step in (4, 2))
    dry = ["resume=run", "steps=34", "dry_run=true"]
    for path, code, message in (
        (newest, 0, f"{newest.name}/optimizer.safetensors is damaged: it is not what the manifest says was written; "),
        (older, 2, "and no other checkpoint is whole: bring one back, or start a new run"),
    ):
        with (path / "optimizer.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        capsys.readouterr()
        assert call("train", dry, monkeypatch) == code
        out, err = capsys.readouterr()
        assert message in err
        assert code or "34 steps (2 are done) of" in out
        assert call("train", ["resume=run", "dry_run=true"], monkeypatch) == code  # two of its four steps are left


def test_dry_run_of_a_model_beyond_this_machine_counts_it(workplace, monkeypatch, capsys):
    huge = [*SMOKE, "model.d_model=65536", "precision=bf16", "dry_run=true"]
    assert call("train", huge, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "time         n/a: no step can be timed here (it may take" in out
    assert f"mlp {2 * 8 * 65536**2:,}" in out
    assert call("train", [*huge, "peak_flops=1e15"], monkeypatch) == 0
    assert "if 40% of 1e+15 FLOPs per second are reached" in capsys.readouterr().out


@pytest.fixture
def untimed(monkeypatch):
    """No step can be timed, nor is its memory predicted, which saves a dry run its seconds."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("training.dry_run.memory", lambda *_: StepMemory(1, 1, 1, 1, 1, 1, 1))
    monkeypatch.setattr("training.step_time.train_step", full)


def test_dry_run_out_of_memory_while_timing_says_so(untimed, workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "dry_run=true"], monkeypatch) == 0
    assert "n/a: no step can be timed here (CUDA out of memory. Tried" in capsys.readouterr().out


def test_clock_formats_hours_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0.4, 65, 3599.7, 100_000)] == ["0:00", "1:05", "1:00:00", "27:46:40"]


@pytest.mark.parametrize(("plan", "parts"), [("ddp", "copies "), ("fsdp", "gathered ")])
def test_dry_run_of_processes_is_of_one_of_them_and_starts_none(plan, parts, workplace, monkeypatch, capsys):
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", None)
    options = [*SMOKE, "precision=bf16", "dry_run=true", f"parallel={plan}", "parallel.processes=2"]
    assert call("train", options, monkeypatch) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f"of a step in each of 2 processes ({plan}), if each has a device of its own, besides" in rows["memory"]
    assert "(micro-batches of 8 x 64, bf16)" in rows["memory"] and f", {parts}" in rows["memory"]
    assert "evaluating and saving, and what processes send each other, not counted: " in rows["time"]
    assert "tokens per second on 2 such devices, from " in rows["time"]
    assert [path.name for path in workplace.iterdir()] == ["cache"]
    assert not torch.distributed.is_initialized()


def test_dry_run_of_processes_that_cannot_share_a_step_is_refused_as_a_run_is(workplace, monkeypatch, capsys):
    options = [*SMOKE, "parallel=ddp", "dry_run=true"]
    assert call("train", [*options, "parallel.processes=3"], monkeypatch) == 2
    foreseen = capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert call("train", options[:-1], monkeypatch) == 2
    assert capsys.readouterr().err == foreseen
    assert "holds 16 sequences, which 3 processes cannot share evenly: choose 2 processes, or batch_tok" in foreseen


def counted(monkeypatch) -> list:
    """Fills with the windows that each call of the timed loss was given."""
    shapes = []
    importlib.import_module("training.dry_run")  # whose memory is told from the loss itself, which it takes now
    for module in ("training.losses", "training.step_time"):
        monkeypatch.setattr(
            f"{module}.mean_loss",
            lambda model, batch: shapes.append(batch.inputs.shape) or mean_loss(model, batch),
        )
    return shapes


def test_dry_run_of_many_micro_batches_times_ten(workplace, monkeypatch, capsys):
    shapes = counted(monkeypatch)
    options = [*SMOKE, "data.size=40", "dry_run=true", "steps=99", f"batch_tokens={2**20 * 64}", "micro_batch_size=4"]
    assert call("train", options, monkeypatch) == 0
    found = capsys.readouterr()
    assert "from 10 micro-batches and one update" in found.out and "up to 10 micro-batches" in found.err
    assert [shape[0] for shape in shapes if shape[0] == 4] == [4] * 11
    (seconds,) = re.findall(r"time +about (\d+):(\d\d):(\d\d) for 99 steps", found.out)
    (speed,) = re.findall(r"([\d,]+) tokens per second on", found.out)
    hours, minutes, rest = map(int, seconds)
    expected = 99 * 2**20 * 64 / int(speed.replace(",", ""))
    assert hours * 3600 + minutes * 60 + rest == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("settings", [["optim=adamw", "precision=fp16"], ["optim=muon", "model.n_layers=6"]])
def test_dry_run_beyond_the_deadline_extrapolates_from_a_few_tokens(workplace, monkeypatch, capsys, settings):
    """On a machine where all takes as long as its arithmetic and a second more."""
    monkeypatch.setattr("training.step_time.SAMPLE_TOKENS", 32)
    shapes, counts = counted(monkeypatch), cost.flops(composed_run(*SMOKE, *settings).model, 257)

    def seconds(device, what):
        shapes.clear()
        what()
        return 1.0 + sum(shape.numel() * counts.training((shape[1] + 1) / 2) * 1e-8 for shape in shapes)

    monkeypatch.setattr("training.step_time._seconds", seconds)
    assert call("train", [*SMOKE, "data.size=40", *settings, "dry_run=true", "steps=1"], monkeypatch) == 0
    out = capsys.readouterr().out
    (speed,) = re.findall(r"([\d,]+) tokens per second on this cpu, from 32 tokens and one update \(a micro-batch", out)
    micro_batch = 1 + 1024 * counts.training() * 1e-8
    assert int(speed.replace(",", "")) == pytest.approx(1024 / (micro_batch + 1), abs=1)
    assert f"the update takes {1 / (micro_batch + 1):.0%} of a step" in out


@pytest.mark.parametrize(("seconds", "timed"), [(0.1, 10), (1.2, 4), (2.4, 2), (2.6, 0)])
def test_dry_run_takes_about_as_long_as_it_says(workplace, monkeypatch, capsys, seconds, timed):
    """Five seconds, the first micro-batch included; nothing of which two would take longer."""
    calls = []

    def fixed(device, what):
        what()
        calls.append(seconds)
        return seconds

    monkeypatch.setattr("training.step_time._seconds", fixed)
    assert call("train", [*QUICK, "dry_run=true"], monkeypatch) == 0
    found = capsys.readouterr()
    measured = f"{timed} micro-batches" if timed else "128 tokens"
    assert f"from {measured} and one update" in found.out
    announced = "timing an update, and up to 10 micro-batches for 5 s" if timed else "timing an update"
    assert announced in found.err
    updates = 2 if timed and seconds < 1 else 1
    assert len(calls) == 4 + (timed and 1 + timed) + updates


def test_dry_run_without_enough_memory_times_nothing(workplace, monkeypatch, capsys):
    monkeypatch.setattr("runtime.memory.memory_left", lambda: 3_000_000)
    monkeypatch.setattr("training.step_time.TrainState", None)
    assert call("train", [*SMOKE, "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "no step can be timed here (it may take" in out and "3 MB are free)" in out
    assert "parameters   119,424" in out and "epochs of 90,944" in out


def test_dry_run_without_the_vocabulary_prints_all_else(workplace, monkeypatch, capsys):
    options = [*QUICK, "model.context_length=16", "tokenizer=gpt2", "dry_run=true"]
    assert call("train", options, monkeypatch) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert f"embedding {50304 * 64:,}" in rows["parameters"]
    assert {"flops", "cache", "memory", "dry"} <= rows.keys() and "vocabulary" not in rows
    assert rows["training"].endswith("30 steps of 256 tokens each: 7,680 tokens")
    assert " and one update" in rows["time"]
    assert rows["not"].endswith("how many epochs that is; the vocabulary is taken as 50,257 tokens")
    assert rows["missing"].startswith("missing      tokenizer=gpt2: there is no")
    assert "nothing was trained or kept: " in rows["dry"]
    assert list(workplace.iterdir()) == []
    assert call("train", options[:-1], monkeypatch) == 2  # the run itself does not begin


def test_dry_run_without_the_documents_downloads_nothing(workplace, monkeypatch, capsys):
    monkeypatch.setattr("data.sources.hub._commit_of", lambda path, revision: "0" * 40)
    monkeypatch.setattr("data.sources.hub.HubCorpus.read", None)
    options = [*SMOKE, "batch_tokens=256", "data=hub", "data.path=owner/name", "dry_run=true"]
    assert call("train", options, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "257 tokens\nmissing      the documents of data=hub are not in cache yet: a run downloads them\n" in out
    assert "parameters   119,424" in out and "from 10 micro-batches" in out


def test_dry_run_prints_all_that_is_missing(untimed, workplace, monkeypatch, capsys):
    options = [*SMOKE, "batch_tokens=256", "data=hub", "data.path=owner/name", "tokenizer=gpt2", "dry_run=true"]
    assert call("train", options, monkeypatch) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing ")]
    assert len(missing) == 3
    for line, complaint in zip(missing, ("gpt2.tiktoken", "HF_HUB_OFFLINE", "a run downloads them"), strict=True):
        assert complaint in line


def test_dry_run_with_too_short_documents_is_refused(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "data.size=10", "model.context_length=2048", "batch_tokens=2048", "dry_run=true"],
                monkeypatch) == 2  # fmt: skip
    assert "give more text, or a shorter context" in capsys.readouterr().err


REFUSED = {
    "no file": {},
    "damaged": {"a.jsonl": '{"text": "x"}\n{oops\n'},
    "no column": {"a.jsonl": '{"body": "x"}\n'},
    "no text": {"a.jsonl": '{"text": ""}\n{"text": null}\n{}\n'},
    "too short": {"a.jsonl": "".join(f'{{"text": "row {i}"}}\n' for i in range(40))},
}


@pytest.mark.parametrize("case", REFUSED)
def test_dry_run_of_text_that_training_refuses_ends_as_training_does(case, workplace, monkeypatch, capsys):
    for name, content in REFUSED[case].items():
        (workplace / name).write_text(content)
    options = [*SMOKE, "precision=fp32", "data=files", "data.path=*.jsonl"]
    said = []
    for dry in ("false", "true"):
        assert call("train", [*options, f"dry_run={dry}"], monkeypatch) == 2
        said.append(capsys.readouterr())
    assert said[0] == said[1] and re.fullmatch("error: .*\n", said[0].err) and not said[0].out


def test_dry_run_tells_the_rows_that_are_skipped(untimed, workplace, monkeypatch, capsys):
    rows = "".join(f'{{"text": "row {i}, and some words"}}\n{{"text": null}}\n' for i in range(200))
    (workplace / "a.jsonl").write_text(rows)
    assert call("train", [*SMOKE, "data=files", "data.path=a.jsonl", "dry_run=true"], monkeypatch) == 0
    found = capsys.readouterr()
    line = "200 of 400 rows have no text (column text): skipped"
    assert f"\nrows         {line}\n" in found.out
    assert f"data=files: 1 file, 200 documents; {line}\n" in found.err


def test_dry_run_with_masked_documents_counts_their_pairs_or_an_upper_bound(untimed, workplace, monkeypatch, capsys):
    said = {}
    for tokenizer in ("byte", "gpt2"):
        options = [*QUICK, f"tokenizer={tokenizer}", "document_mask=true", "dry_run=true"]
        assert call("train", options, monkeypatch) == 0
        (said[tokenizer],) = re.findall(r"over ([\d.]+) keys on average(.*)\)", capsys.readouterr().out)
    assert said["gpt2"] == ("32.5", ", an upper bound: pairs across documents are counted")
    run = composed_run(*QUICK)
    corpus = prepare(run.data, run.tokenizer, workplace / "cache")
    inputs = corpus.train.read(0, count_windows(corpus.train, 64) * 64).reshape(-1, 64)  # all of it, token by token
    keys = seen = 0
    for token, first in zip(inputs.flat, itertools.cycle([True] + [False] * 63), strict=False):
        seen = 1 if first or token == 256 else seen + 1
        keys += seen
    assert said["byte"] == (f"{keys / inputs.size:.1f}", " within documents") and keys / inputs.size < 32
