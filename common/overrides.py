"""What is typed after train.py, made readable for Hydra's grammar, or refused in words that say what to type."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.invocation import CONF, command, quoted
from common.suggestions import no_such_setting

PATHS = ("run_dir", "resume", "init_from", "cache_dir")  # in which ~ is the home folder
TEXTS = (
    *PATHS,
    "data.path",
    "data.column",
    "data.document",
    "tokenizer.path",
    "sample_prompt",
)  # never numbers, lists or dicts
PLAIN_TEXT = r"[^,'\"\\$()\s](?:[^,'\"\\$()]*[^,'\"\\$()\s])?"  # needs no quotes as a value of TEXTS
WORD = r"[A-Za-z/][A-Za-z0-9_/+.%*@?-]*"  # needs none anywhere, unless it is one of NO_TEXTS
NO_TEXTS = ("null", "true", "false", "nan", "inf")
# The flags of Hydra's that a word follows.
VALUED = (*("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),)
VALUED += ("-i", "--info", "--experimental-rerun")


def readable(typed: Sequence[str]) -> list[str]:
    """The words of a command line, values quoted for Hydra where its grammar cannot read them as text.

    A value is text, and taken as it is, where the grammar refuses it and it is not all within [ ] or { }; of the
    settings in TEXTS also where the grammar would see a number, a list or a dict in it. With -m, text outside of quotes
    and brackets is a list of values at its commas. Raises UserError for what stays unreadable.

    Flags come last: amid settings, argparse would take no more of these after them.
    """
    # argparse takes the beginning of a flag for it, too.
    sweep = any(word == "-m" or (word > "--" and "--multirun".startswith(word)) for word in typed)
    flags = {i for i, word in enumerate(typed) if word.startswith("-")}
    flags |= {i + 1 for i in flags if typed[i] in VALUED}
    settings = [_override(word, sweep) for i, word in enumerate(typed) if i not in flags]
    return [*settings, *(word for i, word in enumerate(typed) if i in flags)]


def override(key: str, value: str) -> str:
    """What is typed for a setting to be exactly this text, before it is quoted for a shell."""
    value = f"./{value}" if key in PATHS and value.startswith("~") else value
    plain = re.fullmatch(PLAIN_TEXT if key in TEXTS else WORD, value) and value.lower() not in NO_TEXTS
    return f"{key}={value if plain else as_text(value, literal=True)}"


def as_text(value: str, literal: bool = False) -> str:
    """A value in quotes that Hydra reads as this text, in which an open ${ begins no interpolation; literal: nor does a
    closed one."""
    if literal:  # the backslashes before it would be read in pairs
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    else:
        value = re.sub(r"\$\{(?![^{]*\})", r"\\${", value)
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value) + '"'


def _override(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    key = key.strip()
    name = key.lstrip("+~")
    is_group = name.isidentifier() and (CONF / name).is_dir()
    if not name or (not equals and not key.startswith("~")):
        raise UserError(
            f"{word!r} is no setting: write key=value, as in steps=300, a value with spaces in quotes; "
            f"{command('train.py', '--help')} lists them"
        )
    if re.search("[\ud800-\udfff]", word):
        encoding = sys.getfilesystemencoding()
        way_out = "rename the file, or give a pattern that it fits" if encoding == "utf-8" else "try LC_ALL=C.UTF-8"
        raise UserError(f"{word} is no text in the encoding of this shell, {encoding}: {way_out}")
    if key.startswith("~"):
        if is_group and name != "experiment":
            raise UserError(f"{word}: a run needs its {name}: choose another as {name}=")
        if _read(word) is None:
            raise UserError(no_such_setting(name))
        return word
    if _read(f"{key}=x") is None:
        raise UserError(no_such_setting(name))
    if is_group:
        key = name  # Hydra would add a second choice to the default one
    if name in PATHS and value.startswith("~"):
        value = os.path.expanduser(value)
    found = _read(f"{key}={value}")
    if found is None:
        if name not in TEXTS and re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", value, re.DOTALL):
            raise UserError(_unreadable(key, value))
        parts = value.split(",") if sweep and not re.search(r"""["'()\[\]{}]""", value) else [value]
        value = ",".join(map(as_text, parts))
    elif found.is_sweep_override() and not sweep:
        text = "" if is_group else f", or write {quoted(f'{key}={as_text(value)}')} for one text"
        raise UserError(f"{key}={value} is several values: add -m, for a run of each{text}")
    elif name in TEXTS and isinstance(found.value(), bool | int | float | list | dict):
        value = as_text(value.strip())
    elif name in TEXTS and value != value.strip():  # which the grammar would leave out
        value = as_text(value)
    return f"{key}={value}"


def _read(word: str) -> Any | None:
    """Hydra's override; None where its grammar refuses the word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError):
        return None


def _unreadable(key: str, value: str) -> str:
    form = "a dict is {name: value, other: value}" if value.strip().startswith("{") else "a list is [value, value]"
    text = quoted(f"{key}={as_text(value)}")
    return f"cannot read {key}={value}: {form}, where text that is more than a word is in quotes; as one text: {text}"
