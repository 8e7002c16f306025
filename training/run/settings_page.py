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
from common.settings import Change
from model.attention.base import AttentionConfig
from model.dimensions import Dimensions
from model.transformer import ModelConfig
from training.run.composer import choice
from training.run.config import OF_COMMANDS, Run, flatten_config
from training.run.parts import MODEL_PARTS, RUN_PARTS, resolve_target

OPENING = """# Settings

Every setting of [conf/](../conf), with its default and what it does: `key=value` for a setting of the run,
`group.key=value` for one of a group's choice, `group=choice` to choose. *May change* says when a setting may differ
from what a run was started with: when it is resumed (`resume=`), when another run is fine-tuned from it
(`init_from=`), or never. Made by `python -m training.run.settings_page > docs/settings.md`.
"""
PACKAGE = "# @package"
CHANGES = {Change.NEVER: "never", Change.FINE_TUNING: "fine-tuning", Change.ON_RESUME: "resume, fine-tuning"}
HEADER = ["| setting | default | choices | may change | meaning |", "|---|---|---|---|---|"]
PARTS = MODEL_PARTS | RUN_PARTS


class Setting(NamedTuple):
    default: str
    meaning: str  # its comment in the file


def page() -> str:
    sections = groups()
    sections.insert(1, sections.pop(sections.index("mask")))  # whose settings are the attention's
    run = settings_of(CONF / "train.yaml")
    rows = [_row(key, one.default, "", _change_of(Run, key), one.meaning) for key, one in run.items()]
    return "\n".join([OPENING, "## The run", "", *HEADER, *rows, *(_group(group) for group in sections)])


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
        values = [value.strip() for value, _, _ in lines if value.strip()]
        default = values[0] if len(values) == 1 else f"{{{', '.join(values)}}}"
        comments = [_named(value, comment) if len(values) > 1 else comment.strip() for value, _, comment in lines]
        yield key, Setting(default, ("; " if len(values) > 1 else " ").join(filter(None, comments)))


def _named(value: str, comment: str) -> str:
    """The comment of a key within a key, behind its name."""
    name = value.partition(":")[0].strip()
    return f"{name}: {comment}" if name and comment else comment


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
    rows = list(_rows(group, names))
    return "\n".join(["", f"## {group}", "", *lines, *(["", *HEADER, *rows] if rows else [])])


def _rows(group: str, names: list[str]) -> Iterator[str]:
    """A row for each setting; several, where choices differ in its default or in what it means."""
    found: dict[str, dict[Setting, list[str]]] = {}
    for name in names:
        for key, setting in settings_of(CONF / group / f"{name}.yaml").items():
            found.setdefault(key, {}).setdefault(setting, []).append(name)
    for key, settings in found.items():
        for setting, having in settings.items():
            of_choices = "" if having == names else ", ".join(having)
            change = _change_of(_class_of(group, having[0]), key, group)
            package = "attention" if group == "mask" else group
            yield _row(f"{package}.{key}", setting.default, of_choices, change, setting.meaning)


def _class_of(group: str, name: str) -> type:
    if group == "model":
        return Dimensions
    return AttentionConfig if group == "mask" else resolve_target(choice(group, name)["_target_"], PARTS[group], group)


def _change_of(cls: type, key: str, group: str | None = None) -> str:
    """When a field may change: as it is marked, or else as its group is."""
    if key in OF_COMMANDS:  # they are not stored
        return ""
    holders = ModelConfig.model_fields | Run.model_fields
    fields = [cls.model_fields[key], *([holders[group]] if group in holders else [])]
    marks = (mark for field in fields for mark in field.metadata if isinstance(mark, Change))
    return CHANGES[next(marks, Change.NEVER)]


def _row(key: str, default: str, of_choices: str, change: str, meaning: str) -> str:
    return f"| `{key}` | {_code(default)} | {of_choices} | {change} | {_cell(meaning)} |"


def _set_by(path: Path) -> str:
    tree = yaml.safe_load(path.read_text())
    chosen = {group.removeprefix("override /"): name for one in tree.pop("defaults", []) for group, name in one.items()}
    return ", ".join(f"`{key}={value}`" for key, value in {**chosen, **flatten_config(tree)}.items())


def _defaults() -> list[dict[str, str]]:
    return [entry for entry in yaml.safe_load((CONF / "train.yaml").read_text())["defaults"] if isinstance(entry, dict)]


def _code(value: str) -> str:
    return "to be given" if value == "???" else f"`{_cell(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page())
