"""The files of conf/: groups, their choices, and the settings each file has. Hydra composes them, nothing else does.

Hydra is imported where it is needed, and not with this module: the command lines answer --help without it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.invocation import CONF

SHARED = "shared"  # a folder within a group's, of what several choices take over
NO_SETTINGS = ("defaults", "hydra", "_target_")
INHERITED = "@_here_"  # how a file's defaults mark what it takes over from another file of its group


def groups() -> list[str]:
    """The groups of choices: the folders."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def is_group(name: str) -> bool:
    return name.isidentifier() and (CONF / name).is_dir()


def choices(group: str) -> list[str]:
    """The choices of a group: the files of its folder, and of folders within it (study/attention)."""
    return list(_choices(group))


@functools.cache
def _choices(group: str) -> tuple[str, ...]:
    files = (path.relative_to(CONF / group).with_suffix("") for path in (CONF / group).rglob("*.yaml"))
    return tuple(sorted(file.as_posix() for file in files if file.parts[0] != SHARED))


def content(group: str, choice: str) -> dict[str, Any]:
    """The YAML of one choice, as it is written."""
    import yaml

    return yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())


def keys(group: str, choice: str) -> list[str]:
    """The settings of one choice, those included that it takes over from other files of its group."""
    tree = content(group, choice)
    inherited = [one for one in tree.get("defaults", ()) if isinstance(one, str) and one.endswith(INHERITED)]
    found = [key for one in inherited for key in keys(group, one.removesuffix(INHERITED))]
    return list(dict.fromkeys([*found, *(key for key in tree if key not in NO_SETTINGS)]))


@contextmanager
def hydra_initialized() -> Iterator[None]:
    """Hydra's compose API over conf/. Within hydra.main it leaves that one's Hydra as it was."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF), job_name="train"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
