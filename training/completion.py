"""Completion in bash of a program whose options argparse knows.

eval "$(python train.py -sc install=bash; python sample.py --completion)"

Bash has one function for the word `python`, whatever program follows. Hydra's would run that program, to ask it what
completes; the one here takes its place, knows the answer, and leaves train.py's to Hydra's, except for
the folders of runs.
"""

import argparse
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = """\
_headroom_python() {
    local word=${COMP_WORDS[COMP_CWORD]}
    case ${COMP_WORDS[1]}:$COMP_CWORD in
        *:1) ;;
        train.py:* | */train.py:*)
            case $word in
                resume=* | init_from=*)
                    compopt -o nospace
                    COMPREPLY=($(compgen -d -P "${word%%=*}=" -S / -- "${word#*=}"))
                    return ;;
            esac
            declare -F hydra_bash_completion >/dev/null && compopt -o nospace && hydra_bash_completion ;;
        PROGRAM:* | */PROGRAM:*)
            case ${COMP_WORDS[COMP_CWORD - 1]} in
                VALUES
                *) COMPREPLY=($(compgen -W "
                    OPTIONS" -- "$word")) ;;
            esac ;;
    esac
}
complete -o default -F _headroom_python python
"""


class PrintCompletion(argparse.Action):
    """A flag that prints a script for bash to evaluate, and ends the program."""

    def __init__(self, **keywords: Any):
        super().__init__(nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(script(parser), end="")
        parser.exit()


def script(parser: argparse.ArgumentParser) -> str:
    """For bash, made once: it completes without starting Python. Where it has nothing to say, bash offers files."""
    actions = [action for action in parser._actions if action.option_strings]
    values = [f"{one.option_strings[-1]}) {_value(one)} ;;" for one in actions if one.nargs != 0]
    options = [action.option_strings[-1] for action in actions]
    return (
        SCRIPT.replace("PROGRAM", parser.prog)
        .replace("VALUES", f"\n{16 * ' '}".join(values))
        .replace("OPTIONS", f"\n{20 * ' '}".join(options))
    )


def _value(action: argparse.Action) -> str:
    """What bash does for the word after an option."""
    if action.choices:
        return f'COMPREPLY=($(compgen -W "{" ".join(action.choices)}" -- "$word"))'
    if action.type is not Path:
        return "compopt +o default"  # a number, or a text of the user's own
    return "compopt +o default -o dirnames" if action.metavar == "DIR" else ":"
