"""Loss curves as pictures: of one run, and of several runs in one.

python -m training.monitor.plot runs/A runs/B                 # in the checkout; writes losses.png
python -m training.monitor.plot runs/* --x tokens -o all.svg
"""

if __name__ == "__main__":
    from common import process

    process.start("matplotlib", "pydantic", "rich")

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import process
from common.atomic_io import exists
from common.cli import Parser, one_line_errors
from common.errors import UserError, escaped
from common.figures import check_writable, save
from common.invocation import command
from common.paths import raise_unreadable
from common.streams import show
from training.metrics_file import PICTURE, read_metrics

PROGRAM = "-m training.monitor.plot"
WINDOW = 10  # steps that a running mean is over at most, about


def plot_loss(folder: Path) -> None:
    """Draw metrics.jsonl as loss.png: the training loss of every step, its running mean, and the validation losses."""
    rows = read_metrics(folder / "metrics.jsonl")
    train, val = _curves(rows, "step")
    figure, axes = empty_axes(folder.name, "step")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        window = _window(len(losses))
        axes.plot(steps, _running_mean(losses, window), color="tab:blue", label=_smoothed(window))
    if val:
        for tokens, marker in _markers(val).items():
            points = [(step, loss) for step, loss, scored in val if scored == tokens]
            axes.plot(*zip(*points, strict=True), f"{marker}-", color="tab:orange", markersize=5, label=_scored(tokens))
        axes.annotate(f"{val[-1][1]:.3f}", val[-1][:2], textcoords="offset points", xytext=(0, 8), ha="center")
    save_axes(figure, axes, folder / PICTURE)


def plot_runs(folders: Sequence[Path], path: Path, x: str) -> None:
    """Draw several runs over each other: a line is the running mean of a run's training losses, its points are
    validation losses.

    x: step or tokens. Raises UserError for what is no run, or has no rows yet, and for a path that cannot be written.
    """
    check_writable(path, "-o")
    folders = [folder for folder in folders if not os.path.isfile(folder)]  # runs/* has the settings of sweeps, too
    if not folders:
        raise UserError(f"there is no run among what was given: {command(PROGRAM, 'runs/A', 'runs/B')}")
    found = [(label, *_curves(_rows_of(folder, x), x)) for label, folder in zip(_labels(folders), folders, strict=True)]
    window = _window(min(len(train) for _, train, _ in found))  # the shortest one's, for all: none lags, or all alike
    markers = _markers([point for *_, val in found for point in val])
    figure, axes = empty_axes("", x)
    for i, (label, train, val) in enumerate(found):
        color = f"C{i}"  # after ten runs, colors come again
        if train:
            places, losses = zip(*train, strict=True)
            axes.plot(places, _running_mean(losses, window), color=color, linewidth=1, label=label)
        for tokens in {tokens for *_, tokens in val}:
            points = [(place, loss) for place, loss, scored in val if scored == tokens]
            axes.plot(*zip(*points, strict=True), f"{markers[tokens]}--", color=color, markersize=4, linewidth=0.8)
    axes.plot([], [], "-", color="gray", linewidth=1, label=_smoothed(window))
    for tokens, marker in markers.items():
        axes.plot([], [], f"{marker}--", color="gray", markersize=4, linewidth=0.8, label=_scored(tokens))
    save_axes(figure, axes, path)


def _rows_of(folder: Path, x: str) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    try:
        there = exists(metrics)
    except OSError as error:
        raise_unreadable(metrics, error)
    if not there:
        raise UserError(f"{folder} is not a run: it has no metrics.jsonl")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get(x) is not None]
    if not any(row["train_loss"] is not None for row in rows):
        raise UserError(f"{folder} has nothing to draw yet: no step with a finite loss is in its metrics.jsonl")
    return rows


def _labels(folders: Sequence[Path]) -> list[str]:
    """Legend labels: the runs' names; where two are the same, all paths as given."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _curves(rows: Sequence[dict[str, Any]], x: str) -> tuple[list[tuple[float, float]], list[tuple[float, float, int]]]:
    """(x, loss) in training, and (x, loss, tokens scored) in validation."""
    train = [(row[x], row["train_loss"]) for row in rows if row["train_loss"] is not None]
    val = [(row[x], row["val_loss"], row.get("val_tokens") or 0) for row in rows if row.get("val_loss") is not None]
    return train, val


def empty_axes(title: str, x: str) -> tuple[Any, Any]:
    """A figure and its axes, for losses over x."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(xlabel=x, ylabel="loss (nats per token)")
    axes.set_title(escaped(title), parse_math=False)  # a run's name is no formula
    axes.grid(alpha=0.3)
    return figure, axes


def save_axes(figure: Any, axes: Any, path: Path) -> None:
    """Save the figure, with a legend of what has a label, if anything was drawn."""
    from matplotlib import pyplot as plt

    named = [line for line in axes.lines if not line.get_label().startswith("_child")]  # what matplotlib calls the rest
    if named:
        legend = axes.legend(named, ["-"] * len(named), fontsize="small")  # it leaves out names that begin with _
        for text, line in zip(legend.get_texts(), named, strict=True):
            text.set(text=escaped(line.get_label()), parse_math=False)
    save(figure, path)
    plt.close(figure)


def _markers(val: Sequence[tuple[float, float, int]]) -> dict[int, str]:
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


def main() -> None:
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("losses.png"), help="the picture (.png, .svg or .pdf)"
    )
    parser.add_argument("--x", choices=("steps", "tokens"), default="steps", help="what the losses are drawn over")
    with one_line_errors():
        process.end_by_unwinding()
        arguments = parser.parse_args()
        plot_runs(arguments.runs, arguments.output, arguments.x.replace("steps", "step"))
        show(f"{arguments.output}\n")


if __name__ == "__main__":
    main()
