"""Commands as they are printed: typed into a shell, from the working directory, they run. Imports nothing heavy."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from data.errors import CONTROLS

ROOT = Path(__file__).resolve().parent.parent


def command(program: str, *words: str) -> str:
    """What runs a program of this checkout with these arguments, for a shell. program: train.py, sample.py, or a module
    as in `-m training.replay`."""
    module = program.removeprefix("-m ")
    if module == program:
        return " ".join(map(quoted, (interpreter(), shortest(str(ROOT / program)), *words)))
    place = [] if Path.cwd() == ROOT else [f"PYTHONPATH={quoted(str(ROOT))}"]
    return " ".join([*place, *map(quoted, (interpreter(), "-m", module, *words))])


def interpreter() -> str:
    """`python` where that is the one that runs here, in the same environment; else its path."""
    if not sys.executable:
        return "python"
    for name in ("python", "python3"):
        if _place(shutil.which(name) or "") == _place(sys.executable):
            return name
    return shortest(sys.executable)


def how_to_install(package: str) -> str:
    """What to say where a package that Headroom needs is missing."""
    ready = ROOT / ".venv" / "bin" / "python"
    instead = f"run {quoted(shortest(str(ready)))} instead, or " if ready.exists() else ""
    install = f"{quoted(interpreter())} -m pip install -e {quoted(str(ROOT))}"
    return f"{interpreter()} has no package {package}: {instead}install what Headroom needs with {install}"


def quoted(word: str) -> str:
    """A word for a shell, without characters that would steer the terminal it is printed to."""
    if not CONTROLS.search(word):
        return shlex.quote(word)
    return "$'" + "".join(_in_dollar_quotes(char) for char in word) + "'"  # bash, zsh, ksh


def _in_dollar_quotes(char: str) -> str:
    if CONTROLS.match(char):
        errors = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"
        return "".join(f"\\x{byte:02x}" for byte in char.encode(errors=errors))
    return f"\\{char}" if char in "\\'" else char


def _place(path: str) -> tuple[str, str]:
    """Of an executable. A virtual environment's is a link to its base's, and another one."""
    return os.path.realpath(os.path.dirname(path)), os.path.realpath(path)


def shortest(path: str) -> str:
    """A path, from the working directory or from the root."""
    relative = os.path.relpath(path)
    if os.sep not in relative and path == sys.executable:  # a shell would search for it
        relative = os.path.join(os.curdir, relative)
    return min(relative, path, key=len)
