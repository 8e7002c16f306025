"""What a parser says of words that are no arguments, and how it reads sizes."""

from argparse import ArgumentTypeError

import pytest

from common.cli import Parser, byte_count

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


def test_byte_count_reads_bytes_with_and_without_units():
    typed = {
        "1": 1,
        "5000000": 5_000_000,
        "5MB": 5_000_000,
        "4.5 GiB": 4.5 * 2**30,
        "4.1GB": 4_100_000_000,
        "1.1 kib": 1126,
        "2kb": 2_000,
        "7b": 7,
    }
    assert {text: byte_count(text) for text in typed} == typed


@pytest.mark.parametrize("text", ["", "0", "0.4", "-1", "5 apples", "MB", "1e3", "9" * 999, "4.9", "5 i", "1..2"])
def test_byte_count_refuses_what_is_no_number_of_bytes(text):
    with pytest.raises(ArgumentTypeError, match="is no number of bytes: write it as 500MB, 2GiB or 5000000"):
        byte_count(text)
