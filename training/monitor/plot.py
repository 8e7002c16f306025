"""The loss curve of a run as a picture, drawn when it ends. Several runs are compared by compare.py."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.figures import label, legend, new_figure, save
from training.metrics_file import PICTURE, read_metrics

WINDOW = 10  # steps that a running mean is over at most, about


def plot_loss(folder: Path) -> None:
    """Draw metrics.jsonl as loss.png: the training loss of every step, its running mean, and the validation losses."""
    rows = read_metrics(folder / "metrics.jsonl")
    train, val = _curves(rows)
    figure, axes = new_figure(7, 4)
    label(axes.title, folder.name)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    lines = {}
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        window = _window(len(losses))
        (lines[_smoothed(window)],) = axes.plot(steps, _running_mean(losses, window), color="tab:blue")
    if val:
        for tokens, marker in _markers(val).items():
            points = [(step, loss) for step, loss, scored in val if scored == tokens]
            style = {"color": "tab:orange", "markersize": 5}
            (lines[_scored(tokens)],) = axes.plot(*zip(*points, strict=True), f"{marker}-", **style)
        axes.annotate(f"{val[-1][1]:.3f}", val[-1][:2], textcoords="offset points", xytext=(0, 8), ha="center")
    legend(axes, lines)
    save(figure, folder / PICTURE)


def _curves(rows: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float, int]]]:
    """(step, loss) in training, and (step, loss, tokens scored) in validation."""
    train = [(row["step"], row["train_loss"]) for row in rows if row["train_loss"] is not None]
    scored = [row for row in rows if row.get("val_loss") is not None]
    return train, [(row["step"], row["val_loss"], row.get("val_tokens") or 0) for row in scored]


def _markers(val: Sequence[tuple[int, float, int]]) -> dict[int, str]:
    """A marker for each number of tokens scored: those of a prefix, and of the whole validation set."""
    return dict(zip(sorted({tokens for *_, tokens in val}), itertools.cycle("os^Dv")))


def _scored(tokens: int) -> str:
    return f"validation ({tokens:,} tokens)" if tokens else "validation"  # rows of old did not say how many


def _window(steps: int) -> float:
    """Steps of the running mean: WINDOW, or a twentieth of the run: in a short one, a longer mean would lag behind."""
    return min(WINDOW, max(1.0, steps / 20))


def _smoothed(window: float) -> str:
    return "training" if window == 1 else f"training (running mean over about {window:.2g} steps)"


def _running_mean(values: Sequence[float], window: float) -> list[float]:
    means, mean = [], values[0]
    for value in values:
        mean += (value - mean) / window
        means.append(mean)
    return means
