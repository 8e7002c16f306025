"""What the pages say is so: their links lead to the lines they name, and their numbers are the ones printed."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.attention_by_numbers import SECTIONS, show
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = {"crossover"}  # times, which no other run gives again


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_the_lines_they_name(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, line = target.partition("#L")
        file = (page.parent / path).resolve()
        assert file.exists(), f"{page.name} links {target}"
        if text.startswith("`") and file.suffix == ".py":
            assert line, f"{page.name}: {text} names no line of {path}"
            assert text.strip("`") in file.read_text().splitlines()[int(line) - 1], (
                f"{page.name}: {text} is not at {target}"
            )


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in MEASURED])
def test_the_numbers_of_the_page_are_those_that_are_printed(section, capsys):
    torch.manual_seed(0)
    show(section)
    printed = capsys.readouterr().out.strip()
    assert printed in (Path(ROOT) / "docs" / "attention.md").read_text()
