"""Text as it is streamed, against the plain definition: decode all of it, cut before the first stop string."""

import random

from data.tokenizers.byte import ByteTokenizer
from generation.text_stream import TextStream


class Pieces(ByteTokenizer):
    """Token i is the i-th piece of a byte string, cut anywhere: within characters, and within stop strings."""

    def __init__(self, content: bytes, draw: random.Random):
        cuts = sorted(draw.sample(range(len(content) + 1), draw.randint(0, len(content))))
        self.tokens = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


def ending(text: str, stops: list[str]) -> str:
    """The text before the first stop string to be complete; of two that end together, the longer."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_what_is_shown_is_the_text_before_the_first_stop_string():
    for seed in range(500):
        draw = random.Random(seed)
        text = "".join(draw.choices("aabé🙂\n", k=draw.randint(0, 30)))
        stops = ["".join(draw.choices("aabé🙂\n", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        tokenizer, shown = Pieces(text.encode(), draw), ""
        expected, stream = ending(text, stops), TextStream(tokenizer, stops)
        for token in range(len(tokenizer.tokens)):
            shown += stream.feed(token)
            assert expected.startswith(shown)  # nothing has to be taken back
            if stream.stopped:
                break
        assert shown + stream.close() == expected == stream.text
        assert stream.stopped == any(stop in text for stop in stops)


def test_what_begins_like_a_stop_string_is_held_back_until_it_is_not_one():
    stream = TextStream(ByteTokenizer(), ["END"])
    assert [stream.feed(byte) for byte in b"aENE"] == ["a", "", "", "EN"]
    assert stream.close() == "E" and not stream.stopped


def test_half_a_character_is_left_out_and_may_be_completed_by_another_stream():
    first = TextStream(ByteTokenizer())
    assert [first.feed(byte) for byte in "a🙂".encode()[:4]] == ["a", "", "", ""]
    assert first.close() == "" and first.text == "a"
    second = TextStream(ByteTokenizer(), half=first.half)
    assert [second.feed(byte) for byte in "🙂b".encode()[3:]] == ["🙂", "b"]
    assert second.half == b""


def test_bytes_that_are_no_character_show_as_such():
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.feed(byte) for byte in b"\xc3a") == "\ufffda"
