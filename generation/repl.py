"""Sampling turn by turn: what is typed is appended to the text, and the model continues it."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from common.cli import number
from common.console import deferred_logging
from common.errors import NotFinite, UserError, reason
from common.signals import Interruptible
from common.streams import StdoutLost, print_stderr, show
from data.tokenizers.base import Tokenizer
from generation.decode import generate
from generation.options import LAST_SEED
from generation.sampler import Sampler
from generation.state import GenerationState
from generation.text_stream import TextStream
from model.transformer import TransformerLM

HELP = """\
What you type is appended to the text as it stands, and the model continues it.
An empty line appends nothing: the model just goes on.
A line that begins with // stands for one that begins with /.
  /help           this
  /reset          forget the text, begin anew
  /seed N         the next turn draws as from --seed N
  /temperature T  of the turns from now on; 0 takes the likeliest token
  /quit           leaves, as Ctrl-D does
  Ctrl-C          stops the model; what it wrote stays in the text
A stop string ends a turn and is not shown, but stays in the text."""
QUIT = "/quit"
SEED, TEMPERATURE = number(int, 0, LAST_SEED), number(float, 0)  # as the command line takes them


class Conversation:
    """One text that the user and the model write in turns. Its caches live from turn to turn, so a turn computes only
    what is new."""

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        begin: Callable[[Sequence[int]], GenerationState],  # a text of these tokens, with nothing remembered yet
        max_new_tokens: int,
        stops: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.begin, self.max_new_tokens, self.stops = begin, max_new_tokens, stops
        self.seed: int | None = None  # where it is not that of `begin`
        self.reset()

    def reset(self) -> None:
        self.texts: GenerationState | None = None
        self.half = b""  # of a character that the last turn left incomplete, for the next one to go on with

    def draw_from(self, seed: int) -> None:
        """What is drawn from now on is drawn as in a text that begins here with this seed, and in those to come."""
        self.seed = seed
        if self.texts is not None:
            self.texts.draw_from(0, seed)

    def set_temperature(self, temperature: float) -> None:
        self.sampler = self.sampler.model_copy(update={"temperature": temperature})

    def append(self, line: str) -> None:
        """Raises UserError, and changes nothing, where the line leaves no room in the context."""
        tokens = self.tokenizer.encode(line).tolist()
        try:
            if self.texts is None:
                self.texts = self.begin(tokens or [self.tokenizer.end_of_text])
                if self.seed is not None:
                    self.texts.draw_from(0, self.seed)
            else:
                self.texts.append(0, tokens)
        except ValueError:
            limit = self.model.config.context_length
            free = limit - 1 - (0 if self.texts is None else int(self.texts.lengths[0]))
            full = (
                f"the context of {limit} tokens is full" if free <= 0 else f"{len(tokens)} tokens do not fit: {free} do"
            )
            raise UserError(f"{full}; /reset begins anew, --context slide would drop the oldest half") from None
        if line:
            self.half = b""  # it will never be whole

    def turn(self, write: Callable[[str], None]) -> str:
        """Continues the text, handing out what is certain of it -> a word for the user on why it ended, or none."""
        texts, stream, token = self.texts, TextStream(self.tokenizer, self.stops, self.half), None
        end, broken = self.tokenizer.end_of_text, ""
        with Interruptible() as interruption:
            try:
                for step in generate(
                    self.model, texts, self.sampler, max_new_tokens=self.max_new_tokens, end_token=end
                ):
                    token = int(step[0])
                    write(stream.feed(token))
                    if stream.stopped or interruption.asked:
                        break
            except NotFinite as error:
                broken = f"[{error}: /reset begins anew]"
            write(stream.close())
        self.half = b"" if token == end else stream.half
        if not stream.text.endswith("\n"):
            write("\n")
        if broken:
            return broken
        if interruption.asked:
            return "[stopped]"
        if token == end:
            return "[end of document]"
        if not texts.alive[0] and not stream.stopped:
            return f"[the context of {texts.limit} tokens is full: /reset begins anew]"
        return ""


def converse(conversation: Conversation, first: str) -> None:
    """Continues `first`, where it is not empty; then reads lines from stdin until it ends."""
    with suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  (what input() edits lines with)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is not UTF-8 is refused as a line
    say("type what to continue; /help lists the commands, Ctrl-D leaves")
    if first:
        show(first)
        take_turn(conversation, first)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except StdoutLost:  # the prompt
            raise
        except OSError as error:
            raise UserError(f"stdin cannot be read: {reason(error)}") from None
        except EOFError:
            show("\n")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D leaves")
            continue
        if line.rstrip() == QUIT:
            return
        if line.startswith("/") and not line.startswith("//"):
            say(obey(conversation, line.rstrip()))
        else:
            take_turn(conversation, line.removeprefix("/") if line.startswith("//") else line)


def obey(conversation: Conversation, command: str) -> str:
    """Does what a line that begins with / asks for -> what to tell the user."""
    try:
        match command.split():
            case ["/help"]:
                return HELP
            case ["/reset"]:
                conversation.reset()
                return "[a new text]"
            case ["/seed", value]:
                conversation.draw_from(SEED(value))
                return f"[seed {SEED(value)}]"
            case ["/temperature", value]:
                conversation.set_temperature(TEMPERATURE(value))
                return f"[temperature {TEMPERATURE(value):g}]"
            case ["/seed" | "/temperature" as name, *_]:
                return f"{name} takes one number, as in {name} 1"
    except argparse.ArgumentTypeError as error:
        return f"{command}: {error}"
    return f"{command}: no such command; /help lists them, and // stands for text that begins with /"


def take_turn(conversation: Conversation, text: str) -> None:
    try:
        conversation.append(text)
    except UserError as error:
        say(f"[{error}]")
    else:
        with deferred_logging():
            ending = conversation.turn(show)
        say(ending)


def say(text: str) -> None:
    for line in text.splitlines():
        print_stderr(line)
