"""Standard streams that are closed, full or in another encoding, signals from the first moment on, and control
characters in text of other programs: mostly in small processes that import nothing heavy."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from common import streams
from common.errors import UserError, escaped
from tests.support import ROOT
from training.monitor.progress import ProgressLine

PYTHON = f"exec {sys.executable}"
STARTED = "from common import process, streams; process.start(); from common.cli import one_line_errors\n"


def shell(line: str, cwd, **environment: str) -> tuple[int, str, str]:
    """-> exit code, stdout and stderr of a shell command, which can redirect its streams."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    found = subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, stdin=subprocess.PIPE)
    return found.returncode, found.stdout.decode(), found.stderr.decode()


def script(tmp_path, code: str) -> str:
    (tmp_path / "script.py").write_text(STARTED + code)
    return f"{PYTHON} {tmp_path / 'script.py'}"


FULL = "error: stdout cannot be written: No space left on device\n"
CLOSED = "error: stdout cannot be written: it is closed\n"
STREAMS = {
    ">/dev/full": (2, FULL),
    ">&-": (2, CLOSED),
    "<&- >&-": (2, CLOSED),
    "2>/dev/full": (0, ""),
    "2>&-": (0, ""),
    "<&-": (0, "a message\n"),
    ">&- 2>&-": (2, ""),
    ">/dev/full 2>/dev/full": (2, ""),
}


@pytest.mark.parametrize("how", STREAMS)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["", "unbuffered"])
def test_streams_lost_stdout_is_error_and_lost_stderr_is_ignored(tmp_path, how, unbuffered):
    code = "with one_line_errors():\n    streams.print_stderr('a message')\n    print('text')\n"
    line = f"{script(tmp_path, code)} {how}"
    returned, err = STREAMS[how]
    text = "text\n" if returned == 0 else ""
    message = "a message\n" if err and returned else ""
    assert shell(line, tmp_path, PYTHONUNBUFFERED=unbuffered) == (returned, text, message + err)


@pytest.mark.parametrize(
    ("program", "how", "code", "complaint"),
    [
        ("sample.py --help", ">/dev/full", 2, FULL),
        ("sample.py --help", "| head -c 3", 0, ""),
        ("train.py --help", ">&-", 2, CLOSED),
        ("train.py foo", "2>&- <&-", 2, ""),
        ("compare.py --help", ">&-", 2, CLOSED),
        ("sample.py -", "<&-", 2, "error: the prompt: stdin cannot be read: it is closed\n"),
    ],
)
def test_programs_lost_stdout_is_error(tmp_path, program, how, code, complaint):
    returned, out, err = shell(f"set -o pipefail; {sys.executable} {program} {how}", ROOT)
    assert (returned, err) == (code, complaint) and len(out) == (3 if "head" in how else 0)


def test_streams_closed_at_start_are_not_reused_by_files(tmp_path):
    code = "import os, subprocess\nwith open('file', 'w') as file:\n"
    code += "    subprocess.run(['sh', '-c', 'echo text; echo text >&2'])\n    os.write(2, b'text')\n"
    assert shell(f"{script(tmp_path, code)} <&- >&- 2>&-", tmp_path) == (0, "", "")
    assert (tmp_path / "file").read_bytes() == b""


def test_write_if_possible_lost_stdout_is_no_error(tmp_path):
    code = "with one_line_errors():\n    streams.print_stderr(str(streams.write_if_possible('x')))\n    print('y')\n"
    assert shell(f"{script(tmp_path, code)} >/dev/full", tmp_path) == (0, "", "[Errno 28] No space left on device\n")


@pytest.mark.parametrize("blocking", [True, False])
def test_stdin_that_a_parent_made_non_blocking_blocks_until_the_end(tmp_path, blocking):
    script(tmp_path, "import os, sys\nprint(os.get_blocking(0), flush=True)\nprint(sys.stdin.read())\n")
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, blocking)
        here = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, tmp_path / "script.py"]
        program = subprocess.Popen(command, env=here, stdin=reader, stdout=subprocess.PIPE, text=True)
        assert program.stdout.readline() == "True\n"
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.3)  # it reads, as there is nothing else to do
        os.write(writer, b"late")
        os.close(writer)
        assert program.communicate()[0] == "late\n"
        assert os.get_blocking(reader) == blocking
    finally:
        os.close(reader)


def test_streams_unencodable_characters_become_escapes(tmp_path):
    code = "import sys\nprint('é\\u6f22')\nprint('\\u6f22', file=sys.stderr)\n"
    line = f"{script(tmp_path, code)} | iconv -f latin1 -t utf8"
    for encoding, expected in {"ascii": "\\xe9", "latin-1": "\xe9", "ascii:strict": "\\xe9"}.items():
        found = shell(line, tmp_path, PYTHONIOENCODING=encoding)
        assert found == (0, f"{expected}\\u6f22\n", "\\u6f22\n"), encoding


def test_start_deleted_working_directory_is_one_line(tmp_path):
    line = f"mkdir gone; cd gone; rmdir ../gone; {PYTHON} {ROOT / 'train.py'}"
    returned, out, err = shell(line, tmp_path)
    assert (returned, out) == (2, "") and err.startswith("error: the working directory is gone (")


PROGRAMS = ["train.py", "sample.py x", "compare.py x", "-m training.run.replay x"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_start_missing_package_is_one_line(program):
    returned, out, err = shell(f"{PYTHON} -S {program}", ROOT)
    assert (returned, out, err.count("\n")) == (2, "", 1)
    assert re.search(r" has no package \w+(, which \S+\.py imports)?: ", err) and f"-m pip install -e {ROOT}\n" in err


WHILE_IMPORTING = """
import runpy, signal, sys
class Import:
    def find_spec(name, path=None, target=None):
        if name == {package!r}:
            try:
                signal.raise_signal({number})
            except BaseException:  # what some packages do
                raise ImportError
sys.meta_path.insert(0, Import)
sys.argv = {words!r}
{run}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("train.py", "common.streams"),
        ("train.py", "hydra"),
        ("sample.py", "common.cli"),
        ("compare.py", "common.cli"),
        ("training.run.replay", "torch"),
    ],
)
def test_signal_during_imports_ends_program_without_traceback(program, package, number):
    run = f"runpy.run_path({program!r}, run_name='__main__')"
    if "training" in program:
        run = f"runpy.run_module({program!r}, run_name='__main__', alter_sys=True)"
    code = WHILE_IMPORTING.format(package=package, number=int(number), words=[program, "x"], run=run)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=hear)
    word = "interrupted\n" if number == signal.SIGINT else ""
    assert (found.returncode, found.stdout, found.stderr) == (128 + number, "", word)


def hear() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_after_imports_runs_cleanup(tmp_path, number):
    code = "import os, signal\nprocess.end_by_unwinding()\nwith one_line_errors():\n"
    code += f"    try:\n        signal.raise_signal({int(number)})\n    finally:\n        print('removed')\n"
    word = "interrupted\n" if number == signal.SIGINT else ""
    assert shell(script(tmp_path, code), tmp_path) == (128 + number, "removed\n", word)


def test_signal_ignored_by_parent_stays_ignored(tmp_path):
    code = "import signal\nsignal.raise_signal(signal.SIGINT)\nprint('here')\n"
    assert shell(f"trap '' INT; {script(tmp_path, code)}", tmp_path) == (0, "here\n", "")


CONTROLLED = "a\x1b[31m\x07\x00\x7f\x9b\u202e\u2066\udcff\n\r\tb\u2028c[red]é漢🙂"
AS_SHOWN = "a\\x1b[31m\\x07\\x00\\x7f\\x9b\\u202e\\u2066\\udcff\\n\\r\\tb\\u2028c[red]é漢🙂"


def test_messages_show_control_characters_as_escapes(capsys):
    assert escaped(CONTROLLED) == str(UserError(CONTROLLED)) == AS_SHOWN
    assert escaped(AS_SHOWN) == AS_SHOWN and str(UserError(str(UserError(CONTROLLED)))) == AS_SHOWN
    streams.print_stderr(CONTROLLED)
    watch = ProgressLine(0, 1)
    watch.print_line(CONTROLLED)
    watch.print_text("two\nlines\x1b")
    streams.print_line(CONTROLLED)
    assert capsys.readouterr() == (f"{AS_SHOWN}\n", f"{AS_SHOWN}\n{AS_SHOWN}\ntwo\nlines\\x1b\n")


def test_show_text_is_escaped_only_on_terminal(monkeypatch):
    for terminal, shown in ((False, "a\x1b\t\nb\x9b\r"), (True, "a\\x1b\t\nb\\x9b\\r")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stdout", out)
        streams.show("a\x1b\t\nb\x9b\r")
        assert out.getvalue() == shown


def test_json_line_with_controls_decodes_to_same_value():
    line = streams.json_line({"text": CONTROLLED})
    assert json.loads(line) == {"text": CONTROLLED} and escaped(line) == line and "é漢🙂" in line


def test_print_stderr_long_word_is_shortened(capsys):
    streams.print_stderr("error: " + "x" * 100_000 + " is long")
    assert capsys.readouterr().err == f"error: {'x' * 100}[...]{'x' * 100} is long\n"
