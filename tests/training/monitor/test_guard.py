"""Guard: a step that is not finite is skipped and reported; too many in a row end the run."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from model.kernels.sdpa import SDPA
from model.score import Score
from runtime.precision import LossScale, MixedPrecision
from tests.support import (
    QUICK,
    ROOT,
    SMOKE,
    TINY,
    batches,
    call,
    changed,
    composed_run,
    configured,
    small_model,
    training_state,
)
from tests.training.runs import assert_same_run, losses, rewind
from training.losses import Losses, mean_loss
from training.metrics_file import read_metrics
from training.monitor.guard import SPIKE_WINDOW, Guard
from training.optim.adamw import AdamWConfig
from training.run import checkpoint, replay
from training.step import train_step


def sometimes_nan(model, batch):
    """A loss that some batches make NaN."""
    loss, aux = mean_loss(model, batch)
    return loss * (math.nan if batch.inputs.sum() % 4 == 0 else 1.0), aux


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", True), ("bf16", False), ("fp16", False)])
def test_train_step_with_a_nan_loss_changes_nothing(precision, fused):
    model = small_model("attention=mla", kernel=SDPA())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    training = training_state(model, optimizer, precision, clip_norm=1.0)
    good, bad = batches(4, 2), lambda *arguments: (mean_loss(*arguments)[0] * math.nan, {})
    assert not train_step(training, good, 1.0).skipped
    before = [p.detach().clone() for p in model.parameters()]
    state = {p: {key: value.clone() for key, value in parts.items()} for p, parts in optimizer.state.items()}
    training.losses = Losses(bad)
    result = train_step(training, good, 1.0)
    training.losses = Losses()
    assert result.skipped and not result.loss.isfinite()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(optimizer.state[p][key], was) for p, parts in state.items() for key, was in parts.items())
    assert not train_step(training, good, 1.0).skipped
    assert not all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_train_step_with_an_infinite_gradient_is_skipped():
    model = small_model("attention=gqa", kernel=SDPA())
    optimizer = configured(AdamWConfig, lr=1e-3).build(model)

    def steep(*arguments):
        loss, aux = mean_loss(*arguments)
        return loss + (loss - loss.detach()) * 1e38 * 1e38, aux

    before = [p.detach().clone() for p in model.parameters()]
    result = train_step(training_state(model, optimizer, clip_norm=1.0, losses=Losses(steep)), batches(4, 4), 1.0)
    assert result.loss.isfinite() and not result.grad_norm.isfinite() and result.skipped
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_loss_scale_equals_pytorchs_grad_scaler():
    ours, theirs = LossScale(torch.device("cpu")), torch.amp.GradScaler("cpu", growth_interval=LossScale.GROWTH_STEPS)
    theirs._lazy_init_scale_growth_tracker(torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for _ in range(3 * LossScale.GROWTH_STEPS):
        skipped = torch.rand((), generator=draw) < 3e-4
        ours.update(skipped)
        torch._amp_update_scale_(
            theirs._scale, theirs._growth_tracker, skipped.float(), 2.0, 0.5, LossScale.GROWTH_STEPS
        )
        assert ours.scale == theirs._scale and ours.good_steps == theirs._growth_tracker
    assert ours.scale != LossScale.INITIAL


def test_loss_scale_stays_within_its_limits_and_recovers(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 2)
    scale = LossScale(torch.device("cpu"))
    for _ in range(2 * 12):  # 2^16 would have become 2^28
        scale.update(torch.tensor(False))
    assert scale.scale == 2**24
    scale.update(torch.tensor(True))
    assert scale.scale == 2**23
    for _ in range(200):
        scale.update(torch.tensor(True))
    assert scale.state().scale == 2**-24
    for stored, expected in ((2.0**100, 2**24), (math.inf, 2**24), (2.0**10, 2**10), (2.0**-140, 2**-24)):
        scale.load(LossScale.State.model_construct(scale=stored, good_steps=7))
        assert (scale.scale, scale.good_steps) == (expected, 7)


def test_float16_gradients_equal_those_of_float32():
    """The smallest would be lost without the scale."""
    model = small_model("attention=gqa", kernel=SDPA())
    (batch,) = batches(8, 8)
    expected = torch.autograd.grad(mean_loss(model, batch)[0], list(model.parameters()))
    mixed = MixedPrecision(model, "fp16")
    mixed.backward(mean_loss(mixed.model, batch)[0])
    mixed.unscale()
    for (name, parameter), exact in zip(model.named_parameters(), expected, strict=True):
        assert (parameter.grad - exact).norm() < 0.01 * exact.norm(), name


def test_skipped_updates_are_counted_reported_with_their_documents_and_resumed(workplace, monkeypatch, capsys):
    monkeypatch.setattr("training.losses.mean_loss", sometimes_nan)
    options = [
        *changed(QUICK, "batch_tokens=128"),
        "steps=16",
        "save_every=5",
        "micro_batch_size=1",
        "keep_last=9",
    ]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rows = read_metrics(workplace / "whole/metrics.jsonl")
    skipped = [row for row in rows if row.get("skipped")]
    assert 2 < len(skipped) < 14
    assert all(row["train_loss"] is None and row["grad_norm"] is None for row in skipped)
    shown = re.findall(r"step (\d+): loss nan, gradient norm nan: update skipped, (\d+) so far; its documents: (\S+)",
                      capsys.readouterr().err)  # fmt: skip
    assert [(int(step), int(count)) for step, count, _ in shown] == [(r["step"], i + 1) for i, r in enumerate(skipped)]
    assert all(name.startswith("synthetic/") for *_, name in shown)
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=16)


def test_updates_skipped_in_a_row_stop_the_run_and_the_printed_command_replays_it(workplace, monkeypatch, capsys):
    options = [*QUICK, "optim=adamw", "optim.lr=1e30", "clip_norm=0", "steps=500", "max_skipped_updates=5"]
    options += ["model.dropout=0.1", "run_dir='a run'", "save_every=2"]
    assert call("train", options, monkeypatch) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert "updates in a row were skipped" in last and "smaller optim.lr than 1e+30" in last
    rows = losses(workplace / "a run")
    assert len(rows) == 6 and rows[0][-1] is None and all(row[-1] for row in rows[1:])
    assert err.count("update skipped") == 5  # not a line for each of them
    (command,) = re.findall(r"python -m (training\.run\.replay .*)$", last)
    module, *words = shlex.split(command)
    replayed = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert replayed.returncode == 0, replayed.stderr
    replay.replay(Path(*words))
    assert replayed.stdout == capsys.readouterr().out  # as often as one likes
    (loss,) = re.findall(r"micro-step +loss (\S+) nats", replayed.stdout)
    assert float(loss) == pytest.approx(rows[-1][1], abs=1e-4)
    assert re.search(r"gradients +norm nan; not finite in embedding\.weight", replayed.stdout)
    assert re.search(r"the largest number is \d\.\d+e\+(28|29|30)", replayed.stdout)
    # The run goes on where it stopped, though not for long, and leaves nothing but its words: they are the same again.
    shown = []
    for _ in range(2):
        assert call("train", ["resume='a run'", "save_every=1"], monkeypatch) == 2
        shown.append(capsys.readouterr().err.splitlines()[-1])
        assert len(losses(workplace / "a run")) == 7 and checkpoint.steps_done(workplace / "a run") == 6
    assert "updates in a row were skipped up to step 7" in shown[0] and shown[0] == shown[1]


def test_resume_of_a_diverged_run_continues_when_losses_are_finite(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("training.losses.mean_loss", lambda *arguments: (mean_loss(*arguments)[0] * math.nan, {}))
        assert call("train", [*QUICK, "steps=12", "max_skipped_updates=3", "run_dir=run"], patch) == 2
    capsys.readouterr()
    stopped = len(losses(workplace / "run"))
    assert call("train", ["resume=run"], monkeypatch) == 0
    rows = losses(workplace / "run")
    assert len(rows) == 12 and all(row[-1] for row in rows[:stopped]) and not any(row[-1] for row in rows[stopped:])


def test_validation_loss_that_is_not_finite_is_null_and_never_best(workplace, monkeypatch, capsys):
    scores = iter([Score(math.inf, 9, 9), Score(9.0, 9, 9), Score(math.nan, 9, 9), Score(math.nan, 9, 9)])
    monkeypatch.setattr("training.session.evaluate", lambda *_, **__: next(scores))
    assert call("train", changed(TINY, "steps=6", "run_dir=run"), monkeypatch) == 0
    assert [row[4] for row in losses(workplace / "run") if row[0] in (2, 4, 6)] == [None, 1.0, None]
    assert checkpoint.best(workplace / "run").path.name == "step_00000004"


BATCHES = {
    "gone": (lambda tensors: {"inputs": tensors["inputs"]}, "targets is not of"),
    "of another shape": (lambda tensors: tensors | {"inputs": tensors["inputs"][:, :, :9]}, "inputs is not of"),
    "of half numbers": (lambda tensors: tensors | {"inputs": tensors["inputs"].float()}, "inputs is not of"),
    "of no tokens": (lambda tensors: tensors | {"targets": tensors["targets"] + 257}, "targets that are no tokens"),
}


@pytest.mark.parametrize(("change", "complaint"), BATCHES.values(), ids=BATCHES)
def test_replay_of_a_batch_that_does_not_fit_is_refused(tmp_path, change, complaint):
    run, shape = composed_run(*SMOKE), (1, 16, 64)
    tensors = {name: torch.zeros(shape, dtype=torch.int64) for name in ("inputs", "targets")}
    kept = checkpoint.Checkpoint(tmp_path, None, {replay.BATCH: tensors})
    assert replay.stored_batch(kept, run, 257)[0].shape == shape
    with pytest.raises(UserError, match=complaint):
        replay.stored_batch(kept._replace(tensors={replay.BATCH: change(tensors)}), run, 257)


PLACES = {
    "layers.1.mlp.up_proj.weight": "layers.1.mlp.up_proj (Linear), of finite numbers",
    "layers.0.attention.v_proj.weight": "layers.0.attention.v_proj (Linear), of finite numbers",
    "embedding.weight": "embedding (PaddedEmbedding), of finite numbers",
    "head.weight": "the logits (TransformerLM), of finite numbers",
}


@pytest.mark.parametrize(("name", "place"), PLACES.items(), ids=PLACES)
def test_replay_names_the_first_module_that_is_not_finite(workplace, monkeypatch, capsys, name, place):
    options = [*SMOKE, "data.size=40", "steps=3", "max_skipped_updates=1", "model.tie_embeddings=false", "run_dir=run"]
    real = checkpoint.write

    def spoilt(path, run, corpus, training, files, *rest):
        files[checkpoint.MODEL][name][:] = math.inf
        real(path, run, corpus, training, files, *rest)

    monkeypatch.setattr("training.losses.mean_loss", lambda *arguments: (mean_loss(*arguments)[0] * math.nan, {}))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", spoilt)
        assert call("train", options, patch) == 2
    capsys.readouterr()
    monkeypatch.chdir("run/failures")
    (failure,) = (workplace / "run/failures").iterdir()
    replay.replay(Path(failure.name))
    assert f"first not finite in the output of {place}" in capsys.readouterr().out


def test_replay_of_a_missing_folder_is_one_line(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        replay.main()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing is not a stored step" in err


def rows_of(*train_losses):
    return [{"step": i + 1, "train_loss": loss} for i, loss in enumerate(train_losses)]


def test_guard_reports_a_spike_once_and_no_falling_or_noisy_losses():
    draw = torch.Generator().manual_seed(0)
    noisy = [6 * math.exp(-i / 80) + 3 + 0.3 * torch.randn((), generator=draw).item() for i in range(600)]
    guard = Guard([], 3)
    assert not any(guard.see(row) for row in rows_of(*noisy))
    assert [guard.see(row) for row in rows_of(9.0, 9.5, 3.0, 8.0)] == [True, False, False, True]
    assert guard.usual_loss == pytest.approx(3, abs=0.3)


def test_guard_from_past_rows_counts_as_if_it_had_seen_them():
    rows = rows_of(*[3.0] * SPIKE_WINDOW) + [{"step": 65, "train_loss": None, "skipped": True}] * 3
    guard = Guard(rows, 3)
    assert (guard.skipped, guard.in_a_row) == (3, 3)
    assert guard.see({"train_loss": 4.0})
    assert guard.in_a_row == 0 and guard.skipped == 3


def test_guard_of_a_resumed_run_that_had_diverged_waits_for_a_step_of_its_own():
    bad = {"train_loss": None, "skipped": True}
    guard = Guard([bad, bad], 2)
    assert guard.diverged_before and not guard.diverged
    guard.see(bad)
    assert guard.diverged_before and guard.diverged
    guard.see({"train_loss": 3.0})
    assert not guard.diverged_before and not guard.diverged
    for _ in range(2):
        assert not guard.diverged
        guard.see(bad)
    assert guard.diverged and not guard.diverged_before


def test_spike_in_a_run_is_reported_with_its_documents(workplace, monkeypatch, capsys):
    calls = []

    def spiking(*arguments):
        calls.append(1)
        loss, aux = mean_loss(*arguments)
        return loss + (5.0 if len(calls) == 70 else 0.0), aux

    monkeypatch.setattr("training.losses.mean_loss", spiking)
    assert (
        call(
            "train",
            [*changed(QUICK, "batch_tokens=64"), "steps=71", "eval_every=0", "save_every=100", "run_dir=run"],
            monkeypatch,
        )
        == 0
    )
    (shown,) = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    assert re.match(r"step 70: loss \S+ is a spike, \S+ was usual; its documents: synthetic/", shown)
