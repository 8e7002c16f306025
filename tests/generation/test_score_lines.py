"""Tokens as lines: what is seen of them, and where."""

import json

import pytest

from data.tokenizers.byte import ByteTokenizer
from generation.score_lines import TokenLines, percent, shown
from generation.scoring import TokenScore


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b" key", '" key"'),
        ("é漢🙂".encode(), '"é漢🙂"'),
        (b"\n\t\r\x1b\0\x7f", r'"\n\t\r\x1b\x00\x7f"'),
        (b"\xc3", r'"\xc3"'),
        (b"a\x9f\x99", r'"a\x9f\x99"'),
        (b'\\n"', r'"\\n\""'),
        ("\xa0\u202e\u200b\U000e0001".encode(), r'"\u00a0\u202e\u200b\U000e0001"'),  # no bytes, as \xa0 would be
        (b"", "end of text"),
    ],
)
def test_shown_token_is_one_line_in_quotes(content, expected):
    assert shown(content) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1234567, "12.35%"), (1.0, "100.00%"), (5e-5, "<0.01%"), (0.0, "0.00%"), (None, "-")]
)
def test_percent_of_a_share_shows_two_decimals(share, expected):
    assert percent(share) == expected


SCORES = [
    TokenScore(ord("a")),
    TokenScore(0xC3, 2.0, 3, ((ord("\n"), 0.5), (256, 0.25))),
    TokenScore(0xA9, float("nan")),
]


def test_score_table_of_tokens_has_a_line_each_below_one_header():
    lines = TokenLines(ByteTokenizer())
    header, *rows = [*lines.table(SCORES[:1]), *lines.table(SCORES[1:])]
    assert header.split() == ["number", "nats", "probability", "rank", "token", "likeliest", "others"]
    assert rows[0].split() == ["1", "-", "-", "-", '"a"']
    assert rows[1].split() == [
        "2",
        "2.0000",
        "13.53%",
        "3",
        r'"\xc3"',
        r'"\n"',
        "50.00%",
        "end",
        "of",
        "text",
        "25.00%",
    ]
    assert rows[2].split() == ["3", "nan", "-", "-", r'"\xa9"']
    assert {row.index('"') for row in rows} == {header.index("token")}
    assert rows[1].index(r'"\n"') == header.index("likeliest")


def test_score_json_of_tokens_is_numbers_and_exact_bytes():
    first, second, third = TokenLines(ByteTokenizer()).json(SCORES)
    assert (first["number"], first["text"], first["nats"], first["rank"], first["others"]) == (1, "a", None, None, [])
    assert (second["token"], second["hex"], second["nats"], second["rank"]) == (0xC3, "c3", 2.0, 3)
    assert second["others"][0] == {"token": 10, "text": "\n", "hex": "0a", "probability": 0.5}
    assert third["nats"] is third["probability"] is None
    json.dumps([first, second, third], allow_nan=False)
