"""python -m docs.picture: a picture of a sweep over attentions, and of nothing else."""

import sys
from dataclasses import replace

import pytest

from ablation.pages.palette import look
from ablation.sweep.stored import read_sweep, write_sweep
from common.errors import UserError
from docs import picture
from tests.ablation import support
from tests.support import TINY

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """A folder with a tiny sweep over two attentions, and one over seeds of which nothing has run."""
    folder = tmp_path_factory.mktemp("picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        support.train_sweep([*TINY, "attention=mha,mla", "sweep=attentions"], patch)
    sweeps = folder / "sweeps"
    (sweeps / "seeds").mkdir()
    write_sweep(sweeps / "seeds", read_sweep(sweeps / "attentions").model_copy(update={"varying": ["seed"]}))
    return sweeps


def draw(folder, out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs.picture", str(folder), "--out", str(out)])
    picture.main()


def test_picture_of_a_sweep_over_attentions_is_drawn(sweeps, tmp_path, monkeypatch):
    draw(sweeps / "attentions", tmp_path / "a.png", monkeypatch)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("name", "words"), [("", "is no sweep; it holds sweeps"), ("seeds", "sweep over seed"), ("none", "is no sweep")]
)
def test_picture_of_anything_else_is_refused_in_one_line(sweeps, tmp_path, monkeypatch, capsys, name, words):
    with pytest.raises(SystemExit) as ended:
        draw(sweeps / name, tmp_path / "a.png", monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "a.png").exists()


def test_picture_of_a_sweep_without_an_attentions_runs_is_refused(sweeps, monkeypatch):
    drawn = picture.report_on
    monkeypatch.setattr(picture, "report_on", lambda *args, **named: without_last(drawn(*args, **named)))
    with pytest.raises(UserError, match="no finished run of attention=mla"):
        picture.report_on_attentions(sweeps / "attentions")


def without_last(report):
    return replace(report, variants=report.variants[:-1])


def test_picture_panels_show_every_attention_in_its_color():
    left, right = picture.figure(support.four()).axes
    variants = support.four().variants
    colors = [look(i).light for i in range(4)]
    assert [line.get_color() for line in left.lines] == colors and len(left.collections) == 4
    assert [text.get_text() for text in left.get_legend().get_texts()] == [variant.label for variant in variants]
    assert left.get_legend().get_title().get_text() == "mean of 3 seeds,\nband: lowest to highest"
    assert [bar.get_width() for bar in right.patches] == [variant.cache_bytes_per_token for variant in variants]
    assert [text.get_text() for text in right.texts] == ["4,096", "1,024", "512", "640"]


def test_picture_of_one_seed_has_no_band():
    left, _ = picture.figure(support.one_seed()).axes
    assert not left.collections and left.get_legend().get_title().get_text() == "one seed each"
