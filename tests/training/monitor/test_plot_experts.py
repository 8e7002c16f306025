"""The loads of experts as a picture, and what an evaluation leaves for it."""

import json

import pytest
import torch

from data.shards.token_files import TokenStream
from model.moe import LOAD
from tests.support import QUICK, call, small_model, some_tokens
from training.expert_loads import expert_loads
from training.metrics_file import read_metrics
from training.monitor import plot_experts


def rows_of(folder, rows) -> None:
    folder.mkdir()
    lines = (json.dumps({"step": step, "train_loss": 3.0} | row) + "\n" for step, row in enumerate(rows, 1))
    (folder / "metrics.jsonl").write_text("".join(lines))


def drawn(monkeypatch) -> list:
    found, save = [], plot_experts.save
    monkeypatch.setattr(plot_experts, "save", lambda figure, path: (found.append(figure), save(figure, path)))
    return found


@pytest.mark.filterwarnings("error")
def test_plot_shows_the_loads_of_each_step_and_those_of_the_last_evaluation(workplace, monkeypatch):
    found = drawn(monkeypatch)
    old = {"experts/layer_1/load_0": 2.0, "experts/layer_1/load_1": 0.0}
    new = {"experts/layer_1/load_0": 0.5, "experts/layer_1/load_1": 1.5}
    rows = [{"lowest_load": 0.0, "highest_load": 2.0} | old, {"lowest_load": 0.4, "highest_load": 1.6}, {}, new]
    rows_of(workplace / "_a", rows)
    plot_experts.plot_experts(workplace / "_a")
    assert (workplace / "_a/experts.png").read_bytes().startswith(b"\x89PNG\r\n")
    steps, loads, _ = found[0].axes
    assert steps.get_title() == "_a"
    assert [line.get_ydata().tolist() for line in steps.lines[:2]] == [[2.0, 1.6], [0.0, 0.4]]
    assert steps.get_ylim()[0] == 0 and steps.get_ylim()[1] > 2
    assert loads.images[0].get_array().tolist() == [[0.5, 1.5]]
    assert [tick.get_text() for tick in loads.get_yticklabels()] == ["1"]


def test_plot_without_an_evaluation_shows_steps_alone_and_without_experts_nothing(workplace, monkeypatch):
    found = drawn(monkeypatch)
    rows_of(workplace / "steps", [{"lowest_load": 0.5, "highest_load": 1.5}])
    rows_of(workplace / "dense", [{}])
    plot_experts.plot_experts(workplace / "steps")
    plot_experts.plot_experts(workplace / "dense")
    assert [len(figure.axes) for figure in found] == [1] and not (workplace / "dense/experts.png").exists()


def test_run_with_experts_leaves_their_loads_and_a_picture(workplace, monkeypatch):
    typed = [*QUICK, "mlp=moe", "mlp.n_dense_layers=1", "steps=4", "eval_every=2", "run_dir=run"]
    assert call("train", typed, monkeypatch) == 0
    rows = read_metrics(workplace / "run/metrics.jsonl")
    for row in rows:
        loads = plot_experts.loads_of(row)
        assert list(loads) == ([(1, expert) for expert in range(8)] if row["step"] % 2 == 0 else [])
        assert not loads or sum(loads.values()) == pytest.approx(8, rel=1e-5)
    assert torch.tensor([*plot_experts.loads_of(rows[-1]).values()]).unique().numel() > 1
    assert (workplace / "run/experts.png").is_file()


def test_picture_that_cannot_be_drawn_is_a_warning(workplace, monkeypatch, capsys):
    monkeypatch.setattr("training.monitor.monitor.plot_experts", lambda folder: 1 / 0)
    assert call("train", [*QUICK, "steps=2", "run_dir=run"], monkeypatch, drawn=True) == 0
    assert "run/experts.png cannot be drawn: division by zero" in capsys.readouterr().err
    assert (workplace / "run/loss.png").is_file()


def test_loads_are_those_of_all_first_windows_whatever_the_batch(monkeypatch):
    monkeypatch.setattr("training.expert_loads.TOKENS", 100)
    model = small_model("attention=gqa", "mlp=moe", "mlp.n_dense_layers=1")
    stream = TokenStream([some_tokens(1, 161)[0].numpy()])
    loads = expert_loads(model, stream, 16, 4)
    inputs = torch.stack([torch.from_numpy(stream.read(16 * i, 16)).long() for i in range(6)])
    expected = model(inputs, collect=frozenset({LOAD})).aux["layers.1.expert_load"]
    assert [*loads] == [f"experts/layer_1/load_{expert}" for expert in range(8)]
    torch.testing.assert_close(torch.tensor([*loads.values()]), expected / expected.mean())
    assert expert_loads(model, stream, 16, 100) == loads
