"""report.md."""

import re
from dataclasses import replace

import pytest

from ablation.pages.markdown import code, markdown, text
from tests.ablation import support

PICTURES = {"curves.png": "Loss [curves]"}


@pytest.mark.parametrize("name", support.ALL)
def test_markdown_tables_have_as_many_cells_in_every_row(name):
    made = markdown(support.ALL[name](), PICTURES)
    tables = re.findall(r"(?:^\|.*\|\n)+", made, re.M)
    assert len(tables) >= 3
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


def test_markdown_has_every_part_of_the_report():
    made = markdown(replace(support.broken(), hypothesis="MLA wins"), PICTURES)
    headings = re.findall("^#+ .*", made, re.M)
    assert headings == [
        "# made-up",
        "## Summary",
        "## What limits this",
        "## Without a result",
        "## Results",
        "## Budgets and speed",
        "## Statistics",
        "## What differs in the settings",
        "## Every run",
        "## Environment",
        "## Command",
    ]
    assert "> **Hypothesis:** MLA wins" in made and "![Loss \\[curves\\]](curves.png)" in made
    assert "| `attention=mla,seed=5` | diverged | diverged at step 120 | `sweeps/x/5` |" in made
    assert "```sh\npython train.py -m attention=mha,gqa,mqa,mla seed=1,2,3 match=params\n```" in made


def test_markdown_gives_rounded_differences_and_losses_of_runs():
    report = support.four()
    made = markdown(report, {})
    shown = ["−0.0200", "−0.0331 to −0.0069", "0.0156", "0.0312", "0.0211", "0.0093", "0.0081", "6", "3"]
    assert f"| `attention=gqa` | {' | '.join(shown)} | paired, pooled sd |".replace(" to ", "\xa0to\xa0") in made
    for cell in report.cells:
        assert f"| `{cell.name}` | finished | {cell.val_bpb:.4f} | {cell.val_loss:.4f} | `{cell.folder}` |" in made
    assert not re.search(r"\\[.+]|\d\.\d{7}", made)


def test_markdown_of_names_like_markup_escapes_them():
    assert text("<b>$x_1$ *a* `c` [d](e) | @me & # ~") == (
        "&lt;b\\>&#36;x\\_1&#36; \\*a\\* \\`c\\` \\[d\\](e) \\| &#64;me &amp; \\# \\~"
    )
    assert [text("1. a"), text("12) a"), text("- a"), text("+ a"), text("---")] == [
        "1\\. a",
        "12\\) a",
        "\\- a",
        "\\+ a",
        "\\---",
    ]
    numbers = ["+0.5", "−0.5 to 1.5", "2.108 ± 0.002"]
    assert list(map(text, numbers)) == numbers
    assert [code("a`b"), code("`a"), code("a|b"), code("")] == ["``a`b``", "`` `a ``", "`a\\|b`", ""]
    assert "\x1b" not in markdown(support.weird(), {})


def test_markdown_of_a_command_with_backticks_stays_in_its_block():
    made = markdown(replace(support.four(), command="a ```` b"), {})
    assert "\n`````sh\na ```` b\n`````" in made
