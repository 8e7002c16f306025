"""The loss curve of a run as a picture."""

import json

import pytest

from training.monitor import plot

PNG = b"\x89PNG\r\n"


def drawn(monkeypatch) -> list:
    """The axes of the pictures that are saved from here on."""
    found, save = [], plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (found.append(figure.axes[0]), save(figure, path)))
    return found


def run_of(folder, losses, **last) -> None:
    rows = [{"step": s, "tokens": s, "train_loss": loss} for s, loss in enumerate(losses, 1)]
    rows[-1] |= last
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.filterwarnings("error")
def test_plot_of_a_run_with_any_name_is_titled_with_it(workplace, monkeypatch, capsys):
    names, found = ["_a", "$x_$", "$\\oops$", "a\x1b[31m\n", "漢", "b\udcff"], drawn(monkeypatch)
    for name in names:
        run_of(workplace / name, [3.0, 2.0])
        plot.plot_loss(workplace / name)
        assert (workplace / name / "loss.png").read_bytes().startswith(PNG)
    shown = ["_a", "$x_$", "$\\oops$", "a\\x1b[31m\\n", "漢", "b\\udcff"]
    assert [axes.get_title() for axes in found] == shown
    assert capsys.readouterr().err == ""


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


def test_plot_legend_says_how_many_tokens_were_scored(workplace, monkeypatch):
    """The whole set is never taken for the prefix of it that was scored before."""
    found = drawn(monkeypatch)
    run_of(workplace / "a", [3.0, 2.0], val_loss=2.5, val_tokens=9000)
    with (workplace / "a" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "tokens": 3, "train_loss": 1.9, "val_loss": 2.4, "val_tokens": 500}) + "\n")
    plot.plot_loss(workplace / "a")
    texts = [text.get_text() for text in found[0].get_legend().get_texts()]
    assert texts == ["training", "validation (500 tokens)", "validation (9,000 tokens)"]
    prefix, whole = found[0].lines[2:]
    assert (prefix.get_ydata(), whole.get_ydata()) == ([2.4], [2.5]) and prefix.get_marker() != whole.get_marker()


def test_plot_of_a_run_without_losses_is_empty(workplace, monkeypatch):
    found = drawn(monkeypatch)
    run_of(workplace / "diverged", [None])
    plot.plot_loss(workplace / "diverged")
    assert found[0].get_legend() is None and not found[0].lines
