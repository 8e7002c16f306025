"""Draws a sweep over attentions and seeds: validation loss against tokens, and bytes of KV cache per token.

python -m docs.picture SWEEP_FOLDER --out docs/attentions.png

The points of a curve are the evaluations of its runs: eval_every=100 gives a sweep of 1,500 steps fifteen of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation.pages.axes import loss_axis, x_axis
from ablation.pages.palette import MATPLOTLIB_MARKERS, look
from ablation.pages.pictures import gaps, set_axis
from ablation.pages.series import Series, late, series
from ablation.report import report_on
from ablation.results import Report, Variant
from ablation.sweep.stored import hint_for, read_sweep
from common.cli import Parser, one_line_errors
from common.errors import UserError
from common.figures import check_writable, legend, name_ticks, new_figure, save

INCHES = (7.0, 3.1)  # 840 pixels wide


def main() -> None:
    parser = Parser(prog="-m docs.picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of a sweep over attention and seed")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg or .pdf")
    with one_line_errors():
        args = parser.parse_args()
        check_writable(args.out, "--out")
        save(figure(report_on_attentions(args.sweep)), args.out)


def report_on_attentions(folder: Path) -> Report:
    """Raises UserError for what is no sweep over attentions, and for one where an attention has no finished run."""
    sweep = read_sweep(folder)
    if sweep is None:
        raise UserError(f"{folder} is no sweep{hint_for(folder)}")
    if set(sweep.varying) - {"seed"} != {"attention"}:
        varying = " and ".join(sweep.varying)
        raise UserError(f"{folder} is a sweep over {varying}: the picture is of one over attention, and seed")
    report = report_on([folder], decode=False)
    finished = {variant.name for variant in report.variants}
    missing = [name for name in dict.fromkeys(cell.variant for cell in sweep.cells) if name not in finished]
    if missing:
        raise UserError(f"{folder} has no finished run of {', '.join(missing)}: finish the sweep first")
    return report


def figure(report: Report) -> Any:
    """A matplotlib figure with two panels."""
    made, (left, right) = new_figure(*INCHES, panels=2)
    left.get_gridspec().set_width_ratios([3, 2])
    _losses(left, report.variants)
    _caches(right, report.variants)
    return made


def _losses(axes: Any, variants: Sequence[Variant]) -> None:
    found = [series(variant, "val") for variant in variants]
    lines = [_curve(axes, i, each) for i, each in enumerate(found)]
    shown = [line for each in found for line in (each.mean, *each.seeds)]
    set_axis(axes, "x", x_axis("tokens", [place for line in shown for place in line.x["tokens"]], log=False))
    unit = "validation loss, bits per byte"
    set_axis(axes, "y", loss_axis("bpb", [value for line in shown for value in late(line, "bpb")], label=unit))
    legend(axes, {variant.label: line for variant, line in zip(variants, lines, strict=True)})
    axes.get_legend().set_title(_of_seeds(variants), {"size": "small"})
    axes.get_legend().set_alignment("left")


def _curve(axes: Any, index: int, found: Series) -> Any:
    """Draw the mean over seeds and its band -> the line for the legend."""
    color, places = look(index).light, found.mean.x["tokens"]
    if len(found.seeds) > 1:
        axes.fill_between(places, gaps(found.low["bpb"]), gaps(found.high["bpb"]), color=color, alpha=0.15, linewidth=0)
    marker = MATPLOTLIB_MARKERS[look(index).marker]
    style = {"color": color, "marker": marker, "markersize": 4, "markeredgewidth": 0, "linewidth": 1.4}
    return axes.plot(places, gaps(found.mean.y["bpb"]), **style)[0]


def _of_seeds(variants: Sequence[Variant]) -> str:
    """What the lines and bands are."""
    counts = sorted({len(variant.curves) for variant in variants})
    if counts == [1]:
        return "one seed each"
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    return f"mean of {seeds},\nband: lowest to highest"


def _caches(axes: Any, variants: Sequence[Variant]) -> None:
    sizes = [variant.cache_bytes_per_token for variant in variants]
    bars = axes.barh(range(len(sizes)), sizes, height=0.6, color=[look(i).light for i in range(len(sizes))])
    axes.bar_label(bars, [f"{size:,.0f}" for size in sizes], padding=4)
    name_ticks(axes.yaxis, [variant.label for variant in variants])
    axes.set(xlabel="float32 KV cache, bytes per token", ylim=(len(sizes) - 0.5, -0.5), xlim=(0, 1.25 * max(sizes)))
    axes.set_xticks([])  # the bars are labelled
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


if __name__ == "__main__":
    main()
