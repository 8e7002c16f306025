"""AdamW's settings: which parameters learn at which rate."""

from pathlib import Path

import pytest
import torch

from tests.support import QUICK, SMOKE, batches, call, composed_run, small_model, training_state
from training.metrics_file import read_metrics
from training.run import checkpoint
from training.run.config import Run
from training.step import train_step


def after_a_step(run: Run) -> dict[str, torch.Tensor]:
    """How far each parameter moves in one step from weights that are the same for all runs."""
    model = small_model("attention=mla", "attention.q_lora_rank=8", "model.bias=true", "model.norm=layer")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(training_state(model, run.optim.build(model)), batches(4, 4), run.lr_factor(10))
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_bias_lr_is_the_rate_of_biases_and_of_nothing_else(optim):
    settings = (f"optim={optim}", "optim.lr=0.001", "schedule=wsd")
    usual = after_a_step(composed_run(*settings, "optim.bias_lr=0.001"))
    faster = after_a_step(composed_run(*settings, "optim.bias_lr=0.004"))
    assert sum(name.endswith("bias") for name in usual) > 10
    for name, moved in usual.items():
        expected = 4 * moved if name.endswith("bias") else moved
        torch.testing.assert_close(faster[name], expected, rtol=1e-3, atol=1e-9)


def test_bias_lr_is_recorded_and_resumed(workplace, monkeypatch):
    assert composed_run("optim.lr=0.5").optim.bias_lr == 4 * composed_run("optim=adamw", "optim.lr=0.5").optim.bias_lr
    whole = [*QUICK, "steps=8", "save_every=4", "optim.bias_lr=0.1"]
    assert call("train", [*whole, "run_dir=whole"], monkeypatch) == 0
    assert call("train", [*whole, "run_dir=stopped"], monkeypatch) == 0
    for path in checkpoint.checkpoint_paths(Path("stopped"))[1:]:
        checkpoint.remove_atomic(path)
    assert call("train", ["resume=stopped"], monkeypatch) == 0
    rows = [read_metrics(Path(run, "metrics.jsonl")) for run in ("whole", "stopped")]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]
    assert rows[0][0]["bias_lr"] / rows[0][0]["lr"] == pytest.approx(0.1 / composed_run(*SMOKE).optim.lr)
