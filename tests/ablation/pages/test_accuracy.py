"""Accuracy in a report, where the data has right answers: tables, sentences and pictures; nothing of it elsewhere."""

from dataclasses import replace

import pytest

from ablation.pages.columns import accuracy
from ablation.pages.html import page
from ablation.pages.markdown import markdown
from ablation.pages.pictures import CAPTIONS, accuracy_figure, figures
from ablation.pages.terminal import terminal
from ablation.pages.words import accuracy_frontier
from tests.ablation import support

WRITERS = {"terminal": terminal, "markdown": lambda report: markdown(report, {}), "page": page}


def test_accuracy_columns_say_which_variant_is_right_more_often():
    found = {column.name: [value.text for value in column.values] for column in accuracy(support.with_accuracy())}
    assert found["accuracy"][:2] == ["0.982 ± 0.001", "0.972 ± 0.001"]
    assert found["95 % interval"][0] == "0.981 to 0.983"
    assert found["difference"] == ["", "−0.010", "−0.230", "−0.080"]
    assert found["its 95 % interval"][2] == "−0.243 to −0.217"
    assert found["verdict"] == ["baseline", "not distinguishable, p = 0.40", "worse, p < 0.001", "worse, p = 0.010"]
    better = support.with_accuracy()
    risen = replace(better.accuracy.differences["attention=mqa"], mean=0.23)
    better = replace(better, accuracy=replace(better.accuracy, differences={"attention=mqa": risen}))
    assert accuracy(better)[-2].values[2].text == "better, p < 0.001"


def test_accuracy_in_sentences_names_those_that_differ():
    sentences = [sentence for sentence in support.with_accuracy().summary if "right" in sentence]
    assert sentences == [
        "Accuracy, the share of right answers: attention=mha 0.982, attention=gqa 0.972, attention=mqa 0.752, "
        "attention=mla 0.902.",
        "attention=mqa is right less often than attention=mha: difference −0.230 (95 % interval −0.243 to −0.217, "
        "p < 0.001).",
        "attention=mla is right less often than attention=mha: difference −0.080 (95 % interval −0.093 to −0.067, "
        "p = 0.010).",
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_report_without_answers_has_no_word_of_accuracy(name):
    write = WRITERS[name]
    with_it, without = write(support.with_accuracy()), write(support.four())
    assert "accuracy" in with_it.lower() and "accuracy" not in without.lower()
    assert "0.982" in with_it and "0.752" in with_it
    some = support.with_accuracy()
    some = replace(some, variants=[replace(some.variants[0], val_accuracy=None), *some.variants[1:]], accuracy=None)
    assert "accuracy" not in write(replace(some, cells=[], summary=[])).lower()  # of unlike data: not side by side


def test_accuracy_is_drawn_against_the_cache():
    report = support.with_accuracy()
    found = figures(report)
    assert set(found) == CAPTIONS.keys() and "accuracy.png" not in figures(support.four())
    axes = found["accuracy.png"].axes[0]
    marks = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks == [(one.cache_bytes_per_token, one.val_accuracy.mean) for one in report.variants]
    bars = [[*line.get_ydata()] for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars == [[*one.val_accuracy.interval] for one in report.variants]
    assert axes.get_ylabel() == "accuracy" and "accuracy; higher is better" in page(report)


def test_accuracy_frontier_is_of_the_variants_that_none_of_a_smaller_cache_beats():
    names = [variant.label for variant in accuracy_frontier(support.with_accuracy())]
    assert names == ["mqa", "mla", "gqa", "mha"]  # 512, 640, 1024 and 4096 bytes per token
    one = support.with_accuracy().variants[:1]
    assert accuracy_figure(replace(support.with_accuracy(), variants=one)).axes
