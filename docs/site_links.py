"""mkdocs calls this when it builds the site: links that leave docs/ lead to pages of the site, and none is dead.

A file outside of docs/ that a page links becomes one under repository/: code with its lines numbered, all else as it
is. A link to a folder leads to its README.md; where it has none, its text stays. The map of the code becomes part of
its page, so that the links in it work.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MAP = DOCS / "rooms.svg"
OUTSIDE = "repository/"  # the site's folder for files outside of docs/
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", "": "makefile"}  # of files that are shown as code
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")  # (! of a picture, text, target)
HREF = re.compile(r'href="([^"#][^":]*)"')  # of the map
CODE = """---
search: {{exclude: true}}
hide: [toc]
---

# `{name}`

~~~~~~~~ {{.{language} linenums="1"}}
{text}
~~~~~~~~
"""


def uri_of(file: Path) -> str | None:
    """The path of a repository's file in the site's sources; None for what has none: a folder, or no file at all."""
    if not file.is_file() or not file.is_relative_to(ROOT):
        return None
    name = file.relative_to(ROOT).as_posix()
    if file.suffix in LANGUAGES:
        return f"{OUTSIDE}{name}.md"
    return name.removeprefix("docs/") if file.is_relative_to(DOCS) else OUTSIDE + name


def file_of(uri: str) -> Path | None:
    """The repository's file of a page that may hold links; None for a page that shows code."""
    file = ROOT / uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS / uri
    return file if file.is_file() else None


def target_of(link: str, source: Path) -> Path:
    """What a relative link in a file leads to."""
    target = Path(os.path.normpath(source.parent / link.partition("#")[0]))
    return target / "README.md" if (target / "README.md").is_file() else target


def linked(source: Path) -> Iterator[Path]:
    """The repository's files and folders that one of its files links."""
    text = source.read_text()
    links = HREF.findall(text) if source == MAP else [link for _, _, link in LINK.findall(text)]
    for link in links:
        if not link.startswith("#") and (target := target_of(link, source)).exists():
            yield target


def rewritten(markdown: str, uri: str, draw_map: Callable[[], str]) -> str:
    """The Markdown of a page with links that lead to sources of the site. uri: of the page. draw_map: -> HTML."""
    source = file_of(uri)

    def replacement(found: re.Match[str]) -> str:
        picture, text, link = found.groups()
        target = target_of(link, source)
        if link.startswith("#") or not target.exists():
            return found[0]
        if target == MAP:
            return draw_map()
        place = uri_of(target)
        if place is None:
            return text
        line = re.sub("^L", "__codelineno-0-", link.partition("#")[2])
        relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{picture}[{text}]({relative}{line and '#'}{line})"

    if source is None:
        return markdown
    parts = FENCED.split(markdown)  # every other one is a block of code
    return "".join(part if i % 2 else LINK.sub(replacement, part) for i, part in enumerate(parts))


def on_files(files: Any, config: Any) -> Any:
    """Add what the pages link, and what that links in turn."""
    from mkdocs.structure.files import File

    waiting = [DOCS / page.src_uri for page in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        uri = uri_of(source)
        if uri is not None and files.get_file_from_path(uri) is None:
            content = {"content": code_page(source)} if source.suffix in LANGUAGES else {"abs_src_path": str(source)}
            files.append(File.generated(config, uri, **content))
        fresh = set(linked(source)) - seen if source.suffix == ".md" or source == MAP else ()
        seen |= {*fresh}
        waiting += fresh
    return files


def code_page(source: Path) -> str:
    name = source.relative_to(ROOT).as_posix()
    return CODE.format(name=name, language=LANGUAGES[source.suffix], text=source.read_text().rstrip())


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    from mkdocs.utils import get_relative_url

    def url(found: re.Match[str]) -> str:
        target = files.get_file_from_path(uri_of(target_of(found[1], MAP)))
        return f'href="{get_relative_url(target.url, page.url)}"'

    return rewritten(markdown, page.file.src_uri, lambda: f"<div>{HREF.sub(url, MAP.read_text())}</div>")
