"""Command-line overrides of train.py: quoted for Hydra's grammar, or refused in a line that says what to type."""

import functools
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NoReturn

from common import conf_files
from common.errors import UserError
from common.invocation import check_encoding, command, quoted
from common.suggestions import known_settings, mask_settings, no_such_setting

PATHS = ("run_dir", "resume", "init_from", "cache_dir")  # in which ~ is the home folder
TEXTS = (
    *PATHS,
    "data.path",
    "data.column",
    "data.document",
    "tokenizer.path",
    "sample_prompt",
    "hypothesis",
)  # never numbers, lists or dicts
ONE_PER_SWEEP = ("sweep", "minutes", "max_minutes", "hypothesis")  # and no values to vary
PLAIN_TEXT = r"[^,'\"\\$()\s](?:[^,'\"\\$()]*[^,'\"\\$()\s])?"  # needs no quotes as a value of TEXTS
WORD = r"[A-Za-z/][A-Za-z0-9_/+.%*@?-]*"  # needs none anywhere, unless it is one of NO_TEXTS
FLOAT = r"[+-]?\d{1,18}(?:\.\d*(?:[eE]\+?\d{1,2})?|[eE]\+?\d{1,2})"  # one that may be whole, in at most 117 digits
BRACKETS = r"""["'()\[\]{}]"""  # and quotes, within which a comma does not part values
# What stands between two commas: quoted, in brackets, or without either.
PART = r"""(?:"[^"]*"|'[^']*'|\[[^\[\]]*\]|\{[^{}]*\}|\([^()]*\)|[^,"'\[\]{}()])+"""
NO_TEXTS = ("null", "true", "false", "nan", "inf")
# Of a part, which a choice of its own names, Hydra does not know the settings that it does not change.
OF_PARTS = r"(attention|data)\.parts\."
# The flags of Hydra's that a word follows.
VALUED = (*("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),)
HELP = {"--help", "-h", "--hydra-help", "--version"}
WHERE_IT_EXISTS = "if:"  # before an override of a sweep: it applies to the choices that have the setting
VALUED += ("-i", "--info", "--experimental-rerun")


def hydra_arguments(typed: Sequence[str]) -> list[str]:
    """Quote the words of a command line for Hydra, where its grammar cannot read a value as text.

    A value is text, and taken as it is, where the grammar refuses it and it is not all within [ ] or { }; of the
    settings in TEXTS also where the grammar would see a number, a list or a dict in it. A whole number may be written
    as 1e3. With -m, text outside of quotes and brackets is a list of values at its commas. Raises UserError for what
    stays unreadable, for what is given twice, and for a flag that Hydra does not have.

    Flags come last: amid settings, argparse would take no more of these after them.
    """
    _check_each_once(typed)
    typed = with_stored_choices(typed)
    _check_flags(typed)
    sweep = any(map(_is_multirun, typed))
    flags = _flags(typed)
    settings = [_override(word, typed, sweep) for i, word in enumerate(typed) if i not in flags]
    return [*settings, *(typed[i] for i in sorted(flags))]


def sweep_overrides(typed: Sequence[str]) -> list[str] | None:
    """The overrides of a command with -m, wherever it stands among them; None for a command without, and for one that
    asks for help. Raises UserError for another flag beside it."""
    if not any(map(_is_multirun, typed)) or not HELP.isdisjoint(typed):
        return None
    hydras = next((word for word in typed if re.match(r"\+*hydra[./]", word) and "searchpath" not in word), None)
    if hydras is not None:
        raise UserError(f"{hydras} does nothing in a sweep: train.py runs it itself, one run after the other")
    overrides = [word for word in typed if not _is_multirun(word)]
    flag = next((word for word in overrides if word.startswith("-") and "=" not in word), None)
    if flag is not None:
        _check_flags(overrides)
        raise UserError(f"{flag} does not go with -m, which is for a sweep: leave one of them out")
    return overrides


def _is_multirun(word: str) -> bool:
    # argparse takes the beginning of a flag for it, too.
    return word == "-m" or (word > "--" and "--multirun".startswith(word))


def _check_each_once(typed: Sequence[str]) -> None:
    """Raise UserError where two of the overrides give one setting, or choose twice in one group: Hydra would take the
    last silently."""
    given: dict[str, str] = {}
    for override in typed:
        key, equals, _ = override.lstrip("+").partition("=")
        key = key.strip().partition("@")[0]
        if not equals or key.startswith(("-", "~")):  # a flag; a setting that is taken away
            continue
        if key in given:
            sweep = ", or -m with a list of values to have a run of each" if given[key] != override else ""
            raise UserError(f"{given[key]} and {override} give {key} twice: leave one of them out{sweep}")
        given[key] = override


def with_stored_choices(arguments: Sequence[str]) -> list[str]:
    """Return the arguments; where a run is resumed, with settings of data and tokenizer marked to be added (++). They
    belong to the run's own choices, and Hydra, which composes the default ones, may not know them."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return list(arguments)
    return [f"++{one}" if re.match(r"(data|tokenizer)\.[^=]+=", one) else one for one in arguments]


def format_override(key: str, value: str) -> str:
    """Format the override that gives a setting exactly this text, before it is quoted for a shell."""
    value = f"./{value}" if key in PATHS and value.startswith("~") else value
    plain = re.fullmatch(PLAIN_TEXT if key in TEXTS else WORD, value) and value.lower() not in NO_TEXTS
    return f"{key}={value if plain else as_text(value, literal=True)}"


def as_text(value: str, literal: bool = False) -> str:
    """Quote a value so that Hydra reads it as this text, in which an open ${ begins no interpolation; literal: nor does
    a closed one."""
    if literal:  # the backslashes before it would be read in pairs
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    else:
        value = re.sub(r"\$\{(?![^{]*\})", r"\\${", value)
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value) + '"'


def _flags(typed: Sequence[str]) -> set[int]:
    """The indices of flags, and of the words that follow them as their values."""
    flags = {i for i, word in enumerate(typed) if word.startswith("-")}
    return flags | {i + 1 for i in flags if typed[i] in VALUED and i + 1 < len(typed)}


def _check_flags(typed: Sequence[str]) -> None:
    """Raise UserError for a flag that Hydra does not have: it may be a setting, with dashes before it."""
    flags = sorted(_flags(typed))
    if not flags:
        return
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    for i in flags:
        known = any(option.startswith(typed[i].partition("=")[0]) for option in parser._option_string_actions)
        if typed[i].startswith("-") and not known:
            _check_no_setting(i, typed)
    parser.error = _unknown_flag
    parser.parse_args([typed[i] for i in flags])


def _check_no_setting(index: int, typed: Sequence[str]) -> None:
    """Raise UserError where the flag of this index, such as --steps, is named like a setting."""
    flag = typed[index]
    following = typed[index + 1] if index + 1 < len(typed) else ""
    name, equals, value = flag.lstrip("-").partition("=")
    name = name.replace("-", "_")
    known = known_settings(typed)
    names = [name] if name in known.settings or name in known.choices else known.named(name)
    if not equals:
        value = "..." if not following or "=" in following or following.startswith("-") else following
    if names:
        settings = " or ".join(quoted(f"{one}={value}") for one in names)
        raise UserError(f"{flag}: settings have no dashes: write {settings}")


def _unknown_flag(message: str) -> NoReturn:
    """Raise UserError, in the place of the `error` of Hydra's parser."""
    flags, settings = command("train.py", "--hydra-help"), command("train.py", "--help")
    raise UserError(f"{message} ({flags} lists the flags, {settings} the settings, which have no dashes)")


def _override(word: str, typed: Sequence[str], sweep: bool) -> str:
    key, equals, value = word.partition("=")
    key = key.strip()
    name = key.lstrip("+~")
    if not name or (not equals and not key.startswith("~")):
        raise UserError(
            f"{word!r} is no setting: write key=value, as in steps=300, a value with spaces in quotes; "
            f"{command('train.py', '--help')} lists them"
        )
    check_encoding(word, word, of_file=name in (*PATHS, "data.path", "tokenizer.path"))
    if name.startswith(WHERE_IT_EXISTS):
        raise UserError(f"{word}: {WHERE_IT_EXISTS} is for a sweep over several choices: add -m, or leave it out")
    if key.startswith("~"):
        return _deletion(word, name, typed)
    if _parsed(f"{key}=x") is None:
        raise UserError(no_such_setting(name, typed))
    if conf_files.is_group(name):
        key = name  # Hydra would add a second choice to the default one
    if name in PATHS and value.startswith("~"):
        value = os.path.expanduser(value)
    value = _value(key, value, sweep)
    is_added = re.match(OF_PARTS, name) or name in mask_settings()
    return f"++{name}={value}" if is_added else f"{key}={value}"


def key_of(word: str) -> str:
    """The setting that an override is of."""
    return word.removeprefix(WHERE_IT_EXISTS).lstrip("+~").partition("=")[0].strip()


def _deletion(word: str, name: str, typed: Sequence[str]) -> str:
    if conf_files.is_group(name) and name != "experiment":
        raise UserError(f"{word}: a run needs its {name}: choose another as {name}=")
    if _parsed(word) is None:
        raise UserError(no_such_setting(name, typed))
    return word


def _value(key: str, value: str, sweep: bool) -> str:
    """Quote a value where Hydra's grammar would read it as something else."""
    found, is_text = _parsed(f"{key}={value}"), key.lstrip("+") in TEXTS
    if found is None:
        return _quoted_value(key, value, sweep, is_text)
    if found.is_sweep_override() and not sweep:
        raise UserError(f"{key}={value} is several values: {_way_out_of_several(key, value)}")
    if not is_text:
        return value if re.search(BRACKETS, value) else ",".join(map(_in_digits, value.split(",")))
    if isinstance(found.value(), bool | int | float | list | dict):
        return as_text(value.strip())
    return value if value == value.strip() else as_text(value)  # the grammar would leave the spaces out


def _way_out_of_several(key: str, value: str) -> str:
    if key == "match":
        return f"several budgets are a list, of a sweep: write match=[{value}], and add -m"
    text = f", or write {quoted(f'{key}={as_text(value)}')} for one text" if key in TEXTS else ""
    return f"{'a sweep has one' if key in ONE_PER_SWEEP else 'add -m, for a run of each'}{text}"


def _quoted_value(key: str, value: str, sweep: bool, is_text: bool) -> str:
    """Quote, as text, a value that the grammar refuses."""
    if not is_text and re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", value, re.DOTALL):
        raise UserError(_unreadable(key, value))
    parts = _parts(value) if sweep else [value]
    return ",".join(part if _parsed(f"{key}={part}") else as_text(part) for part in parts)


def _parts(value: str) -> list[str]:
    """Split at the commas that are not within quotes or brackets; where these do not pair, it is one text."""
    parts = re.findall(PART, value)
    return parts if ",".join(parts) == value else [value]


def _in_digits(value: str) -> str:
    """Write a whole number that was typed as a float, such as 1e3, in digits: integer settings take no float."""
    if not re.fullmatch(FLOAT, value.strip()):
        return value
    number = Decimal(value)
    return str(int(number)) if number == int(number) else value


@functools.lru_cache(maxsize=1000)
def _parsed(word: str) -> Any | None:
    """Parse an override with Hydra's grammar, to be read alone; None where that refuses it."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(word)
    except (HydraException, RecursionError):
        return None


@functools.cache
def _parser() -> Any:
    """Hydra's: to make one takes as long as to parse with it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _unreadable(key: str, value: str) -> str:
    form = "a dict is {name: value, other: value}" if value.strip().startswith("{") else "a list is [value, value]"
    text = quoted(f"{key}={as_text(value)}")
    return f"cannot read {key}={value}: {form}, where text that is more than a word is in quotes; as one text: {text}"
