"""The site: mkdocs.yml names every page, links that leave docs/ lead somewhere, and what is built has no dead link."""

import importlib.util
import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from docs.site_links import MAP, code_page, file_of, linked, rewritten, uri_of

ROOT = Path(__file__).resolve().parents[2]


def pages_of(nav):
    """The sources that a nav names, in its order."""
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of(page) if isinstance(page, list) else [page]


def test_nav_names_every_page_once_and_nothing_else():
    named = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert [page for page in named if file_of(page) is None] == [] and len(set(named)) == len(named)
    assert {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")} <= {*named}


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("attention.md", "../model/cache.py", "repository/model/cache.py.md"),
        ("attention.md", "../model/cache.py#L7", "repository/model/cache.py.md#__codelineno-0-7"),
        ("studies/attention.md", "../../train.py", "../repository/train.py.md"),
        ("studies/attention.md", "../statistics.md", "../statistics.md"),
        ("attention.md", "../benchmarks", "repository/benchmarks/README.md"),
        ("repository/benchmarks/README.md", "../docs/decode.png", "../../decode.png"),
        ("repository/benchmarks/README.md", "results/recipe.json", "results/recipe.json"),
        ("attention.md", "#decoding", "#decoding"),
        ("attention.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("attention.md", "nowhere.md", "nowhere.md"),  # for mkdocs to refuse
    ],
)
def test_link_in_a_page_leads_to_a_source_of_the_site(page, link, expected):
    assert rewritten(f"a [text]({link}).", page, str) == f"a [text]({expected})."


def test_link_to_a_folder_without_a_page_becomes_its_text():
    assert rewritten("see [conf/](../conf) there", "attention.md", str) == "see conf/ there"


def test_page_that_shows_code_is_not_rewritten():
    page = uri_of(ROOT / "docs" / "rooms.py")
    assert page == "repository/docs/rooms.py.md" and rewritten("[a](../b.py)", page, str) == "[a](../b.py)"
    assert "\n".join(code_page(ROOT / "docs" / "rooms.py").splitlines()[-3:]).endswith("    main()\n~~~~~~~~")


def test_map_of_the_code_is_put_into_its_page():
    assert rewritten("![a map](rooms.svg)", "code_tour.md", lambda: "<div>drawn</div>") == "<div>drawn</div>"
    assert ROOT / "train.py" in linked(MAP)


class Links(HTMLParser):
    """The links of a page, what it loads, and what links to it may name."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        links = [found[name] for name in ("href", "src") if found.get(name)]
        self.links += links
        self.loaded += links if tag != "a" else []
        self.names |= {found[name] for name in ("id", "name") if found.get(name)}


def links_of(site: Path) -> dict[str, Links]:
    found = [page for page in site.rglob("*.html") if page.name != "404.html"]  # whose links are the server's
    return {page.relative_to(site).as_posix(): Links(page) for page in found}


def dead_links(site: Path, pages: dict[str, Links]) -> list[str]:
    return [f"{page}: {link}" for page in pages for link in pages[page].links if is_dead(site, pages, page, link)]


def is_dead(site: Path, pages: dict[str, Links], page: str, link: str) -> bool:
    if link.startswith(("http:", "https:", "data:", "javascript:")):
        return False
    path, _, name = unquote(link).partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    return not (site / target).exists() or (target in pages and name not in pages[target].names)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material"))), reason="mkdocs is not installed: make docs does it"
)
def test_site_has_no_warning_no_dead_link_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "index.html").is_file() and (tmp_path / "repository/model/cache.py.html").is_file()
    pages = links_of(tmp_path)
    assert dead_links(tmp_path, pages) == []
    assert {link for page in pages.values() for link in page.loaded if link.startswith("http")} == set()
