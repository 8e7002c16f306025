"""Suggestions for misspelt settings ("did you mean"). Imports nothing heavy."""

import difflib
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.invocation import CONF, command

RENAMED = {  # settings, by their former names
    "most_skipped": "max_skipped_updates",
    "checkpoint_activations": "activation_checkpointing",
    "optim.logical_blocks": "optim.per_head",
}
MAX_SUGGESTED = 3


class Known(NamedTuple):
    """The settings and choices that exist."""

    choices: dict[str, str | None]  # by group
    settings: list[str]  # as group.name, and the names at the top

    def of_group(self, group: str) -> list[str]:
        """The settings of the group's choice, by their names."""
        return [key.removeprefix(f"{group}.") for key in self.settings if key.startswith(f"{group}.")]

    def at_the_top(self) -> list[str]:
        return [*self.choices, *(key for key in self.settings if "." not in key and key not in self.choices)]

    def named(self, name: str) -> list[str]:
        """The settings of this name in the groups."""
        return [key for key in self.settings if key.endswith(f".{name}")][:MAX_SUGGESTED]


def no_such_setting(key: str) -> str:
    """Return one line: that there is no `key` (group.name, or a name at the top), and the nearest setting there is."""
    if key in RENAMED:
        return renamed(key)
    known = known_settings()
    group, _, name = key.rpartition(".")
    if group in known.choices and known.of_group(group):
        return _not_of_choice(key, group, known)
    if group:
        nearest = _nearest(key, known.settings)
        return f"{key}: no such setting; {_hint(nearest)}{command('train.py', '--help')} lists them"
    return _not_at_the_top(name, known)


def renamed(key: str) -> str:
    """Return one line on a setting in RENAMED."""
    return f"{key} is called {RENAMED[key]} now: write {RENAMED[key]}="


@functools.cache
def mask_settings() -> tuple[str, ...]:
    """The settings of an attention that only mask=study shows, as attention.name; they can be set without it."""
    return tuple(f"attention.{name}" for name in _keys_of_file(CONF / "mask" / "study.yaml"))


def known_settings() -> Known:
    """Compose the choices on the command line (of a sweep, the first ones) without the settings."""
    from hydra.errors import HydraException

    choices = list(_typed_choices())
    try:
        return _composed(choices)
    except HydraException:  # one of them is at fault itself
        return _composed([])


def _typed_choices() -> Iterator[str]:
    for word in sys.argv[1:]:
        choice = re.fullmatch(r"\+*(\w+)=(\w+)(?:,.*)?", word)
        if choice and (CONF / choice[1]).is_dir():
            yield f"{choice[1]}={choice[2]}"
        elif word.startswith("hydra.searchpath="):
            yield word


def _composed(choices: list[str]) -> Known:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        tree = OmegaConf.to_container(compose("train", choices, return_hydra_config=True))
    chosen = tree.pop("hydra")["runtime"]["choices"]
    groups = {group: chosen[group] for group in reversed(chosen) if group.isidentifier()}  # none of Hydra's own
    settings = dict.fromkeys(_keys(tree))
    if groups["attention"] != "stack":  # whose parts have masks, not the whole
        settings |= dict.fromkeys(mask_settings())
    return Known(groups, list(settings))


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if key != "_target_":
            yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _not_of_choice(key: str, group: str, known: Known) -> str:
    name, valid = key.removeprefix(f"{group}."), known.of_group(group)
    others = {path.stem: _keys_of_file(path) for path in sorted((CONF / group).glob("*.yaml"))}
    nearest = _nearest(name, [*valid, *(other for keys in others.values() for other in keys)])
    where = f"no such setting of {group}={known.choices[group]}"
    if nearest is None or nearest in valid:
        return f"{key}: {where}; {_hint(nearest)}valid: {', '.join(valid)}"
    owners = " or ".join(choice for choice, keys in others.items() if nearest in keys)
    meant = "it" if nearest == name else f"did you mean {nearest}? It"
    return f"{key}: {where}; {meant} belongs to {group}={owners}"


def _keys_of_file(path: Path) -> list[str]:
    import yaml

    return [key for key in yaml.safe_load(path.read_text()) if key not in ("defaults", "_target_")]


def _not_at_the_top(name: str, known: Known) -> str:
    top, within = known.at_the_top(), known.named(name)
    nearest = _nearest(name, top)
    if not within and nearest is None:
        nearest_within = _nearest(name, [key.rpartition(".")[2] for key in known.settings])
        within = known.named(nearest_within) if nearest_within else []
    if within:
        return f"{name}: no such setting; did you mean {' or '.join(within)}?"
    return f"{name}: no such setting; {_hint(nearest)}valid: {', '.join(top)}"


def _hint(nearest: str | None) -> str:
    return f"did you mean {nearest}? " if nearest else ""


def _nearest(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)
