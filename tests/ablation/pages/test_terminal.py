"""The report in the terminal."""

import pytest
from rich.cells import cell_len

from ablation.pages.terminal import terminal
from tests.ablation import support


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_terminal_fits_its_width(width):
    for name in ("four", "many", "two_runs", "broken"):
        lines = terminal(support.ALL[name](), width).splitlines()
        assert max(map(cell_len, lines)) <= width, name


def test_terminal_has_results_first_then_budgets_then_words():
    said = terminal(support.broken(), 100)
    order = [
        "made-up",
        "val bpb",
        "95 % interval, uncorrected",
        "verdict",
        "cache B/token",
        "Of 4 variants",
        "Note: Seeds 4",
        "Without a result:",
    ]
    places = [said.index(word) for word in order]
    assert places == sorted(places)
    rows = {line.split()[0]: line for line in said.splitlines()[2:8] if line}
    assert rows["gqa"].split(maxsplit=4)[1:4] == ["1.5840", "±", "0.0020"]
    assert "−0.0331 to −0.0069  better, p = 0.031" in rows["gqa"] and "baseline" in rows["mha"]
    assert "  attention=mla,seed=5: diverged at step 120\n" in said
    assert "  attention=mla,seed=4: failed, exit code 2\n" in said and "attention=mha,seed=5: missing\n" in said
    assert said.endswith(f"  attention=mha,seed=6: altered, {support.ALTERED}\n")


def test_terminal_columns_are_aligned_under_wide_names():
    lines = terminal(support.weird(), 140).splitlines()
    starts = {cell_len(line[: line.index(" ± ")]) for line in lines[4:] if " ± " in line and "ends lowest" not in line}
    assert len(starts) == 1


def test_terminal_prints_names_as_they_are_but_no_control_characters():
    said = terminal(support.weird(), 100)
    for name in ["$x_1$", "_a", "<b>", "a&b|`c`", "漢字\\x1b[31m\\n", "b\\udcff", "[red]*q*[/red]"]:
        assert f"\n{name} " in said
    assert "\x1b" not in said
    said.encode()
    assert "".join(line for line in said.splitlines() if set(line) == {"x"}).startswith("x" * 58)


def test_terminal_without_a_comparison_has_no_columns_of_one():
    said = terminal(support.two_runs(), 100)
    assert "verdict" not in said and "memory" not in said and "difference" not in said and "calm-fox" in said
