"""How evenly the experts of a run were chosen, as a picture beside its loss curve."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.figures import label, legend, new_figure, save
from training.metrics_file import MetricRow, read_metrics

PICTURE = "experts.png"
LOAD = re.compile(r"experts/layer_(\d+)/load_(\d+)")  # columns of metrics.jsonl
MOST = 2.0  # loads from here on have one colour


def plot_experts(folder: Path) -> None:
    """Draw metrics.jsonl as experts.png: of each step the lowest and the highest load of an expert, and of the last
    evaluation the loads of all, by layer. Without experts, none is drawn."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if row.get("lowest_load") is not None and row.get("highest_load") is not None]
    if not steps:
        return
    last = next((loads for row in reversed(rows) if (loads := loads_of(row))), {})
    figure, axes = new_figure(11 if last else 6, 4, panels=2 if last else 1)
    over_steps = axes[0] if last else axes
    label(over_steps.title, folder.name)
    over_steps.set(xlabel="step", ylabel="load of an expert (1: the mean of its layer)")
    lines = {}
    for name in ("highest", "lowest"):
        values = [row[f"{name}_load"] for row in steps]
        (lines[f"{name} of all layers"],) = over_steps.plot([row["step"] for row in steps], values, linewidth=0.8)
    over_steps.axhline(1, color="gray", linewidth=0.8)
    over_steps.set_ylim(bottom=0)
    legend(over_steps, lines)
    if last:
        _draw_loads(figure, axes[1], last)
    save(figure, folder / PICTURE)


def loads_of(row: MetricRow) -> dict[tuple[int, int], float]:
    """The loads that an evaluation left in a row, by layer and expert."""
    found = ((LOAD.fullmatch(key), value) for key, value in row.items())
    return {(int(match[1]), int(match[2])): value for match, value in found if match and value is not None}


def _draw_loads(figure: Any, axes: Any, loads: Mapping[tuple[int, int], float]) -> None:
    layers, experts = (sorted({place[i] for place in loads}) for i in (0, 1))
    grid = [[loads.get((layer, expert), 0.0) for expert in experts] for layer in layers]
    axes.grid(False)
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=MOST, cmap="RdBu_r", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer", title="loads at the last evaluation")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, ax=axes, extend="max")
