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


def test_markdown_gives_differences_and_losses_of_runs_in_all_digits():
    report = support.four()
    made = markdown(report, {})
    for found in report.comparison.differences.values():
        for number in (found.mean, *found.interval, found.p, found.p_corrected, found.detectable):
            assert repr(number) in made
    for cell in report.cells:
        assert f"| {cell.val_bpb!r} | {cell.val_loss!r} |" in made


def test_markdown_takes_no_name_for_markup():
    assert text("<b>$x_1$ *a* `c` [d](e) | @me & # ~") == (
        "&lt;b\\>&#36;x\\_1&#36; \\*a\\* \\`c\\` \\[d\\](e) \\| &#64;me &amp; \\# \\~"
    )
    assert [text("1. a"), text("- a"), text("+0.5"), text("−0.5 to 1.5")] == [
        "1\\. a",
        "\\- a",
        "\\+0.5",
        "−0.5 to 1.5",
    ]
    assert [code("a`b"), code("`a"), code("a|b"), code("")] == ["``a`b``", "`` `a ``", "`a\\|b`", ""]
    assert "\x1b" not in markdown(support.weird(), {})


def test_markdown_of_a_command_with_backticks_stays_in_its_block():
    made = markdown(replace(support.four(), command="a ```` b"), {})
    assert "\n`````sh\na ```` b\n`````" in made
