"""The loss curve of a run, as a picture."""

import io
from pathlib import Path

from data.durable import write_whole
from training.log import read_metrics


def plot_loss(folder: Path) -> None:
    """Draws metrics.jsonl into loss.png: every step's training loss, its running mean, and the validation losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(folder / "metrics.jsonl")
    train = [(row["step"], row["train_loss"]) for row in rows if row["train_loss"] is not None]
    val = [(row["step"], row["val_loss"], row.get("val_tokens", 0)) for row in rows if row.get("val_loss") is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="training (running mean)")
    if val:
        for tokens, marker in zip(sorted({tokens for *_, tokens in val}), "os^", strict=False):
            points = [(step, loss) for step, loss, scored in val if scored == tokens]
            label = f"validation ({tokens:,} tokens)"
            axes.plot(*zip(*points, strict=True), f"{marker}-", color="tab:orange", markersize=5, label=label)
        axes.annotate(f"{val[-1][1]:.3f}", val[-1][:2], textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(title=folder.name, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    write_whole(folder / "loss.png", picture.getvalue())


def _running_mean(values: tuple[float, ...], weight: float = 0.1) -> list[float]:
    means, mean = [], values[0]
    for value in values:
        mean += weight * (value - mean)
        means.append(mean)
    return means
