"""docs/settings.md, made of conf/: every group, its choices, and every setting with its default and its comment.

python -m training.run.settings_page > docs/settings.md
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from common.conf_files import NO_SETTINGS, choices, groups
from common.invocation import CONF
from training.run.config import flatten_config

OPENING = """# Settings

Every setting of [conf/](../conf), with its default and what it does: `key=value` for a setting of the run,
`group.key=value` for one of a group's choice, `group=choice` to choose. Made by
`python -m training.run.settings_page > docs/settings.md`.
"""
PACKAGE = "# @package"


class Setting(NamedTuple):
    default: str
    meaning: str  # its comment in the file


def page() -> str:
    run = settings_of(CONF / "train.yaml")
    rows = [f"| `{key}` | {_code(one.default)} | {_cell(one.meaning)} |" for key, one in run.items()]
    table = "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])
    return "\n".join([OPENING, "## The run", "", table, *(_group(group) for group in groups())])


def settings_of(path: Path) -> dict[str, Setting]:
    """A file's own settings, and those that it takes over from others of its folder, whose comments count where its own
    line has none."""
    found = {}
    for entry in yaml.safe_load(path.read_text()).get("defaults", []):
        if isinstance(entry, str) and entry.endswith("@_here_"):
            found |= settings_of(path.parent / f"{entry.removesuffix('@_here_')}.yaml")
    for key, setting in _own(path.read_text()):
        inherited = found[key].meaning if key in found else ""
        found[key] = Setting(setting.default, setting.meaning or inherited)
    return found


def heading_of(path: Path) -> str:
    """The comment that a file begins with."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith(PACKAGE)]
    comments = []
    while lines and lines[0].startswith("#"):
        comments.append(lines.pop(0).lstrip("# "))
    return " ".join(comments)


def _own(text: str) -> Iterator[tuple[str, Setting]]:
    """Each top-level key of a YAML file with its value as it is written, and its comment, which may go on in lines of
    its own."""
    for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE):
        key, colon, rest = block.partition(":")
        if not colon or key in NO_SETTINGS or not key.isidentifier():
            continue
        lines = [line.partition("# ") for line in rest.strip().splitlines() if line.strip()]
        default = " ".join(value.strip() for value, _, _ in lines if value.strip())
        yield key, Setting(default, " ".join(comment.strip() for _, _, comment in lines if comment))


def _group(group: str) -> str:
    names = choices(group)
    usual = {one: name for entry in _defaults() for one, name in entry.items()}.get(group)
    lines = [
        f"- `{group}={name}`{', the default' if name == usual else ''}: {heading_of(CONF / group / f'{name}.yaml')}"
        for name in names
    ]
    if group in ("experiment", "position"):  # which set what is explained elsewhere
        lines = [
            f"{line} Sets {_set_by(CONF / group / f'{name}.yaml')}." for line, name in zip(lines, names, strict=True)
        ]
        return "\n".join(["", f"## {group}", "", *lines])
    of_choices = {name: settings_of(CONF / group / f"{name}.yaml") for name in names}
    meanings: dict[str, dict[str, None]] = {}  # of each key, in order: choices may differ in what it means
    for settings in of_choices.values():
        for key, one in settings.items():
            meanings.setdefault(key, {})[one.meaning] = None
    keys = [(key, meaning) for key, found in meanings.items() for meaning in found]
    package = "attention" if group == "mask" else group
    rows = [
        f"| `{package}.{key}` | {_defaults_cell(key, meaning, of_choices)} | {_cell(meaning)} |"
        for key, meaning in keys
    ]
    table = ["", "| setting | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join(["", f"## {group}", "", *lines, *table])


def _set_by(path: Path) -> str:
    tree = yaml.safe_load(path.read_text())
    chosen = {group.removeprefix("override /"): name for one in tree.pop("defaults", []) for group, name in one.items()}
    return ", ".join(f"`{key}={value}`" for key, value in {**chosen, **flatten_config(tree)}.items())


def _defaults() -> list[dict[str, str]]:
    return [entry for entry in yaml.safe_load((CONF / "train.yaml").read_text())["defaults"] if isinstance(entry, dict)]


def _defaults_cell(key: str, meaning: str, of_choices: dict[str, dict[str, Setting]]) -> str:
    """The default, and of which choices, where it is not of all."""
    having: dict[str, list[str]] = {}
    for name, settings in of_choices.items():
        if key in settings and settings[key].meaning == meaning:
            having.setdefault(settings[key].default, []).append(name)
    if [*having.values()] == [[*of_choices]]:
        return _code(next(iter(having)))
    return "; ".join(f"{_code(default)} {', '.join(names)}" for default, names in having.items())


def _code(value: str) -> str:
    return "to be given" if value == "???" else f"`{_cell(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page())
