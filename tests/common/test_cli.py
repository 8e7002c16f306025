"""What a parser says of words that are no arguments."""

import pytest

from common.cli import Parser

SLIPS = [
    (["--tempratur", "1"], "--temperature"),
    (["--tempratur=1"], "--temperature"),
    (["-temprature"], "--temperature"),
    (["--top-k", "3", "--max_new_tokns", "3"], "--max-new-tokens"),
    (["--outptu", "x"], "--output"),
    (["--zzz"], None),
    (["x"], None),
    (["--", "--tempratur"], None),
]


def test_parse_args_names_the_flag_that_a_slip_was_meant_for(capsys):
    parser = Parser(prog="sample.py")
    for flags in (["--temperature"], ["--max-new-tokens"], ["--top-k"], ["-o", "--output"]):
        parser.add_argument(*flags)
    for typed, meant in SLIPS:
        with pytest.raises(SystemExit):
            parser.parse_args(typed)
        line = capsys.readouterr().err
        assert line.startswith("error: unrecognized arguments: ") and line.count("\n") == 1
        assert (f": did you mean {meant}? (" in line) if meant else "did you mean" not in line, typed
