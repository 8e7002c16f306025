"""Commands as they are printed: typed into a shell, from the working directory, they run. Imports nothing heavy."""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from common.errors import CONTROLS, UserError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


def version_line() -> str:
    """The versions of Headroom and PyTorch, which --version prints. PyTorch is not imported: that takes seconds."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"Headroom {project['version']}, PyTorch {torch}"


def check_encoding(what: str, text: str, of_file: bool = False) -> None:
    """Raise UserError for a text of the command line that holds bytes which are none where this shell runs. what: its
    name in the error; of_file: whether it names a file."""
    if not re.search("[\ud800-\udfff]", text):  # what Python reads such bytes as
        return
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        way_out = "try LC_ALL=C.UTF-8"
    else:
        way_out = "rename the file, or give a pattern that it fits" if of_file else f"write it in {encoding}"
    raise UserError(f"{what} is no text in the encoding of this shell, {encoding}: {way_out}")


def command(program: str, *words: str) -> str:
    """Return the shell command that runs a program of this checkout with these arguments. program: train.py, sample.py,
    or a module as in `-m training.run.replay`."""
    module = program.removeprefix("-m ")
    if module == program:
        return " ".join(map(quoted, (interpreter(), shortest(str(ROOT / program)), *words)))
    place = "" if shortest(str(ROOT)) == os.curdir else f"PYTHONPATH={quoted(str(ROOT))} "
    return place + installed(module, *words)


def installed(module: str, *words: str) -> str:
    """Return the shell command that runs a module of an installed package."""
    return " ".join(map(quoted, (interpreter(), "-m", module, *words)))


def interpreter() -> str:
    """Return how to call the Python that runs here: `python` where a shell finds that one, else its path."""
    if not sys.executable:
        return "python"
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and _place(found) == _place(sys.executable):
            return name
    return shortest(sys.executable)


def how_to_install(package: str, file: str = "") -> str:
    """Return what to do where a package that Headroom needs is missing. file: which imports it."""
    ready = ROOT / ".venv" / "bin" / "python"
    instead = f"run {quoted(shortest(str(ready)))} instead, or " if ready.exists() else ""
    install = installed("pip", "install", "-e", str(ROOT))
    importing = f", which {file} imports" if file else ""
    return f"{interpreter()} has no package {package}{importing}: {instead}install what Headroom needs with {install}"


def check_package(package: str, setting: str, extra: str = "") -> None:
    """Raise UserError where a package that a setting needs is not installed. extra: the one of pyproject.toml that
    brings it."""
    if importlib.util.find_spec(package) is None:
        how = installed("pip", "install", "-e", f"{ROOT}[{extra}]" if extra else str(ROOT))
        raise UserError(f"{setting} needs the package {package}, which is not here: {how}")


def quoted(word: str) -> str:
    """Quote a word for a shell, without characters that would steer the terminal it is printed to."""
    if not CONTROLS.search(word):
        return shlex.quote(word)
    return "$'" + "".join(_in_dollar_quotes(char) for char in word) + "'"  # bash, zsh, ksh


def _in_dollar_quotes(char: str) -> str:
    if CONTROLS.match(char):
        errors = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"
        return "".join(f"\\x{byte:02x}" for byte in char.encode(errors=errors))
    return f"\\{char}" if char in "\\'" else char


def _place(path: str) -> tuple[str, str]:
    """The folder and the real path of an executable. A virtual environment's is a link to its base's, and another
    one."""
    return os.path.realpath(os.path.dirname(path)), os.path.realpath(path)


def shortest(path: str) -> str:
    """Return the path from the working directory, or from the root where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except OSError:  # there is no working directory any more
        return path
    if os.sep not in relative and path == sys.executable:  # a shell would search for it
        relative = os.path.join(os.curdir, relative)
    return min(relative, path, key=len)
