"""Interactive sampling (REPL), turn by turn: what is typed is appended to the text, and the model continues it."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from common.cli import number
from common.console import deferred_logging
from common.errors import NotFinite, UserError, reason
from common.signals import DeferredInterrupt
from common.streams import StdoutLost, print_stderr, show
from data.tokenizers.base import Tokenizer
from generation.decode import generate
from generation.options import MAX_SEED
from generation.sampler import Sampler
from generation.state import GenerationState
from generation.text_stream import TextStream
from model.transformer import TransformerLM

HELP = """\
What you type is appended to the text as it stands, and the model continues it.
An empty line appends nothing: the model just goes on.
Type // for a line that begins with /.
  /help           this
  /reset          start again from an empty prompt
  /seed N         sample the next turn as with --seed N
  /temperature T  sample the next turns at T; 0 takes the most likely token
  /quit           leave, as Ctrl-D does
  Ctrl-C          stop the model; what it wrote stays in the text
A stop string ends a turn and is not shown, but stays in the text."""
QUIT = "/quit"
parse_seed = number(int, 0, MAX_SEED)  # as the command line does
parse_temperature = number(float, 0)


class Conversation:
    """One text that the user and the model write in turns. Its KV caches live from turn to turn, so a turn computes
    only what is new."""

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        new_state: Callable[[Sequence[int]], GenerationState],  # of a text of these tokens, with nothing cached yet
        max_new_tokens: int,
        stops: Sequence[str] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.new_state = new_state
        self.max_new_tokens = max_new_tokens
        self.stops = stops
        self.seed: int | None = None  # where it is not that of `new_state`
        self.reset()

    def reset(self) -> None:
        """Empty the text and its KV caches."""
        self.state: GenerationState | None = None
        self.incomplete_bytes = b""  # of a character cut off at the end of the last turn; the next one completes it

    def set_seed(self, seed: int) -> None:
        """Seed the sampling of the next token and all later ones, in this text and in those after a reset."""
        self.seed = seed
        if self.state is not None:
            self.state.reseed(0, seed)

    def set_temperature(self, temperature: float) -> None:
        self.sampler = self.sampler.model_copy(update={"temperature": temperature})

    def append(self, line: str) -> None:
        """Append the user's line to the text. Raises UserError, and changes nothing, where the line leaves no room in
        the context."""
        goes_on = self.state is not None
        tokens = (self.tokenizer.encode_continuation if goes_on else self.tokenizer.encode)(line).tolist()
        try:
            if goes_on:
                self.state.append(0, tokens)
            else:
                self.state = self.new_state(tokens or [self.tokenizer.end_of_text])
                if self.seed is not None:
                    self.state.reseed(0, self.seed)
        except ValueError:
            raise UserError(self._no_room(len(tokens))) from None
        if line:
            self.incomplete_bytes = b""  # that character will never be whole

    def turn(self, write: Callable[[str], None]) -> str:
        """Generate a turn, writing text as soon as no stop string can change it -> a note on why it ended; empty where
        the user asked for that end."""
        stream = TextStream(self.tokenizer, self.stops, self.incomplete_bytes)
        end_token = self.tokenizer.end_of_text
        token = None
        failure = ""
        with DeferredInterrupt() as interrupt:
            try:
                for step in generate(
                    self.model, self.state, self.sampler, max_new_tokens=self.max_new_tokens, end_token=end_token
                ):
                    for token in step[0].tolist():
                        write(stream.feed(token))
                    if stream.stopped or interrupt.requested:
                        break
            except NotFinite as error:
                failure = f"[{error}: /reset starts again]"
            write(stream.close())
        self.incomplete_bytes = b"" if token == end_token else stream.incomplete_bytes
        if not stream.text.endswith("\n"):
            write("\n")
        return failure or self._ending(token, interrupted=interrupt.requested, stopped=stream.stopped)

    def _ending(self, last_token: int | None, *, interrupted: bool, stopped: bool) -> str:
        """The note on why a turn ended; none where the user asked for that end, by a stop string or a length."""
        if interrupted:
            return "[stopped]"
        if last_token == self.tokenizer.end_of_text:
            return "[end of document]"
        if not self.state.rows.alive[0] and not stopped:
            return f"[the context of {self.state.context_length} tokens is full: /reset starts again]"
        return ""

    def _no_room(self, num_tokens: int) -> str:
        limit = self.model.config.context_length
        free = limit - 1 - (0 if self.state is None else int(self.state.rows.lengths[0]))
        full = f"the context of {limit} tokens is full" if free <= 0 else f"{num_tokens} tokens do not fit: {free} do"
        return f"{full}; /reset starts again, --context slide would drop the oldest half"


def converse(conversation: Conversation, first: str) -> None:
    """Continue `first`, where it is not empty; then read lines from stdin, and answer each, until it ends."""
    with suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  (what input() edits lines with)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is not UTF-8 is refused as a line
    say("type what to continue; /help lists the commands, Ctrl-D leaves")
    if first:
        show(first)
        take_turn(conversation, first)
    while (line := _read_line()) is not None and line.rstrip() != QUIT:
        if line.startswith("//"):
            take_turn(conversation, line.removeprefix("/"))
        elif line.startswith("/"):
            say(run_command(conversation, line.rstrip()))
        else:
            take_turn(conversation, line)


def _read_line() -> str | None:
    """The next line of stdin; None at its end. Raises UserError where it cannot be read."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except StdoutLost:  # of "> ", not of stdin
            raise
        except OSError as error:
            raise UserError(f"stdin cannot be read: {reason(error)}") from None
        except EOFError:
            show("\n")
            return None
        except KeyboardInterrupt:
            say("\nCtrl-D leaves")


def run_command(conversation: Conversation, command: str) -> str:
    """Run a command, a line that begins with / -> the answer to print."""
    try:
        match command.split():
            case ["/help"]:
                return HELP
            case ["/reset"]:
                conversation.reset()
                return "[a new text]"
            case ["/seed", value]:
                seed = parse_seed(value)
                conversation.set_seed(seed)
                return f"[seed {seed}]"
            case ["/temperature", value]:
                temperature = parse_temperature(value)
                conversation.set_temperature(temperature)
                return f"[temperature {temperature:g}]"
            case ["/seed" | "/temperature" as name, *_]:
                return f"{name} takes one number, as in {name} 1"
    except argparse.ArgumentTypeError as error:
        return f"{command}: {error}"
    return f"{command}: no such command; /help lists them, and // stands for text that begins with /"


def take_turn(conversation: Conversation, line: str) -> None:
    """Append the line, stream the model's continuation, then print the note on why it ended."""
    try:
        conversation.append(line)
    except UserError as error:
        say(f"[{error}]")
    else:
        with deferred_logging():
            ending = conversation.turn(show)
        say(ending)


def say(text: str) -> None:
    """Print the lines of a text to stderr."""
    for line in text.splitlines():
        print_stderr(line)
