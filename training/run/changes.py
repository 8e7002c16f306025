"""Settings that may change on resume or in fine-tuning, as the marks of their fields state."""

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel

from common.settings import Change
from training.run.config import Run, dump, flatten_config
from training.run.parts import MODEL_PARTS

RESUMABLE = [name for name, field in Run.model_fields.items() if Change.ON_RESUME in field.metadata]


class Difference(NamedTuple):
    key: str  # as group.name
    before: object
    now: object


def change_of(run: Run, key: str) -> Change:
    """When a setting of the run, given as group.name, may change."""
    found, part = Change.NEVER, run
    for name in (["model"] if key.partition(".")[0] in MODEL_PARTS else []) + key.split("."):
        if not isinstance(part, BaseModel) or name not in type(part).model_fields:
            break
        marks = type(part).model_fields[name].metadata
        found = next((mark for mark in marks if isinstance(mark, Change)), found)
        part = getattr(part, name)
    return found


def is_place(key: str) -> bool:
    """Whether a setting is a location, of something that a hash or a fingerprint identifies."""
    return (key.startswith("data.") and key.endswith(".path")) or key in ("tokenizer.folder", "tokenizer.path")


def forbidden_differences(before: Run, now: Run, change: Change) -> Iterator[Difference]:
    """The settings that differ, and may not at such a change. Places are no differences: what is found there is known
    by its fingerprint."""
    old, new = flatten_config(dump(before)), flatten_config(dump(now))
    for key in {**new, **old}:
        moved = is_place(key) and key in old and key in new
        if old.get(key) != new.get(key) and not moved and change_of(before if key in old else now, key) < change:
            yield Difference(key, old.get(key), new.get(key))
