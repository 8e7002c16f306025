"""The comparison of recipes over time, on a text of a few lines and a stand-in for nanoGPT."""

import json
import re
import sys

import pytest

from benchmarks import quality, train
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


def test_recipes_are_compared_over_time(place, monkeypatch, capsys):
    options = "--nanogpt . --size i --seconds 0.4 --marks 0.1 --seeds 0 1 --val-tokens 64 --untuned"
    options = [*options.split(), "--precision", "fp32", "--target", "9", "--json", "q.json", "--picture", "q.svg"]
    call(monkeypatch, *options, "--ours", "", "experiment=fast optim.muon_lr=0.01")
    out = capsys.readouterr().out
    rows = json.loads((place / "q.json").read_text())["rows"]
    names = ["ours", "ours experiment=fast optim.muon_lr=0.01", "nanoGPT"]
    assert sorted({row["recipe"] for row in rows}) == sorted(names)
    for name in names:
        last = [row for row in rows if row["recipe"] == name][-1]
        assert last["due"] == 0.4 and last["seeds"] == 2 and 0 < last["loss"] < 9
        assert re.fullmatch(r"\d+ \d+", last["s to 9.0"])
        assert name in (place / "q.svg").read_text()
    assert "made" not in out


def test_a_run_ends_with_its_steps_and_marks_are_scored_when_they_have_passed():
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


def test_the_text_is_cut_in_nine_to_one_and_comes_back(place):
    text = quality.read(place / "a.txt")
    whole = (place / "a.txt").read_text()
    assert text.vocab == len(set(whole)) and len(text.train) == int(0.9 * len(whole))
    names = sorted(set(whole))
    assert "".join(names[i] for part in text[:2] for i in part.read(0, len(part))) == whole


def test_the_schedule_is_nanogpts():
    rates = [quality.nanogpt_lr(step, 1e-3, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3 / 11) and max(rates) == rates[10] == 1e-3
    assert rates[55] == pytest.approx(0.55e-3) and rates[100] == pytest.approx(1e-4)


def test_a_picture_that_cannot_be_written_is_refused_before_anything_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(quality, "measured", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        call(monkeypatch, "--picture", "q.jpg")
    assert capsys.readouterr().err.startswith("error: --picture q.jpg: choose a name")
