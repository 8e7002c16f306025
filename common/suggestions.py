"""A setting that does not exist, and what its name may have been meant to be, as far as conf/ and the command line
tell. Imports nothing heavy."""

import difflib
import re
import sys
from pathlib import Path

from common.invocation import CONF, command


def no_such_setting(key: str) -> str:
    """One line: the settings there are where `key` (group.name, or a name at the top) was looked for, and the nearest
    one, which another choice of the group may have."""
    chosen, top = _chosen(), [*_defaults(CONF / "train.yaml"), *_keys(CONF / "train.yaml")]
    group, _, name = key.rpartition(".")
    if group in chosen:
        valid, where = _keys(chosen[group]), f" of {group}={chosen[group].stem}"
        nearest = _nearest(name, [*valid, *(other for path in _files(group) for other in _keys(path))])
        if nearest not in (None, *valid):
            others = " or ".join(path.stem for path in _files(group) if nearest in _keys(path))
            meant = "it" if nearest == name else f"did you mean {nearest}? It"
            return f"{key}: no such setting{where}; {meant} belongs to {group}={others}"
    elif group:  # so the nearest of all there are
        everywhere = [f"{other}.{name}" for other, path in chosen.items() for name in _keys(path)]
        nearest = _nearest(key, [*everywhere, *top])
        return f"{key}: no such setting; {_hint(nearest)}{command('train.py', '--help')} lists them"
    else:
        valid, where, nearest = top, "", _nearest(name, top)
    return f"{key}: no such setting{where}; {_hint(nearest)}valid: {', '.join(valid) or 'none'}"


def _hint(nearest: str | None) -> str:
    return f"did you mean {nearest}? " if nearest else ""


def _nearest(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def _chosen() -> dict[str, Path]:
    """Each group with the file of its choice: as typed, else as an experiment or a model says, else the default one."""
    found = _defaults(CONF / "train.yaml")
    typed = dict(re.findall(r"^\+*(\w+)=(\w+)", "\n".join(sys.argv[1:]), re.MULTILINE))  # of a sweep, its first
    experiment = CONF / "experiment" / f"{typed.get('experiment')}.yaml"
    if experiment.is_file():
        found |= _defaults(experiment)
    model = CONF / "model" / f"{typed.get('model', found['model'])}.yaml"
    if model.is_file():
        found = found | _defaults(model) | (_defaults(experiment) if experiment.is_file() else {})
    paths = {group: CONF / group / f"{typed.get(group, choice)}.yaml" for group, choice in found.items()}
    return {group: path for group, path in paths.items() if path.is_file()}


def _defaults(path: Path) -> dict[str, str]:
    """The choices that a file's defaults list makes."""
    entries = (entry for entry in _read(path).get("defaults", []) if isinstance(entry, dict))
    found = {
        group.removeprefix("override /").partition("@")[0]: choice
        for entry in entries
        for group, choice in entry.items()
    }
    return {group: choice for group, choice in found.items() if group.isidentifier()}  # no group of Hydra's own


def _files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def _keys(path: Path) -> list[str]:
    """Those of a file, and those that it takes over from others of its folder."""
    own = [key for key in _read(path) if key not in ("defaults", "hydra", "_target_")]
    shared = [entry for entry in _read(path).get("defaults", []) if str(entry).endswith("@_here_")]
    taken = (key for entry in shared for key in _keys(path.parent / f"{entry.removesuffix('@_here_')}.yaml"))
    return list(dict.fromkeys((*own, *taken)))


def _read(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text())
