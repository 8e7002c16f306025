"""Command-line flags of sample.py, and which of them contradict each other. Imports nothing heavy."""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from common.atomic_io import exists, names_in
from common.cli import Parser, number
from common.conf_files import choices, is_group, keys
from common.errors import UserError, reason
from common.figures import check_writable
from common.hf_names import folder_of, is_published
from common.invocation import check_encoding, quoted, version_line
from common.paths import entering
from common.streams import print_line, print_stderr
from common.suggestions import hint, nearest
from generation.defaults import MAX_NEW_TOKENS, SAMPLING

MAX_SAMPLES = 1024
MAX_TEXT_BYTES = 2**28  # of a prompt, or of a text to score
MAX_PAGE_BYTES = 2**18  # of a text that is written as a page, which is 50 to 200 times as long
MAX_SEED = 2**63 - 1
DEFAULTS = {
    "prompt": None,
    "prompt_file": None,
    "interactive": False,
    "score": None,
    "tokens": False,
    "html": None,
    "attention_map": None,
    "run": None,
    "checkpoint": "latest",
    "max_new_tokens": MAX_NEW_TOKENS,
    "num_samples": 1,
    "seed": 0,
    "stop": [],
    "context": "stop",
    **SAMPLING,
    "json": False,
    "stats": False,
    "device": "auto",
    "precision": "auto",
    "kernel": "auto",
    "execution": None,
    "no_cache": False,
    "compile": False,
    "speculate": None,
}
PROMPTS = ("prompt", "prompt_file")
FILTERS = ("top_k", "top_p", "min_p")
WRITING = ("max_new_tokens", "num_samples", "seed", "stop", "context", "temperature", *FILTERS, "repetition_penalty")
# Each: a flag, those that it leaves without a meaning, and why.
CONTRADICTIONS = (
    (
        "score",
        (*PROMPTS, "attention_map", "interactive", *WRITING, "stats", "no_cache", "compile", "speculate"),
        "a text is read, none is written",
    ),
    (
        "attention_map",
        ("interactive", *WRITING, "json", "stats", "no_cache", "compile", "speculate"),
        "a prompt is drawn, not continued",
    ),
    ("compile", ("no_cache",), "what is compiled is the step that reads the cache"),
    ("speculate", ("no_cache",), "drafts are checked in one pass over what the cache lacks"),
    ("interactive", ("prompt_file", "num_samples"), "one text is written, as a conversation"),
    ("interactive", ("json",), "a JSON object holds a finished text, and a conversation goes on"),
    ("interactive", ("stats",), "speeds are measured on one text without pauses, and a conversation waits for you"),
    ("prompt_file", ("prompt",), "there is one prompt"),
)
OF_SCORES = {"tokens": "it prints how each token of a text is predicted", "html": "it shows how a text is predicted"}
SETTING = re.compile(r"\+{0,2}(\w+(?:\.\w+)*)=(\S+)")  # as train.py takes them
SETTINGS_OF_RUN = ("resume", "run_dir", "init_from")  # what train.py calls the folder that --run names
SWITCHES = ("interactive", "tokens", "json", "stats", "no_cache", "compile")  # flags without a value


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse the command line, every flag filled in; `prompt` is the text to continue, `score_text` the one to score.
    Raises UserError for flags that contradict each other, a run that is not there, a file that is not text, and a
    picture or a page that cannot be written."""
    given = _parse(_parser(description))
    _check_encoding(given)
    _check_contradictions(given)
    _check_compiled(given)
    _check_greedy(given)
    _check_seeds(given)
    args = argparse.Namespace(**DEFAULTS | given)
    if args.run == Path("latest"):  # as train.py's resume=latest
        args.run = None
    if args.run is not None:
        check_is_folder(args.run)
    args.prompt = _read_prompt(args)
    if args.attention_map is not None:
        check_writable(args.attention_map, "--attention-map")
    if args.html is not None:
        check_writable(args.html, "--html", ("html",))
    args.score_text = None if args.score is None else _read_score_text(args)
    _hint_at_line_ends(args.stop)
    return args


def _parse(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags that were typed, as a dictionary: those that were not are missing."""
    typed = sys.argv[1:]
    end = typed.index("--") if "--" in typed else len(typed)  # what follows is no flag
    known, rest = parser.parse_known_args([*map(_hyphenated, typed[:end]), *typed[end:]])
    given = vars(known)
    words = [word for word in (given.get("prompt"), *rest) if word in typed[:end]]
    _check_no_setting(words)
    if rest:
        is_flag = any(word.startswith("-") for word in rest)
        parser.refuse(rest, "" if is_flag else 'a prompt of several words goes in quotes, as in "to be"')
    if "prompt_flag" in given:
        if "prompt" in given:
            raise UserError("--prompt with a prompt: there is one prompt; leave one of them out")
        given["prompt"] = given.pop("prompt_flag")
    return given


def _check_encoding(given: dict[str, Any]) -> None:
    """Raise UserError for a prompt or a stop string that holds bytes which are no text where this shell runs."""
    for flag, text in (("prompt", given.get("prompt", "")), *(("stop", stop) for stop in given.get("stop", ()))):
        check_encoding(f"{_flag(flag)} {text}", text)


def _hyphenated(word: str) -> str:
    """A flag typed as --max_new_tokens, as the name of a setting of train.py, with the hyphens it has here."""
    name, equals, value = word.partition("=")
    hyphenated = name.replace("_", "-")
    known = word.startswith("--") and any(_flag(flag).startswith(hyphenated) for flag in DEFAULTS)
    return hyphenated + equals + value if known else word


def _check_no_setting(words: Sequence[str]) -> None:
    """Raise UserError for a word such as run=runs/NAME or attention=mla, the syntax of train.py: as a prompt, the model
    would continue it."""
    for word in words:
        setting = SETTING.fullmatch(word)
        if setting is None:
            continue
        name = "run" if setting[1] in SETTINGS_OF_RUN else setting[1]
        if name in DEFAULTS:
            raise UserError(f"{word}: settings are flags here: {_as_flag(name, setting[2])}; a prompt goes after --")
        if _is_setting_of_train(name):
            raise UserError(
                f"{word}: {name} is a setting of train.py, not of sample.py, which takes a run as it was trained: "
                "leave it out; a prompt goes after --"
            )


def _is_setting_of_train(name: str) -> bool:
    """Whether train.py takes such a setting: one at the top of conf/train.yaml, a group, or group.name."""
    top = name.partition(".")[0]
    return is_group(top) or top in keys("", "train")


def _as_flag(name: str, value: str) -> str:
    """What to write instead of a setting of train.py."""
    flag = f"--{name.replace('_', '-')}"
    return f"write {flag}" if name in SWITCHES else f"write {flag} {quoted(value)}"


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        return read_text(args.prompt_file, "--prompt-file")
    if args.prompt == "-":
        return read_text(Path("-"), "the prompt")
    return args.prompt or ""


def _read_score_text(args: argparse.Namespace) -> str:
    """The text to score. Raises UserError where it is empty, or too long for a page that was asked for."""
    text = read_text(args.score, "--score")
    if text == "":
        raise UserError(f"--score {args.score} is empty, which leaves nothing to predict: score a longer text")
    if args.html is not None:
        _check_page(args.html, args.score, len(text.encode()))
    return text


def _check_page(page: Path, text: Path, size: int) -> None:
    """Raise UserError where the page would replace the text, or the text, of `size` bytes, is too long for one."""
    if page.exists() and text.exists() and page.samefile(text):
        raise UserError(f"--html {page} is the text itself: give the page another name")
    if size > MAX_PAGE_BYTES:
        raise UserError(
            f"--html {page}: a page holds a text of at most {MAX_PAGE_BYTES:,} bytes, {text} has {size:,}: "
            "score a part of it, or leave --html out"
        )


def check_is_folder(run: Path) -> None:
    """Raise UserError where the folder of a run, or of hf:DIR, is not there, is no folder, or may not be reached."""
    path = folder_of(run)
    with entering(path):
        there = exists(path)
        if there and path.is_dir():
            return
    if there:
        run = next((above for above in path.parents[:3] if exists(above / "config.yaml")), None)  # of a checkpoint, say
        raise UserError(f"{path} is a file: give the folder of a run{f', {run}' if run else ''}")
    if is_published(run):
        raise UserError(f"{run}: there is no such folder: nothing is downloaded, give one of this machine")
    meant = hint(_nearest_run(path))
    raise UserError(f"{path} is not a run: there is no such folder{meant and f'; {meant}'}")


def _nearest_run(path: Path) -> str | None:
    """The run that a path is most likely a slip of: one beside it, or under runs/."""
    for folder in (path.parent, Path("runs")):
        with suppress(OSError):
            name = nearest(path.name, [name for name in names_in(folder) if exists(folder / name / "config.yaml")])
            if name is not None:
                return str(folder / name)
    return None


def read_text(path: Path, what: str) -> str:
    """Read the characters of a file, none changed; `-` is stdin. Raises UserError where it is not there or not
    UTF-8."""
    name = "stdin" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if name == "stdin" else path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise UserError(
                f"{what}: {name} is longer than {MAX_TEXT_BYTES:,} bytes, the most that is read: give a part of it"
            )
        return content.decode()
    except OSError as error:
        raise UserError(f"{what}: {name} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {name} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _parser(description: str) -> argparse.ArgumentParser:
    # Without defaults, so that flags that were typed can be distinguished from those that were not.
    parser = Parser(
        prog="sample.py",
        usage="python sample.py [PROMPT | -] [options] [-- PROMPT]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    text = parser.add_argument_group("what to continue").add_argument
    text("prompt", nargs="?", help="text, verbatim; - is stdin; without one, a new document begins")
    text("--prompt", dest="prompt_flag", metavar="TEXT", help="a prompt given as a flag")
    text("--prompt-file", type=Path, metavar="FILE", help="the bytes of a file, as UTF-8")
    text("--interactive", action="store_true", help="turn by turn; what was read and written stays in the cache")
    text("--score", type=Path, metavar="FILE", help="write nothing: how well the model predicts FILE (- is stdin)")
    text("--tokens", action="store_true", help="with --score: a line per token, how likely it and others were")
    text(
        "--html", type=Path, metavar="FILE", help="with --score: the text colored by nats per token, as a page (.html)"
    )
    text("--attention-map", type=Path, metavar="FILE", help="no text: draw the prompt's attention (.png, .svg or .pdf)")
    model = parser.add_argument_group("the model").add_argument
    model(
        "--run",
        type=_run_folder,
        metavar="DIR",
        help="the run's folder; latest, the default: the newest with a checkpoint",
    )
    model(
        "--checkpoint",
        choices=["latest", "best"],
        help=f"best: of the lowest validation loss; {_default('checkpoint')}",
    )
    length = parser.add_argument_group("how much").add_argument
    length(
        "--max-new-tokens",
        metavar="N",
        **_number(f"with --interactive, per turn; {_default('max_new_tokens')}", int, 1),
    )
    length(
        "--num-samples",
        metavar="N",
        **_number(f"as one batch, of seeds S, S+1, ...; {_default('num_samples')}", int, 1, MAX_SAMPLES),
    )
    length(
        "--stop",
        action="append",
        type=_stop_string,
        metavar="STRING",
        help="end before this text is written; repeatable",
    )
    length(
        "--context",
        choices=["stop", "slide"],
        help=f"when full: stop, or drop the oldest half and go on; {_default('context')}",
    )
    draw = parser.add_argument_group(
        "which token", "applied in this order; the filters see what those before them left"
    ).add_argument
    draw(
        "--repetition-penalty",
        metavar="R",
        **_number(
            f"makes tokens of the context less likely, 1 does not; {_default('repetition_penalty')}", float, 1, 100
        ),
    )
    draw("--temperature", metavar="T", **_number(f"0 is greedy; {_default('temperature')}", float, 0))
    draw("--top-k", metavar="K", **_number("sample among the K most likely tokens", int, 1))
    draw("--top-p", metavar="P", **_number("sample among the fewest tokens that reach P", float, 0, 1))
    draw("--min-p", metavar="P", **_number("leave out what is less likely than P times the most likely", float, 0, 1))
    draw("--seed", metavar="S", **_number(f"same seed, same text; {_default('seed')}", int, 0, MAX_SEED))
    output = parser.add_argument_group("output").add_argument
    output(
        "--json",
        action="store_true",
        help="an object per sample: prompt, text (what follows it), seed, tokens (how many were written), "
        "prompt_tokens (read), finish (stop, length, end, context, interrupted or not_finite), "
        "prefill_tokens_per_second, decode_tokens_per_second; "
        "with --score: file, nats_per_token, bpb, tokens, bytes; "
        "with --score --tokens: before that, an object per token: number (from 1), token, text, hex (its bytes), nats, "
        "probability, rank (these three are null for the first, which is not predicted), others (the likeliest other "
        "tokens: token, text, hex, probability)",
    )
    output("--stats", action="store_true", help="print times, kernels and the cache's size to stderr")
    output("--version", action=_Version, nargs=0, help="print the versions of Headroom and PyTorch")
    machine = parser.add_argument_group("how it runs").add_argument
    machine("--device", help="auto, cpu, cuda, cuda:1 or mps")
    machine("--precision", choices=["auto", "bf16", "fp16", "fp32"], help="auto: fp32 on a CPU")
    machine("--kernel", choices=choices("kernel"), help=f"how attention is computed; {_default('kernel')}")
    machine("--execution", choices=["naive", "expanded", "absorbed"], help="how MLA runs; default: what costs least")
    machine("--no-cache", action="store_true", help="recompute the whole text for every token")
    machine(
        "--compile",
        action="store_true",
        help="compile the step between tokens, up to a minute: for long texts",
    )
    machine(
        "--speculate",
        choices=["lookup", "self"],
        help="lookup: draft what followed the last tokens earlier in the text; self: what the model's own module of "
        "model.mtp_depth=1 expects; the same text, sooner where drafts are right",
    )
    return parser


def _default(flag: str) -> str:
    """The default of a flag as its help states it."""
    value = DEFAULTS[flag]
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print_line(version_line())
        parser.exit()


def _number(meaning: str, kind: type, least: int, most: int | float = math.inf) -> dict[str, Any]:
    """Keyword arguments of add_argument for a number: the limits that are checked are those that --help states."""
    limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
    return {"type": number(kind, least, most), "help": f"{limits}; {meaning}"}


def _run_folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name: give a run's folder, or latest")
    return Path(text)


def _stop_string(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty string would end every text before it begins")
    return text


def _hint_at_line_ends(stops: Sequence[str]) -> None:
    """Say of a stop string with a backslash and an n, which source code has too, how a line end is typed."""
    for stop in stops:
        if re.search(r"(?<!\\)\\n", stop):
            in_bash = "$'" + stop.replace("'", "\\'") + "'"
            print_stderr(f"[--stop {quoted(stop)} is a backslash and an n: a line end is --stop {in_bash}]")


def _check_contradictions(given: dict[str, Any]) -> None:
    for flag, others, why in CONTRADICTIONS:
        for other in others:
            if flag in given and other in given:
                raise UserError(f"{_flag(flag)} with {_flag(other)}: {why}; leave one of them out")
    for flag, why in OF_SCORES.items():
        if flag in given and "score" not in given:
            raise UserError(f"{_flag(flag)} without --score: {why}; add --score FILE, or leave it out")
    if given.get("interactive") and given.get("prompt") == "-":
        raise UserError("--interactive with -: stdin is where the turns come from; give the prompt as text")


def _check_compiled(given: dict[str, Any]) -> None:
    if "compile" not in given:
        return
    if given.get("kernel") == "flex":
        raise UserError("--compile with --kernel flex: that kernel compiles itself; leave one of them out")
    if given.get("speculate") == "self":
        raise UserError("--compile with --speculate self: what is compiled drafts nothing; leave one of them out")


def _check_greedy(given: dict[str, Any]) -> None:
    """Raise UserError for options that mean nothing at temperature 0, which is greedy decoding."""
    if given.get("temperature") != 0:
        return
    for other in FILTERS:
        if other in given:
            raise UserError(
                f"--temperature 0 with {_flag(other)}: the most likely token is always taken; leave one of them out"
            )
    if given.get("num_samples", 1) > 1:
        raise UserError(
            f"--temperature 0 with --num-samples {given['num_samples']}: all would be the same text; "
            "leave one of them out"
        )


def _check_seeds(given: dict[str, Any]) -> None:
    first = given.get("seed", DEFAULTS["seed"])
    count = given.get("num_samples", DEFAULTS["num_samples"])
    if first + count - 1 > MAX_SEED:
        raise UserError(
            f"--seed {first} with --num-samples {count}: the seeds would go beyond {MAX_SEED}; choose a smaller one"
        )


def _flag(name: str) -> str:
    return "a prompt" if name == "prompt" else "--" + name.replace("_", "-")
