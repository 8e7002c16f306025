"""report.html: one file, well formed, with every number, and with names as they are."""

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ablation.pages.formats import degrees
from ablation.pages.html import page
from ablation.pages.palette import COLORS
from ablation.pages.tags import VOID, as_script, tag
from common.errors import escaped
from tests.ablation import support


class Tree(HTMLParser):
    """Elements, their attributes and text; fails where an end does not fit its start."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], Counter(), [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags[name] += 1
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)

    def words(self) -> str:
        return "".join(self.text)


@pytest.fixture(scope="module")
def pages():
    return {name: page(make()) for name, make in support.ALL.items()}


@pytest.mark.parametrize("name", support.ALL)
def test_page_is_well_formed_and_needs_no_network(pages, name):
    tree = Tree(pages[name])
    links = [value for key, value in tree.attributes if key in ("src", "href", "action", "data", "poster")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttp", pages[name])
    ids = [value for key, value in tree.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    pages[name].encode("utf-8")


@pytest.mark.parametrize("name", ["four", "broken", "welch", "two_runs", "unlike"])
def test_page_has_every_number_of_the_report_in_all_digits(pages, name):
    report, text = support.ALL[name](), pages[name]
    for variant in report.variants:
        whole = (variant.parameters, variant.parameters_without_embedding, variant.cache_bytes_full)
        assert all(f">{number}<" in text for number in whole) and f">{variant.cache_bytes_per_token:,}<" in text
        for found in (variant.val_bpb, variant.val_loss, variant.tokens_per_second, variant.minutes):
            assert not found.values or (repr(found.mean) in text and (found.sd is None or repr(found.sd) in text))
        for bound in variant.val_bpb.interval or ():
            assert repr(bound) in text
    for cell in report.cells:
        assert cell.name in text and (cell.val_bpb is None or repr(cell.val_bpb) in text)
    for found in report.comparison.differences.values() if report.comparison else ():
        for number in (found.mean, *found.interval, found.p, found.p_corrected, found.detectable, found.sd):
            assert repr(number) in text
        assert f">{degrees(found.df)}<" in text


def test_page_says_what_the_report_says(pages):
    words = " ".join(Tree(pages["broken"]).words().split())
    report = support.broken()
    for sentence in [*report.summary, *report.notes, report.command]:
        assert " ".join(sentence.split()) in words
    assert "diverged at step 120" in words and "3095c60" in words and "12 of 16 runs finished" in words


def test_page_of_names_like_markup_shows_them_as_text(pages):
    tree = Tree(pages["weird"])
    assert tree.tags["script"] == 2 and tree.tags["b"] == 0  # the data and ours: none of a name
    words = tree.words()
    for name in [*support.NAMES, "<script>alert(1)</script> $x$"]:
        assert escaped(name) in words
    assert "\x1b" not in pages["weird"] and "\udcff" not in pages["weird"]


def test_page_shows_rounded_numbers_until_all_digits_are_asked_for(pages):
    found = support.four().comparison.differences["attention=gqa"]
    assert pages["four"].count(f'<span class="short">−0.0200</span><span class="exact">{found.mean!r}</span>') == 2
    switched = [section for section in pages["four"].split("<section") if 'class="exact"' in section]
    assert len(switched) == 4 and all(section.count('class="digits"') == 1 for section in switched)
    assert "Pooled sd of one run: 0.0066, with 6 degrees of freedom." in pages["four"]


def test_page_names_an_altered_run_with_its_detail_in_the_color_of_failures(pages):
    assert '<span class="state altered">altered</span>' in pages["broken"] and support.ALTERED in pages["broken"]
    colored = re.search(r"\n(.*) \{ color: var\(--bad\); \}", pages["broken"])[1].split(", ")
    assert {".failed", ".diverged", ".damaged", ".altered"} == set(colored)


def test_page_of_unlike_tokenizers_has_bands_and_no_losses_of_tokens(pages):
    assert "Lines are means over seeds" in pages["unlike"] and "One seed" not in pages["unlike"]
    words = Tree(pages["unlike"]).words()
    assert "nan" not in re.findall("[a-z]+", words) and "val loss (nats)" not in words
    found = json.loads(re.search(r'id="curve-data">(.*?)</script>', page(support.unlike(), y="loss"))[1])
    assert found["choice"]["y"] == "bpb" and list(found["y"]["val"]) == ["bpb"]


def test_page_draws_every_variant_and_seed(pages):
    classes = Counter(value.split()[0] for key, value in Tree(pages["four"]).attributes if key == "class" and value)
    lines = re.search(r'<svg[^>]*class="lines">.*?</svg>', pages["four"])[0]
    assert (lines.count('class="seed '), lines.count('class="band '), lines.count('class="stroke ')) == (12, 4, 4)
    assert classes["dots"] == 4 + 1 + 3 + 1  # rows of losses and of differences, each with a scale
    assert classes["dot"] == 12


def test_page_of_one_seed_has_no_bands_or_intervals(pages):
    assert 'class="band ' not in pages["one_seed"] and 'class="span ' not in pages["one_seed"]


def test_page_first_shows_the_curves_that_were_asked_for():
    data = re.compile(r'id="curve-data">(.*?)</script>')
    found = json.loads(data.search(page(support.four(), "flops", "loss", True))[1])
    assert found["choice"] == {"source": "val", "x": "flops", "y": "loss", "xscale": "log", "yscale": "log"}
    assert [each["name"] for each in found["series"]] == [variant.name for variant in support.four().variants]


def test_page_of_runs_whose_bytes_are_unknown_shows_nats():
    made = support.two_runs()
    empty = {"val_bpb": [None] * 12, "train_bpb": [None] * 200}
    variants = [
        replace(each, curves=[replace(one, **{key: value[: len(getattr(one, key))] for key, value in empty.items()})
                              for one in each.curves])
        for each in made.variants
    ]  # fmt: skip
    found = json.loads(re.search(r'id="curve-data">(.*?)</script>', page(replace(made, variants=variants)))[1])
    assert found["choice"]["y"] == "loss" and list(found["y"]["val"]) == ["loss"]


def test_page_of_runs_without_evaluations_or_rows_still_opens():
    made = support.two_runs()
    nothing = {name: [] for name in vars(made.variants[0].curves[0]) if name not in ("seed", "run")}
    for curves in ([], [replace(made.variants[0].curves[0], **nothing)]):
        text = page(replace(made, variants=[replace(each, curves=curves) for each in made.variants]))
        Tree(text)
        assert 'id="curve-data"' not in text and made.variants[0].name in text
    Tree(page(replace(made, variants=[], cells=[])))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_page_colors_can_be_read_on_both_themes(pages):
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", pages["four"]))
    theme = {name: pair.split(", ") for name, pair in pairs.items()}
    for i in (0, 1):
        for ink in ("ink", "soft", "accent", "bad"):
            for ground in ("page", "raised"):
                assert contrast(theme[ink][i], theme[ground][i]) >= 4.5, (ink, ground, i)
        assert all(contrast(color[i], theme["page"][i]) >= 3 for color in COLORS)
    assert len({color for color, _ in COLORS}) > 10


def test_tag_escapes_text_and_attributes():
    assert tag("p", "<b>&", tag("i", '"'), title='a"b\nc') == ('<p title="a&quot;b\nc">&lt;b&gt;&amp;<i>&quot;</i></p>')
    assert "</script>" not in as_script(["</script>", "a & b"])
    assert json.loads(as_script(["</script>", "a & b"])) == ["</script>", "a & b"]
