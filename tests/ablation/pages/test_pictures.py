"""Pictures of a report, and the axes that they share with the page."""

import math
from dataclasses import replace

import pytest

from ablation.pages.axes import X_UNITS, bytes_axis, loss_axis, x_axis
from ablation.pages.palette import look
from ablation.pages.pictures import CAPTIONS, curves, figures, final
from ablation.pages.series import series
from common.figures import save
from tests.ablation import support


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_have_a_line_band_and_points_for_every_variant():
    figure = curves(support.four(), "tokens", "bpb", False)
    axes = figure.axes[0]
    labels = [variant.name for variant in support.four().variants]
    assert legend_of(figure) == labels and axes.get_legend() is None  # beside the curves, not over them
    assert len(axes.collections) == 4
    means = [line for line in axes.lines if line.get_linewidth() == 1.4 and len(line.get_xdata())]
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert len(means) == 4 and [len(line.get_xdata()) for line in points] == [12] * 4
    assert axes.get_xlabel() == "tokens trained on" and axes.get_ylabel() == "bits per byte"


def test_curves_of_unlike_tokenizers_are_in_bits_per_byte_only():
    assert curves(support.unlike(), "tokens", "loss", False).axes[0].get_ylabel() == "bits per byte"


def test_curves_of_fourteen_variants_differ_in_color_dash_or_marker():
    looks = {look(i) for i in range(40)}
    assert len(looks) == 40 and len({look(i).light for i in range(13)}) == 13
    assert len(legend_of(curves(support.many(), "steps", "loss", False))) == 14


@pytest.mark.filterwarnings("error")
def test_pictures_of_any_names_show_them(tmp_path):
    found = figures(support.weird())
    assert legend_of(found["curves.png"])[:4] == ["$x_1$", "_a", "<b>", "a&b|`c`"]
    long, *rest = legend_of(found["curves.png"])[4:]
    assert len(long) == 40 and rest == ["漢字\\x1b[31m\\n", "b\\udcff", "[red]*q*[/red]"]
    for name, figure in found.items():
        save(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    ticks = found["final.png"].axes[0].get_yticklabels()
    assert [text.get_text() for text in ticks][:3] == ["$x_1$", "_a", "<b>"] and not ticks[0].get_parse_math()


@pytest.mark.parametrize(("x", "log"), [*zip(X_UNITS, (False, True, True, False), strict=True)])
def test_curves_over_every_axis_have_ticks_within_it(x, log):
    axes = curves(support.four(), x, "loss", log).axes[0]
    low, high = axes.get_xlim()
    ticks = axes.get_xticks()
    assert len(ticks) >= 2 and low <= min(ticks) and max(ticks) <= high
    assert (axes.get_xscale(), axes.get_yscale()) == (("log", "log") if log else ("linear", "linear"))


@pytest.mark.parametrize(("losses", "log"), [([0.0, 0.2, 3.0], True), ([0.0], True), ([0.0, 3.0], False)])
def test_axis_of_losses_that_reach_zero_has_ticks_and_a_logarithm(losses, log):
    axis = loss_axis("loss", losses, log)
    assert (axis.low > 0) == log and len(axis.ticks) >= 2
    assert all(axis.low <= place <= axis.high for place, _ in axis.ticks)


def test_final_has_means_seeds_and_intervals():
    left, right = final(support.four()).axes
    assert [len(line.get_xdata()) for line in left.lines] == [2, 3, 1] * 4
    assert left.get_ylim() == (3.5, -0.5)  # the baseline above
    assert [line.get_xdata()[0] for line in right.lines if len(line.get_xdata()) == 1] == [
        found.mean for found in support.four().comparison.differences.values()
    ]
    assert len(final(support.two_runs()).axes) == 1


@pytest.mark.parametrize("report", [support.four, support.two_runs, support.with_accuracy])
def test_pictures_explain_themselves_within_their_edges(report, tmp_path):
    for name, figure in figures(report()).items():
        save(figure, tmp_path / name)  # which lays it out
        text = figure._supxlabel
        assert text.get_text() == CAPTIONS[name]
        place = text.get_window_extent()
        assert place.x0 >= 0 and place.x1 <= figure.bbox.width and place.y0 >= 0


def test_frontier_is_left_out_where_all_caches_are_alike():
    assert list(figures(support.identical())) == ["curves.png", "final.png"]
    assert list(figures(replace(support.four(), variants=[]))) == []


def test_series_band_spans_the_seeds_at_common_steps():
    variant = support.four().variants[0]
    short = replace(variant.curves[0], val_step=variant.curves[0].val_step[:5])
    found = series(replace(variant, curves=[short, *variant.curves[1:]]), "val")
    assert found.mean.x["steps"] == [50, 100, 150, 200, 250]
    values = [curve.val_loss[2] for curve in variant.curves]
    assert found.low["loss"][2] == min(values) and found.high["loss"][2] == max(values)
    assert found.mean.y["loss"][2] == pytest.approx(sum(values) / 3)


def test_series_thinned_keeps_both_ends_and_the_beginning():
    found = series(support.four().variants[0], "train", 60).mean.x["steps"]
    assert found[0] == 1 and found[-1] == 598 and 45 <= len(found) <= 60 and found[1] - found[0] < found[-1] - found[-2]


@pytest.mark.parametrize("log", [False, True])
def test_axes_of_any_values_place_them_within(log):
    for values in ([3.2], [3.2, 3.2], [1e-9, 1e9], [2.0, 2.0000001], [0.0, 0.0]):
        if log and min(values) <= 0:
            continue
        axis = loss_axis("bpb", values, log)
        assert all(0 <= axis.place(value) <= 1 for value in values) and math.isfinite(axis.low)
        for axis in (x_axis("tokens", values, log), bytes_axis(values)):
            assert all(axis.place(max(value, 1)) >= -0.01 for value in values) and axis.high > axis.low
