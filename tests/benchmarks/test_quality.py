"""The comparison of recipes over time, on a text of a few lines and a stand-in for nanoGPT."""

import json
import re
import sys

import pytest

from benchmarks import quality, recipe, startup, train
from common.errors import UserError
from tests.benchmarks.stand_in import STAND_IN


@pytest.fixture
def place(workplace, monkeypatch):
    (workplace / "model.py").write_text(STAND_IN)
    (workplace / "a.txt").write_text("To be, or not to be, that is the question:\n" * 60)
    tiny = train.Size(1, 2, 16, tokens=16, batch=2, vocab=0, steps=1)
    monkeypatch.setitem(train.SIZES, "i", tiny)
    return workplace


def call(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", "--text", "a.txt", *options])
    quality.main()


def test_quality_compares_recipes_over_time(place, monkeypatch, capsys):
    options = "--nanogpt . --size i --seconds 0.2 --marks 0.1 --seeds 0 1 --val-tokens 64 --untuned"
    options = [*options.split(), "--precision", "fp32", "--target", "9", "--json", "q.json", "--picture", "q.svg"]
    call(monkeypatch, *options, "--ours", "", "experiment=fast optim.muon_lr=0.01")
    out = capsys.readouterr().out
    rows = json.loads((place / "q.json").read_text())["rows"]
    names = ["ours", "ours experiment=fast optim.muon_lr=0.01", "nanoGPT"]
    assert sorted({row["recipe"] for row in rows}) == sorted(names)
    for name in names:
        last = [row for row in rows if row["recipe"] == name][-1]
        assert last["due"] == 0.2 and last["seeds"] == 2 and 0 < last["loss"] < 9
        assert re.fullmatch(r"\d+ \d+", last["s to 9.0"])
        assert name in (place / "q.svg").read_text()
    assert "made" not in out


def test_quality_marks_are_scored_when_they_have_passed():
    now, trained = [0.0], []

    def step(number: int) -> None:
        trained.append(number)
        now[0] += 1.0

    def score() -> float:
        now[0] += 100.0  # which the clock must not count
        return 10.0 - len(trained)

    found = list(quality._trained(quality.Candidate(step, score), 5, 4.5, [1.5, 3, 4.5, 60], lambda: now[0]))
    assert found == [(1.5, 2.0, 2, 8.0), (3, 3.0, 3, 7.0), (4.5, 5.0, 5, 5.0)]
    curve = quality.Curve(found, None)
    assert quality._reached(curve, 7.5) == "3" and quality._reached(curve, 1.0) == "never"


def test_quality_text_is_cut_in_nine_to_one_and_comes_back(place):
    text = quality.read(place / "a.txt")
    whole = (place / "a.txt").read_text()
    assert text.vocab == len(set(whole)) and len(text.train) == int(0.9 * len(whole))
    names = sorted(set(whole))
    assert "".join(names[i] for part in text[:2] for i in part.read(0, len(part))) == whole


def test_nanogpt_lr_at_its_corners_is_nanogpts():
    rates = [quality.nanogpt_lr(step, 1e-3, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3 / 11) and max(rates) == rates[10] == 1e-3
    assert rates[55] == pytest.approx(0.55e-3) and rates[100] == pytest.approx(1e-4)


REFUSED = {
    "no text": (["--text", "none.txt"], "--text none.txt cannot be read: No such file"),
    "a binary one": (["--text", "binary"], "--text binary is not UTF-8 text: byte 2"),
    "a short one": (["--text", "short.txt"], "the validation split holds 2 tokens, one window of"),
    "short for a recipe": (["--ours", "model.context_length=1024 batch_tokens=1024"], "the validation split holds 258"),
    "no window to score": (["--val-tokens", "15"], "--val-tokens 15 holds no window of 16 tokens: give at least 16"),
    "a seed twice": (["--seeds", "0", "1", "0"], "--seeds: 0 is there twice: leave one of them out"),
    "a recipe twice": (["--ours", "mlp=gelu", " mlp=gelu"], "--ours: 'mlp=gelu' is there twice"),
    "a negative seed": (["--seeds", "-1"], "--seeds: '-1' is not a whole number of at least 0"),
    "no time": (["--seconds", "0"], "--seconds: '0' is not a number of at least 0.01"),
    "a mark before all": (["--marks", "-3"], "--marks: '-3' is not a number of at least 0.01"),
}


@pytest.mark.parametrize(("options", "complaint"), REFUSED.values(), ids=REFUSED)
def test_quality_bad_arguments_exit_with_one_line_before_anything_runs(place, monkeypatch, capsys, options, complaint):
    monkeypatch.setattr(quality, "measured", lambda *_: pytest.fail("it ran"))
    (place / "binary").write_bytes(b"ab\xff")
    (place / "short.txt").write_text("To be, or not to be.")
    with pytest.raises(SystemExit):
        call(monkeypatch, "--size", "i", *options)
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_startup_with_a_run_dir_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["startup", "model=mini", "run_dir=mine"])
    monkeypatch.setattr(startup, "in_turns", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match="run_dir=mine: what is timed are runs of their own"):
        startup.main()


def test_recipe_rows_are_printed_as_readable_lines(monkeypatch, capsys):
    options = "--size experiment=smoke --base optim=adamw --steps 2 --seeds 0 1 --val-tokens 64 --rows"
    monkeypatch.setattr(sys, "argv", ["recipe", *options.split(), "", "optim.lr=0.01"])
    monkeypatch.setattr(recipe, "keep_buffers", lambda: None)
    monkeypatch.setattr(recipe, "prepare", lambda *_: None)
    monkeypatch.setattr(recipe, "_trained", lambda run, *_: (3.0 + run.seed + (run.optim.lr == 0.01), 0.001))
    recipe.main()
    out = capsys.readouterr().out
    assert "(the recipe): 3.5000 nats, +0.0000 than the first (by seed 3.0000 4.0000), 1.0 ms of CPU time" in out
    assert "optim.lr=0.01: 4.5000 nats, +1.0000 than the first (by seed 4.0000 5.0000)" in out and "{" not in out


def test_quality_picture_that_cannot_be_written_is_refused_before_anything_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(quality, "measured", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        call(monkeypatch, "--picture", "q.jpg")
    assert capsys.readouterr().err.startswith("error: --picture q.jpg: choose a name")
