"""Resuming: a run that was stopped in any way and resumed equals the run that was not, bit for bit."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import training.losses
from benchmarks.kill import STEPS, UNDER_FIRE, start, train_under_fire
from common.invocation import command
from tests.support import ATTENTIONS, QUICK, call, changed
from tests.training.parallel.together import Training, train_together
from tests.training.runs import assert_same_run, losses, rewind, tensors
from training.metrics_file import read_metrics
from training.run import checkpoint
from training.run.checkpoint import MODEL, OPTIMIZER, newest

# Dropout, accumulation, and an epoch's end on the way.
BUSY = [*changed(QUICK, "data.size=12"), "model.dropout=0.1", "micro_batch_size=1"]
BUSY += ["steps=12", "save_every=5", "eval_every=4"]
LIGHT = changed(BUSY, "batch_tokens=128")
CLASSIC = ["model=classic_gpt", "model.n_layers=2", "model.d_model=64", "model.context_length=64"]


def text_of(out: str) -> str:
    return out.split("\nvalidation ")[0]


OFTEN = [("mha", "fp32"), ("mla", "fp32"), ("mqa", "bf16"), ("mla", "bf16"), ("stack", "bf16")]  # gqa and dsa: below


def runs() -> list:
    """Every attention in both precisions, eager and compiled; in the default tests, each attention and each precision,
    eager. To compile takes long, so that is slow here: of the default tests, one of masked documents is traced."""
    cases = []
    for attention, precision in itertools.product(ATTENTIONS, ["fp32", "bf16"]):
        seldom = () if (attention, precision) in OFTEN else pytest.mark.slow
        cases.append(pytest.param(attention, precision, None, marks=seldom))
        cases.append(pytest.param(attention, precision, "inductor", marks=pytest.mark.slow))
    return cases + [pytest.param(name, "fp32", "aot_eager", marks=pytest.mark.slow) for name in ATTENTIONS]


@pytest.fixture
def compiled_by(monkeypatch):
    """Call it with a backend of torch.compile, or None for eager runs -> what to say on the command line."""
    torch_compile = torch.compile

    def arrange(backend: str | None) -> str:
        if backend:
            monkeypatch.setattr(torch, "compile", functools.partial(torch_compile, backend=backend))
        return f"compile={backend is not None}"

    return arrange


@pytest.mark.parametrize(("attention", "precision", "backend"), runs())
def test_resume_after_any_attention_and_precision_is_the_same_run(
    workplace, monkeypatch, capsys, compiled_by, attention, precision, backend
):
    options = [*LIGHT, f"attention={attention}", f"precision={precision}", compiled_by(backend)]
    if backend and attention != "stack":  # which needs a layer of each kind
        options.append("model.n_layers=1")
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    expected = text_of(capsys.readouterr().out)
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert text_of(out) == expected and "running eagerly" not in err
    assert_same_run(workplace / "whole", workplace / "killed", step=12)


@pytest.mark.parametrize(
    ("choice", "backend"),
    [
        (CLASSIC, None),
        *(
            pytest.param(changed(CLASSIC, "model.n_layers=1"), backend, marks=pytest.mark.slow)
            for backend in ("aot_eager", "inductor")
        ),
        (["attention=mla", "attention.dropout=0.2", "attention.qk_norm=head", "precision=bf16"], None),
        pytest.param(["attention=stack", "attention.parts.local.dropout=0.2"], None, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_resume_with_attention_dropout_is_the_same_run(workplace, monkeypatch, capsys, compiled_by, choice, backend):
    assert call("train", [*LIGHT, *choice, compiled_by(backend), "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)
    assert "running eagerly" not in capsys.readouterr().err


def test_resume_mix_with_document_mask_is_the_same_run(workplace, monkeypatch):
    parts = "data.parts={a: {quota: 1, data: synthetic, size: 12}, b: {quota: 2, data: synthetic, size: 30, seed: 1}}"
    options = [option for option in LIGHT if not option.startswith("data.")] + ["data=mix", parts]
    assert call("train", [*options, "document_mask=true", "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_resume_on_examples_of_which_answers_count_is_the_same_run(workplace, monkeypatch, compiled_by, backend):
    options = [option for option in LIGHT if not option.startswith("data.")]
    options += ["data=mqar", "data.size=80", "tokenizer=numbers", compiled_by(backend)]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)
    rows = read_metrics(workplace / "killed/metrics.jsonl")
    scored = [row for row in rows if "val_accuracy" in row]
    assert [row["step"] for row in scored] == [4, 8, 12] and all(0 <= row["val_accuracy"] <= 1 for row in scored)
    assert rows[-1]["val_tokens"] == 7 * 6  # of the eight examples held out the last fills no window


SLOW_BACKENDS = [pytest.param(backend, marks=pytest.mark.slow) for backend in (None, "inductor")]


@pytest.mark.parametrize("backend", ["aot_eager", *SLOW_BACKENDS])  # eager: of a mix, above
def test_resume_with_document_mask_is_the_same_run(workplace, monkeypatch, capsys, compiled_by, backend):
    options = [*LIGHT, "attention=gqa", "document_mask=true", compiled_by(backend), "model.n_layers=1"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)
    assert "running eagerly" not in capsys.readouterr().err


def test_resume_with_an_indexer_experts_and_a_second_prediction_is_the_same_run(workplace, monkeypatch):
    """All at once: each has losses, and experts a bias in a buffer, in the block of the second prediction too."""
    options = ["attention=dsa", "attention.indexer.top_k=8", "mlp=moe", "model.mtp_depth=1", "document_mask=true"]
    assert call("train", [*LIGHT, *options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)
    row = read_metrics(workplace / "whole/metrics.jsonl")[-1]
    assert row["indexer_loss"] > 0 and row["mtp_loss"] > row["train_loss"] / 2 and row["lowest_load"] < 1
    biases = {name for name in tensors(workplace / "whole", step=12) if name.endswith("selection_bias")}
    assert "mtp.block.mlp.router.selection_bias" in biases and len(biases) == 3


def test_resume_with_unseeded_dropout_is_another_run(workplace, monkeypatch):
    monkeypatch.setattr("training.step._seed_micro_step", lambda *_: None)
    assert call("train", [*LIGHT, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert losses(workplace / "whole") != losses(workplace / "killed")


def test_resume_float16_restores_the_loss_scale(workplace, monkeypatch):
    """It starts so high that the first steps overflow: they are skipped, as they are after the resumption."""
    monkeypatch.setattr("runtime.precision.LossScale.INITIAL", 2.0**28)
    monkeypatch.setattr("runtime.precision.LossScale.GROWTH_STEPS", 3)
    options = [
        "precision=fp16",
        "steps=20",
        "max_skipped_updates=30",
        "save_every=5",
        "keep_last=9",
        "micro_batch_size=4",
    ]
    options = changed(BUSY, *options)
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    skipped = [row["step"] for row in read_metrics(workplace / "whole/metrics.jsonl") if row.get("skipped")]
    assert skipped[:6] == [1, 2, 3, 4, 5, 6] and 2 < skipped[-1] < 20
    for step in (5, 15):
        rewind(workplace / "whole", workplace / f"killed{step}", step)
        assert call("train", [f"resume=killed{step}"], monkeypatch) == 0
        assert_same_run(workplace / "whole", workplace / f"killed{step}", step=20)
    manifest = json.loads((workplace / "whole/checkpoints/step_00000015/manifest.json").read_text())
    assert manifest["loss_scale"]["scale"] < 2.0**28 and manifest["loss_scale"]["good_steps"] in (0, 1, 2)


GROWING = [*QUICK, "model.dropout=0.1", "schedule=wsd", "schedule.warmup_steps=2", "schedule.cooldown=0"]


def dies_writing(rank: int) -> None:
    """In the middle of the next checkpoint: the weights are whole, and the manifest is not there."""
    checkpoint.with_checksum = lambda content: os.kill(os.getpid(), signal.SIGKILL)


def test_resume_after_sigkill_in_training_and_within_a_write_is_the_same_run(workplace, monkeypatch):
    run, options = workplace / "run", [*GROWING, "save_every=5", "eval_every=1000"]
    process = Training(workplace, [*options, "steps=2000", "run_dir=run"], count=1)
    await_steps(process, run, 7)
    process.send(signal.SIGKILL)
    assert process.ended()[0].code == -signal.SIGKILL
    (again,) = train_together(workplace, "resume=run", count=1, arrange=dies_writing)
    assert again.code == -signal.SIGKILL and list(run.rglob(".writing-*"))
    steps = len(read_metrics(run / "metrics.jsonl")) + 3
    assert 13 <= steps < 1000
    assert call("train", [*options, f"steps={steps}", "run_dir=whole"], monkeypatch) == 0
    assert call("train", ["resume=run", f"steps={steps}"], monkeypatch) == 0
    assert_same_run(workplace / "whole", run, step=steps)
    assert not list(run.rglob(".writing-*"))


@pytest.mark.slow
def test_resume_after_sigkill_at_random_moments_is_the_same_run(workplace, monkeypatch):
    """From the start of the process on, of which above is nothing."""
    options, kills = changed(UNDER_FIRE, "attention=mla"), 20
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    draw, met = random.Random(0), []
    while len(met) < kills:
        folder = workplace / f"killed after {len(met)}"
        folder.mkdir()
        found = train_under_fire(options, folder, kills - len(met), draw)
        assert "while writing" in found
        met += found
        assert_same_run(workplace / "whole", folder / "run", step=STEPS)
        assert not list(folder.rglob(".writing-*"))


SIGNALS = {  # sent by another process; the first two are raised within one, below
    "Ctrl-C": pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    "SIGTERM": pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    "closed terminal": (signal.SIGHUP, 129),
}


@pytest.mark.parametrize(("sent", "code"), SIGNALS.values(), ids=SIGNALS)
def test_signal_during_training_saves_and_prints_how_to_continue(workplace, monkeypatch, sent, code):
    options = [*GROWING, "save_every=1000", "eval_every=1000"]
    process = Training(workplace, [*options, "steps=2000", "run_dir=run"], count=1)
    steps = await_steps(process, workplace / "run", 3)
    process.send(sent)
    (ended,) = process.ended()
    assert ended.code == code
    assert "stopping and saving" in ended.err and "Traceback" not in ended.err
    assert f"continue with: {command('train.py', 'resume=run')}\n" in ended.err
    (checkpoint,) = (workplace / "run/checkpoints").iterdir()
    done = len(read_metrics(workplace / "run/metrics.jsonl"))
    assert checkpoint.name == f"step_{done:08d}" and steps <= done < 1000
    assert call("train", [*options, f"steps={done + 8}", "run_dir=whole"], monkeypatch) == 0
    assert call("train", ["resume=run", f"steps={done + 8}"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "run", step=done + 8)


def test_train_with_closed_output_goes_on_and_a_signal_saves_it(workplace):
    """As Ctrl-C ends `python train.py 2>&1 | tee log`: tee is gone before the run says that it saves."""
    process = start([*QUICK, "steps=2000", "save_every=1000", "eval_every=1", "run_dir=run"], workplace)
    steps = await_steps(process, workplace / "run", 3)
    process.stderr.close()
    process.stdout.close()
    await_steps(process, workplace / "run", steps + 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert newest(workplace / "run", (MODEL, OPTIMIZER)).manifest.step >= steps + 5


@pytest.mark.slow
def test_train_with_closed_output_runs_to_the_end(workplace):
    process = start([*QUICK, "steps=20", "eval_every=1", "run_dir=run"], workplace)
    await_steps(process, workplace / "run", 1)
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert newest(workplace / "run", (MODEL, OPTIMIZER)).manifest.step == 20


@pytest.fixture
def signals_at(monkeypatch):
    """Call it with a function of training.losses that computes a loss, and n: a signal comes, once or more often, while
    it runs for the n-th time."""

    def arrange(name: str, n: int, times: int = 1, sent: signal.Signals = signal.SIGINT) -> None:
        calls, real = [], getattr(training.losses, name)

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == n:
                for _ in range(times):
                    signal.raise_signal(sent)
            return real(*arguments)

        monkeypatch.setattr(training.losses, name, interrupted)
        return lambda: monkeypatch.setattr(training.losses, name, real)

    return arrange


# Each step has 4 micro-batches, each evaluation 16 batches, and the one at the end 38: where the signal comes, the
# checkpoints then, and the last line.
STOPS = {
    "in the first step": (
        "mean_loss",
        2,
        [],
        "within step 1, which does not count; nothing is to be saved yet; begin",
    ),
    "in a step": ("mean_loss", 4 * 7 + 2, [5, 7], "within step 8, which does not count; step 7 is saved; continue"),
    "in the step after one": (
        "mean_loss",
        4 * 8 + 2,
        [5, 8],
        "within step 9, which does not count; step 8 is saved; co",
    ),
    "in an evaluation": (
        "token_losses",
        16 + 3,
        [5, 8],
        "after step 8; saved, its evaluation is still to come; continue",
    ),
    "in the last one": (
        "token_losses",
        32 + 20,
        [5, 10, 12],
        "after step 12; saved, its evaluation is still to come; co",
    ),
}


def test_signal_within_step_or_evaluation_stops_and_resumes_to_the_same_run(workplace, monkeypatch, capsys, signals_at):
    options = changed(BUSY, "data.size=50", "eval_tokens=1024")
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    for i, (function, n, saved, reported) in enumerate(STOPS.values()):
        sent, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[i % 2]
        undo, run = signals_at(function, n, sent=sent), workplace / f"run{i}"
        assert call("train", [*options, f"run_dir=run{i}"], monkeypatch) == code
        undo()
        assert f"{sent.name}: stopped {reported}" in capsys.readouterr().err.splitlines()[-1]
        assert [checkpoint.step_of(path) for path in checkpoint.checkpoint_paths(run)] == saved
        assert len(read_metrics(run / "metrics.jsonl")) == max(saved, default=0)
        assert call("train", [f"resume=run{i}"], monkeypatch) == 0
        assert_same_run(workplace / "whole", run, step=12)
        whole = checkpoint.read(workplace / "whole/checkpoints/step_00000012", ()).manifest
        assert checkpoint.read(run / "checkpoints/step_00000012", ()).manifest.val_loss == whole.val_loss
    for run in ("run2", "run3"):  # scored before the signal, or when the run went on
        kept = checkpoint.read(workplace / run / "checkpoints/step_00000008", ()).manifest
        assert kept.val_loss == losses(workplace / "whole")[7][4]


@pytest.mark.parametrize(
    "killed_in", ["training.monitor.monitor.Monitor.record_late_evaluation", "training.run.checkpoint.score"]
)
def test_kill_during_delayed_evaluation_loses_nothing(workplace, monkeypatch, signals_at, killed_in):
    options = changed(BUSY, "data.size=50", "eval_tokens=1024", "eval_every=2", "steps=3")
    undo, saved = signals_at("token_losses", 3), workplace / "run/checkpoints/step_00000002"
    assert call("train", [*options, "run_dir=run"], monkeypatch) == 130
    undo()
    before = (saved / MODEL).stat()
    with monkeypatch.context() as patch:
        patch.setattr(killed_in, interrupted)
        assert call("train", ["resume=run"], monkeypatch) == 130
    after = (saved / MODEL).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert call("train", ["resume=run"], monkeypatch) == 0
    loss = losses(workplace / "run")[1][4]
    assert loss and checkpoint.read(saved, (MODEL, OPTIMIZER)).manifest.val_loss == loss


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once_and_keeps_the_checkpoint(workplace, monkeypatch, capsys, signals_at, sent):
    signals_at("mean_loss", 4 * 7 + 2, times=2, sent=sent)
    assert call("train", [*BUSY, "run_dir=run"], monkeypatch) == 130
    err = capsys.readouterr().err
    assert f"stopped at once; continue with: {command('train.py', 'resume=run')}" in err and "Traceback" not in err
    assert newest(workplace / "run", (MODEL, OPTIMIZER)).manifest.step == 5


def await_steps(process: subprocess.Popen | Training, run: Path, count: int) -> int:
    """Wait until it has done so many -> how many then."""
    while process.poll() is None:
        found = len(read_metrics(run / "metrics.jsonl"))
        if found >= count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"it ended after {len(read_metrics(run / 'metrics.jsonl'))} steps, of {count}")


def test_resume_wsd_with_more_steps_before_cooldown_is_the_longer_run(workplace, monkeypatch, capsys):
    options = [*BUSY, "schedule=wsd", "schedule.warmup_steps=2", "schedule.cooldown=0.25"]
    assert call("train", changed(options, "steps=20", "run_dir=long"), monkeypatch) == 0
    capsys.readouterr()
    assert call("train", [*options, "run_dir=short"], monkeypatch) == 0
    how = "resume=short steps=24  (after moving away the checkpoints after step_00000005: the cooldown began at step 9)"
    assert how in capsys.readouterr().out
    rewind(workplace / "short", workplace / "early", step=5)  # the cooldown begins at step 9
    assert call("train", ["resume=early", "steps=20"], monkeypatch) == 0
    rows = [[row[:4] for row in losses(workplace / name)] for name in ("long", "early")]
    assert rows[0] == rows[1]
    capsys.readouterr()
    assert call("train", ["resume=short", "steps=20"], monkeypatch) == 2
    assert "only before the cooldown, which began at step 9, and 12 are done" in capsys.readouterr().err
    assert call("train", ["resume=early", "steps=40"], monkeypatch) == 2


def test_complete_wsd_run_prints_whether_it_can_become_longer(workplace, monkeypatch, capsys):
    options = [*QUICK, "schedule=wsd", "schedule.warmup_steps=1", "steps=8", "save_every=100"]
    assert call("train", [*options, "run_dir=cooled"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "a longer run is a new one: the cooldown began at step 6, and no checkpoint from before is left" in out
    assert "resume=cooled" not in out
    assert call("train", ["resume=cooled", "steps=16"], monkeypatch) == 2
    assert call("train", [*options, "schedule.cooldown=0", "run_dir=warm"], monkeypatch) == 0
    assert f"{command('train.py', 'resume=warm', 'steps=16')}\n" in capsys.readouterr().out
    assert call("train", ["resume=warm", "steps=16"], monkeypatch) == 0


def test_resume_moved_folder_is_the_same_run(workplace, monkeypatch):
    assert call("train", [*LIGHT, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    (workplace / "elsewhere").mkdir()
    shutil.move("killed", "elsewhere/moved")
    monkeypatch.chdir("elsewhere")
    assert call("train", ["resume=moved"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "elsewhere/moved", step=12)


def test_resume_with_other_thread_count_warns(workplace, monkeypatch, capsys):
    assert call("train", [*LIGHT, "run_dir=run"], monkeypatch) == 0
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert call("train", ["resume=run", "steps=13"], monkeypatch) == 0
    assert "ran with threads 1, this process has 7: it goes on, not bit for bit" in capsys.readouterr().err
