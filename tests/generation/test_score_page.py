"""The page of a text: what a browser reads from it."""

from html.parser import HTMLParser

import pytest

from common.errors import UserError
from data.tokenizers.byte import ByteTokenizer
from generation.score_page import COLORS, ScorePage
from generation.scoring import TokenScore

TEXT = 'a<script>alert("&amp;")</script>\n\n  \t</main>é漢🙂\n'


class Reader(HTMLParser):
    """The elements of a page, and of its text (within <main>) the pieces with their class and title."""

    def __init__(self, page: str):
        super().__init__()
        self.tags = []
        self.pieces = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside |= tag == "main"
        if self.inside and tag == "span":
            self.pieces.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.inside &= tag != "main"

    def handle_data(self, data):
        if self.inside:
            self.pieces[-1][1] += data


def page_of(tmp_path, text: str, nats=lambda i: 0.1 * i, name: str = "a.txt") -> Reader:
    page = ScorePage(ByteTokenizer())
    first, *rest = text.encode()
    page.add([TokenScore(first)])
    others = ((ord("<"), 0.5), (ord('"'), 0.25))
    page.add([TokenScore(byte, nats(i), 2, others) for i, byte in enumerate(rest)])
    page.write(tmp_path / "a.html", name, "a summary")
    return Reader((tmp_path / "a.html").read_text())


def test_score_page_shows_the_text_as_it_is_and_takes_none_of_it_for_markup(tmp_path):
    page = page_of(tmp_path, TEXT, name="<b>$x\x1b")
    assert "".join(text for _, text in page.pieces) == TEXT
    assert not {"script", "b"} & set(page.tags) and page.tags.count("main") == 1
    assert "http" not in (tmp_path / "a.html").read_text().replace("http-equiv", "")  # all is in the file


def test_score_page_shows_a_characters_bytes_as_one_piece_with_the_numbers_of_each(tmp_path):
    page = page_of(tmp_path, "xé", nats=lambda i: (1.0, 3.0)[i])
    assert [text for _, text in page.pieces] == ["x", "é"]
    given, character = (attributes for attributes, _ in page.pieces)
    assert given == {"class": "given", "title": '"x": given, not predicted'}
    assert character["class"] == "c4"  # of 2 nats, the mean
    assert character["title"].splitlines() == [
        r'"\xc3": 1.0000 nats, probability 36.79%, rank 2 of 257',
        r'others: "<" 50.00%  "\"" 25.00%',
        r'"\xa9": 3.0000 nats, probability 4.98%, rank 2 of 257',
        r'others: "<" 50.00%  "\"" 25.00%',
    ]


def test_score_page_colors_go_by_nats_and_get_darker(tmp_path):
    found = [0.0, 0.49, 0.5, 4.0, 7.9, 8.0, 50.0]
    page = page_of(tmp_path, "x" * 8, nats=lambda i: found[i])
    assert [attributes["class"] for attributes, _ in page.pieces[1:]] == ["c0", "c0", "c1", "c8", "c15", "c16", "c16"]
    light = [
        sum(w * int(color[i : i + 2], 16) ** 2.2 for i, w in ((1, 0.21), (3, 0.72), (5, 0.07))) for color in COLORS
    ]
    assert light == sorted(light, reverse=True) and COLORS[0] == "#ffffff"


def test_score_page_shows_control_characters_as_escapes(tmp_path):
    page = page_of(tmp_path, "a\x1b\r\u202eb\n")
    assert "".join(text for _, text in page.pieces) == r"a\x1b\r\u202eb" + "\n"
    assert page.pieces[-1][0]["class"].endswith(" ends")


def test_score_page_on_a_full_disk_is_one_line_and_leaves_the_old_one(tmp_path, monkeypatch):
    page_of(tmp_path, "ab")
    before = (tmp_path / "a.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.atomic_io.os.replace", full)
    with pytest.raises(UserError, match=r"a.html cannot be written: No space left on device"):
        page_of(tmp_path, "abc")
    assert (tmp_path / "a.html").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
