"""Compares two runs bit for bit."""

from pathlib import Path

import torch

from training.metrics_file import read_metrics
from training.run import checkpoint

COMPARED = (
    "step",
    "train_loss",
    "grad_norm",
    "lr",
    "muon_lr",
    "bias_lr",
    "val_loss",
    "skipped",
)  # not what a clock measured


def same_run(one: Path, other: Path, step: int) -> bool:
    """Whether two runs have the same metrics at each step, and the same weights and optimizer state after `step`."""
    return _metrics(one) == _metrics(other) and _same_tensors(_tensors(one, step), _tensors(other, step))


def _metrics(run: Path) -> list[tuple]:
    return [tuple(row.get(key) for key in COMPARED) for row in read_metrics(run / "metrics.jsonl")]


def _tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = run / f"checkpoints/step_{step:08d}"
    found = checkpoint.read(path, (checkpoint.MODEL, checkpoint.OPTIMIZER)).tensors
    return found[checkpoint.MODEL] | found[checkpoint.OPTIMIZER]


def _same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
