"""A conversation: its turns, what it remembers, and what the user may do to it."""

import signal
from collections.abc import Sequence

import pytest
import torch

from common.errors import UserError
from common.signals import DeferredInterrupt
from data.tokenizers.byte import ByteTokenizer
from generation import repl
from generation.decode import generate
from generation.repl import Conversation
from generation.sampler import Sampler
from generation.state import GenerationState
from tests.support import DISTINCT, mostly_slow, small_model

GREEDY = Sampler(temperature=0)
TOKENIZER = ByteTokenizer()


def conversation(model, *, slide=False, cached=True, **options) -> Conversation:
    def new_state(tokens):
        return GenerationState(model, [tokens], [0], slide=slide, cached=cached)

    options = {"max_new_tokens": 10, **options}
    return Conversation(model, TOKENIZER, GREEDY, new_state=new_state, **options)


def written(conversation: Conversation) -> list[int]:
    return conversation.state.tokens[0, : conversation.state.rows.lengths[0]].tolist()


def ignore(_: str) -> None:
    pass


def check_turns(case: tuple[str, ...], slide: bool, lines: Sequence[str]) -> None:
    model = small_model(*case, vocab_size=257)  # a context of 64
    talk = conversation(model, slide=slide)
    whole = []
    for line in lines:
        talk.append(line)
        talk.turn(ignore)
        whole += TOKENIZER.encode(line).tolist()
        uncached = GenerationState(model, [whole], [0], cached=False, slide=slide)
        new = [int(step) for step in generate(model, uncached, GREEDY, max_new_tokens=10, end_token=256)]
        whole += new
        in_context = written(talk)
        assert in_context == whole[len(whole) - len(in_context) :]
        assert slide or in_context == whole


@pytest.mark.parametrize("case", mostly_slow(DISTINCT, often=[("attention=mla", "attention.window=6")]))
def test_conversation_turns_of_a_sliding_text_equal_an_uncached_run_on_the_whole(case):
    check_turns(case, True, ("The qüery", " and the k🙂", "", "x" * 30, "y"))


@pytest.mark.parametrize("attention", ["gqa", "mla", "stack"])
def test_conversation_turns_equal_an_uncached_run_on_the_whole_text(attention):
    check_turns((f"attention={attention}",), False, ("The qüery", " and the k🙂", ""))


@pytest.fixture
def ctrl_c():
    """As in a terminal: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_conversation_turn_after_ctrl_c_continues_what_was_written(ctrl_c):
    model = small_model("attention=mla", vocab_size=257)
    pieces = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    talk, free = conversation(model), conversation(model)
    talk.append("The ")
    assert talk.turn(write) == "[stopped]"
    assert len(written(talk)) == 4 + 3
    assert signal.getsignal(signal.SIGINT) == before
    free.append("The ")
    free.turn(ignore)
    talk.max_new_tokens = 7
    talk.append("")
    talk.turn(ignore)
    assert written(talk) == written(free)


def test_deferred_interrupt_with_ctrl_c_ignored_leaves_it_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with DeferredInterrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.requested and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_conversation_turn_with_a_stop_string_hides_it_and_leaves_it_in_the_text():
    model = small_model("attention=gqa", vocab_size=257)
    free = conversation(model)
    free.append("The ")
    free.turn(ignore)
    new = TOKENIZER.decode(written(free)[4:])
    pieces = []
    talk = conversation(model, stops=[new[3:5]])
    talk.append("The ")
    assert talk.turn(pieces.append) == ""
    assert "".join(pieces).rstrip("\n") == new[: new.index(new[3:5])].rstrip("\n")
    assert written(talk) == written(free)[: len(written(talk))]


def test_conversation_turn_with_a_full_context_says_so_until_a_reset():
    model = small_model("attention=mha", vocab_size=257)  # a context of 64
    talk = conversation(model, max_new_tokens=100)
    with pytest.raises(UserError, match="64 tokens do not fit: 63 do; /reset starts again"):
        talk.append("x" * 64)
    talk.append("x" * 63)
    assert talk.turn(ignore) == "[the context of 64 tokens is full: /reset starts again]"
    with pytest.raises(UserError, match="the context of 64 tokens is full; /reset"):
        talk.append("")
    talk.reset()
    talk.append("x")
    talk.turn(ignore)
    assert written(talk)[0] == ord("x")


def test_conversation_set_seed_applies_to_the_next_turn_and_to_later_texts():
    model = small_model("attention=mla", vocab_size=257)
    talk = conversation(model)
    sampler = Sampler(temperature=1.0)
    talk.set_temperature(1.0)
    for seed, whole in ((0, [*b"The "]), (3, None), (3, None)):
        if whole is None:
            talk.set_seed(seed)
            whole = written(talk)
        talk.append("" if talk.state else "The ")
        talk.turn(ignore)
        alone = generate(model, GenerationState(model, [whole], [seed]), sampler, max_new_tokens=10, end_token=256)
        assert written(talk) == whole + [int(step) for step in alone]
    talk.reset()
    talk.append("The ")
    talk.turn(ignore)
    alone = generate(model, GenerationState(model, [[*b"The "]], [3]), sampler, max_new_tokens=10, end_token=256)
    assert written(talk) == [*b"The "] + [int(step) for step in alone]


@pytest.mark.parametrize(("line", "shown"), [("", "🙂b\n"), ("x", "\ufffdb\n")])
def test_conversation_with_an_incomplete_character_completes_it_unless_text_comes_between(monkeypatch, line, shown):
    script = list("a🙂b".encode())

    def recite(model, state, sampler, *, max_new_tokens, end_token):
        for _ in range(max_new_tokens):
            token = script.pop(0)
            state.append(0, [token])
            yield torch.tensor([[token]])

    monkeypatch.setattr(repl, "generate", recite)
    talk = conversation(small_model("attention=mha", vocab_size=257), max_new_tokens=4)
    pieces = []
    talk.append("The ")
    talk.turn(pieces.append)
    assert "".join(pieces) == "a\n"
    talk.max_new_tokens = 2
    talk.append(line)
    talk.turn(pieces.append)
    assert "".join(pieces) == "a\n" + shown
    assert bytes(written(talk)) == b"The a" + "🙂".encode()[:3] + line.encode() + "🙂".encode()[3:] + b"b"
