"""The search for stop strings against its definition: at each character, is a stop string complete?"""

import random

import pytest

from generation.stop_strings import find_stop_string, split_partial_stop


def before_stop(text: str, stops: list[str]) -> str:
    """The text before the first stop string to be complete; of two that end together, the longer."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize(
    ("text", "stops", "start"),
    [
        ("no more", [], None),
        ("no more", ["END"], None),
        ("the END of the END", ["END"], 4),
        ("abcd", ["bcd", "cd"], 1),  # they end together: the longest
        ("abcd", ["bcd", "c"], 2),  # the one that is complete first
        ("END", ["END"], 0),
    ],
)
def test_find_stop_string_of_several_takes_the_first_to_be_complete(text, stops, start):
    assert find_stop_string(text, stops) == start


def test_find_stop_string_of_random_texts_equals_the_definition():
    for seed in range(500):
        draw = random.Random(seed)
        text = "".join(draw.choices("aabé\n", k=draw.randint(0, 20)))
        stops = ["".join(draw.choices("aabé\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        start = find_stop_string(text, stops)
        assert text[:start] == before_stop(text, stops)
        assert (start is None) == (not any(stop in text for stop in stops))


@pytest.mark.parametrize(
    ("text", "stops", "parts"),
    [
        ("abc", [], ("abc", "")),
        ("", ["END"], ("", "")),
        ("the EN", ["END"], ("the ", "EN")),
        ("aaa", ["aab"], ("a", "aa")),
        ("xab", ["bc", "abd"], ("x", "ab")),  # the longest of them
    ],
)
def test_split_partial_stop_at_the_end_takes_the_longest_beginning_of_one(text, stops, parts):
    assert split_partial_stop(text, stops) == parts
