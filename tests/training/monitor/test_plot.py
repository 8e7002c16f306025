"""Curves of several runs in one picture."""

import json
import shutil
import sys

import pytest

from training.monitor import plot

PNG = b"\x89PNG\r\n"


@pytest.fixture
def runs(workplace):
    """Two runs with losses, one that was scored, and one without a finite loss; at places of their own."""
    for name, rows in {
        "runs/one": [
            {"step": s, "tokens": 64 * s, "train_loss": 4 / s, "val_loss": 3.0 if s == 4 else None} for s in range(1, 9)
        ],
        "runs/two": [{"step": s, "tokens": 32 * s, "train_loss": 5 / s} for s in range(1, 5)],
        "other/two": [{"step": 1, "tokens": 9, "train_loss": 1.0}],
        "runs/diverged": [{"step": 1, "tokens": 9, "train_loss": None}],
    }.items():
        (workplace / name).mkdir(parents=True)
        (workplace / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workplace


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plot", *arguments])
    try:
        plot.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def drawn(monkeypatch) -> list:
    """The axes of the pictures that are saved from here on."""
    found, save = [], plot.save_axes
    monkeypatch.setattr(plot, "save_axes", lambda figure, axes, path: (found.append(axes), save(figure, axes, path)))
    return found


@pytest.mark.filterwarnings("error")
def test_plot_of_a_run_with_any_name_is_titled_with_it(runs, monkeypatch, capsys):
    names, found = ["_a", "$x_$", "$\\oops$", "a\x1b[31m\n", "漢", "b\udcff"], drawn(monkeypatch)
    for name in names:
        shutil.copytree(runs / "runs/one", runs / name)
        plot.plot_loss(runs / name)
    assert call(monkeypatch, *names) == 0
    shown = ["_a", "$x_$", "$\\oops$", "a\\x1b[31m\\n", "漢", "b\\udcff"]
    assert [axes.get_title() for axes in found[:-1]] == shown
    assert [text.get_text() for text in found[-1].get_legend().get_texts()][: len(names)] == shown
    assert capsys.readouterr().err == ""


def test_plot_of_several_runs_labels_them_by_name(runs, monkeypatch, capsys):
    found = drawn(monkeypatch)
    assert call(monkeypatch, "runs/one", "runs/two") == 0
    assert capsys.readouterr().out == "losses.png\n" and (runs / "losses.png").read_bytes().startswith(PNG)
    labels = [text.get_text() for text in found[0].get_legend().get_texts()]
    assert labels == ["one", "two", "training", "validation"]
    lines = {line.get_label(): list(line.get_xdata()) for line in found[0].lines}
    assert lines["one"] == list(range(1, 9)) and lines["two"] == [1, 2, 3, 4]
    assert [4] in [list(line.get_xdata()) for line in found[0].lines]  # where it was scored


def test_plot_over_tokens_compares_runs_of_different_batches(runs, monkeypatch):
    found = drawn(monkeypatch)
    assert call(monkeypatch, "runs/one", "runs/two", "other/two", "--x", "tokens", "-o", "all.svg") == 0
    assert b"<svg" in (runs / "all.svg").read_bytes()
    lines = {line.get_label(): list(line.get_xdata()) for line in found[0].lines}
    assert lines["runs/two"] == [32, 64, 96, 128] and lines["other/two"] == [9]  # same names: told apart by paths
    assert found[0].get_xlabel() == "tokens"


def run_of(folder, losses, **last) -> None:
    rows = [{"step": s, "tokens": s, "train_loss": loss} for s, loss in enumerate(losses, 1)]
    rows[-1] |= last
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_plot_smooths_long_runs_only(workplace, monkeypatch):
    """A mean of ten steps would show the end of a run of ten steps at half its fall."""
    found = drawn(monkeypatch)
    run_of(workplace / "10", [9.0 - s for s in range(10)])
    run_of(workplace / "400", [3 + (-1) ** s * 0.5 for s in range(400)])
    for name in ("10", "400"):
        plot.plot_loss(workplace / name)
    assert list(found[0].lines[1].get_ydata()) == [9.0 - s for s in range(10)]
    assert max(abs(loss - 3) for loss in found[1].lines[1].get_ydata()[100:]) < 0.05
    labels = [axes.get_legend().get_texts()[0].get_text() for axes in found]
    assert labels == ["training", "training (running mean over about 10 steps)"]


def test_plot_of_several_runs_smooths_them_alike(workplace, monkeypatch):
    """A run that ended early lies on the one it was so far the same as."""
    found = drawn(monkeypatch)
    losses = [3 + 2 / s + (-1) ** s * 0.2 for s in range(1, 121)]
    run_of(workplace / "whole", losses)
    run_of(workplace / "ended", losses[:30])
    assert call(monkeypatch, "whole", "ended") == 0
    whole, ended = (list(line.get_ydata()) for line in found[0].lines[:2])
    assert ended == whole[:30]
    assert "training (running mean over about 1.5 steps)" in [t.get_text() for t in found[0].get_legend().get_texts()]


def test_plot_legend_says_how_many_tokens_were_scored(workplace, monkeypatch):
    """The whole set of one run is never taken for the prefix of another."""
    found = drawn(monkeypatch)
    run_of(workplace / "a", [3.0, 2.0], val_loss=2.5, val_tokens=9000)
    run_of(workplace / "b", [3.0, 2.0], val_loss=2.6, val_tokens=500)
    assert call(monkeypatch, "a", "b") == 0
    marker_of = {line.get_label(): line.get_marker() for line in found[0].lines}
    scored = {line.get_ydata()[0]: line.get_marker() for line in found[0].lines if len(line.get_ydata()) == 1}
    assert scored == {2.5: marker_of["validation (9,000 tokens)"], 2.6: marker_of["validation (500 tokens)"]}
    assert scored[2.5] != scored[2.6]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: runs"),
        (["runs/none"], "runs/none is not a run: it has no metrics.jsonl"),
        (["runs/one/metrics.jsonl"], "there is no run among what was given"),
        (["runs/diverged"], "runs/diverged has nothing to draw yet"),
        (["runs/one", "-o", "runs/one/metrics.jsonl"], "choose a name that ends in one of .pdf, .png, .svg"),
        (["runs/one", "-o", "nowhere/x.png"], "nowhere/x.png cannot be written: there is no folder nowhere"),
        (["runs/one", "--x", "hours"], "invalid choice: 'hours'"),
        (["runs/one", "--y"], "--y"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plot_with_invalid_arguments_is_refused_in_one_line(runs, monkeypatch, capsys, arguments, complaint):
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert complaint in err and err.count("\n") == 1 and err.startswith("error: ") and out == ""
    assert not (runs / "losses.png").exists()
