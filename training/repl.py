"""Sampling turn by turn: what is typed is appended to the text, and the model continues it."""

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from data.errors import UserError
from data.tokenizer import Tokenizer
from model.generate import Texts, generate
from model.sampler import Sampler
from model.transformer import TransformerLM
from training.log import held_back
from training.signals import Interruptible
from training.streaming import TextStream
from training.streams import StdoutLost, reason, show, tell

HELP = """\
What you type is appended to the text as it stands, and the model continues it.
An empty line appends nothing: the model just goes on.
A line that begins with // stands for one that begins with /.
  /help    this
  /reset   forget the text, begin anew
  Ctrl-C   stops the model; what it wrote stays in the text
  Ctrl-D   leaves
A stop string ends a turn and is not shown, but stays in the text."""


class Conversation:
    """One text that the user and the model write in turns. Its caches live from turn to turn, so a turn computes only
    what is new."""

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        begin: Callable[[Sequence[int]], Texts],  # a text of these tokens, with nothing remembered yet
        max_new_tokens: int,
        stops: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.begin, self.max_new_tokens, self.stops = begin, max_new_tokens, stops
        self.reset()

    def reset(self) -> None:
        self.texts: Texts | None = None
        self.half = b""  # of a character that the last turn left incomplete, for the next one to go on with

    def append(self, line: str) -> None:
        """Raises UserError, and changes nothing, where the line leaves no room in the context."""
        tokens = self.tokenizer.encode(line).tolist()
        try:
            if self.texts is None:
                self.texts = self.begin(tokens or [self.tokenizer.end_of_text])
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
        end = self.tokenizer.end_of_text
        with Interruptible() as interruption:
            for step in generate(self.model, texts, self.sampler, max_new_tokens=self.max_new_tokens, end_token=end):
                token = int(step[0])
                write(stream.feed(token))
                if stream.stopped or interruption.asked:
                    break
            write(stream.close())
        self.half = b"" if token == end else stream.half
        if not stream.text.endswith("\n"):
            write("\n")
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
        command = line.rstrip()
        if command == "/help":
            say(HELP)
        elif command == "/reset":
            conversation.reset()
            say("[a new text]")
        elif line.startswith("/") and not line.startswith("//"):
            say(f"{command}: no such command; /help lists them, and // stands for text that begins with /")
        else:
            take_turn(conversation, line.removeprefix("/") if line.startswith("//") else line)


def take_turn(conversation: Conversation, text: str) -> None:
    try:
        conversation.append(text)
    except UserError as error:
        say(f"[{error}]")
    else:
        with held_back():
            ending = conversation.turn(show)
        say(ending)


def say(text: str) -> None:
    for line in text.splitlines():
        tell(line)
