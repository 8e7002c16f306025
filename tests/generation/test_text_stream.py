"""Text as it is streamed, against the definition: decode all of it, cut before the first stop string."""

import random

from data.tokenizers.byte import ByteTokenizer
from generation.text_stream import TextStream
from tests.generation.test_stop_strings import before_stop


class Pieces(ByteTokenizer):
    """Token i is the i-th piece of a byte string, cut anywhere: within characters, and within stop strings."""

    def __init__(self, content: bytes, draw: random.Random):
        cuts = sorted(draw.sample(range(len(content) + 1), draw.randint(0, len(content))))
        self.tokens = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


def test_text_stream_with_stop_strings_shows_the_text_before_the_first():
    for seed in range(500):
        draw = random.Random(seed)
        text = "".join(draw.choices("aabé🙂\n", k=draw.randint(0, 30)))
        stops = ["".join(draw.choices("aabé🙂\n", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        tokenizer = Pieces(text.encode(), draw)
        stream = TextStream(tokenizer, stops)
        expected = before_stop(text, stops)
        shown = ""
        for token in range(len(tokenizer.tokens)):
            shown += stream.feed(token)
            assert expected.startswith(shown)  # nothing has to be taken back
            if stream.stopped:
                break
        assert shown + stream.close() == expected == stream.text
        assert stream.stopped == any(stop in text for stop in stops)


def test_text_stream_with_a_partial_stop_string_waits_until_it_is_none():
    stream = TextStream(ByteTokenizer(), ["END"])
    assert [stream.feed(byte) for byte in b"aENE"] == ["a", "", "", "EN"]
    assert stream.close() == "E" and not stream.stopped


def test_text_stream_with_an_incomplete_character_lets_another_complete_it():
    first = TextStream(ByteTokenizer())
    assert [first.feed(byte) for byte in "a🙂".encode()[:4]] == ["a", "", "", ""]
    assert first.close() == "" and first.text == "a"
    second = TextStream(ByteTokenizer(), incomplete_bytes=first.incomplete_bytes)
    assert [second.feed(byte) for byte in "🙂b".encode()[3:]] == ["🙂", "b"]
    assert second.incomplete_bytes == b""


def test_text_stream_with_invalid_bytes_shows_replacement_characters():
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.feed(byte) for byte in b"\xc3a") == "\ufffda"
