"""Comparison of two runs: metrics, weights and optimizer state must be equal."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.metrics_file import read_metrics
from training.run import checkpoint


def losses(run: Path) -> list[tuple]:
    """The metrics of each step that do not depend on a clock; checks that the steps are in order, each once."""
    rows = read_metrics(run / "metrics.jsonl")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = rows[0]["step"]  # 0 where validation came before training
    assert first in (0, 1) and [row["step"] for row in rows] == list(range(first, first + len(lines)))
    kept = ("step", "train_loss", "grad_norm", "lr", "val_loss", "muon_lr", "val_accuracy", "skipped")
    return [tuple(row.get(key) for key in kept) for row in rows]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state after a step."""
    path = run / f"checkpoints/step_{step:08d}"
    if (path / "model").is_dir():  # of several processes
        found = checkpoint.read(path, (checkpoint.MODEL, checkpoint.OPTIMIZER)).tensors
        return found[checkpoint.MODEL] | found[checkpoint.OPTIMIZER]
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def assert_same_run(one: Path, other: Path, step: int) -> None:
    assert losses(one) == losses(other)
    expected, found = tensors(one, step), tensors(other, step)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def rewind(run: Path, copy: Path, step: int) -> None:
    """A copy of the run as a kill some steps after its checkpoint of `step` would leave it."""
    shutil.copytree(run, copy)
    later = [path for path in (copy / "checkpoints").iterdir() if path.name > f"step_{step:08d}"]
    first = min((int(path.name.removeprefix("step_")) for path in later), default=None)
    for path in later:
        shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:first]))
