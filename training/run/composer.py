"""conf/ is read here, by Hydra: whole configurations, and single choices of a group for parts of stacks and mixes.

Hydra is imported where it composes, and not with this module: the command lines answer --help without it.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.cli import check_each_once, plain_tree, with_stored_choices
from common.overrides import hydra_arguments
from common.suggestions import CONF


def compose_tree(*overrides: str) -> dict[str, Any]:
    """The tree of plain values that `python train.py *overrides` trains with. Raises UserError, or Hydra's own error
    for a choice or a setting that does not exist."""
    from hydra import compose

    check_each_once(overrides)
    with _hydra():
        return plain_tree(compose("train", hydra_arguments(with_stored_choices(overrides))))


def merged(*overrides: str) -> list[str]:
    """The overrides; of several of one setting, which train.py refuses, the last."""
    return list({override.lstrip("+").partition("=")[0]: override for override in overrides}.values())


def choices(group: str) -> list[str]:
    """What a group offers: the files of its folder under conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def choice(group: str, name: str) -> dict[str, Any]:
    """One of a group's choices, as Hydra composes it without the rest of a run: a value to be given yet is '???', and
    what refers to other settings is left as it is written."""
    return copy.deepcopy(_choice(group, name))


@functools.cache
def _choice(group: str, name: str) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    if (
        "defaults" not in found
    ):  # the file is all there is to compose, and Hydra a fifth of a second that sample.py saves
        return found
    from hydra import compose
    from omegaconf import OmegaConf

    with _hydra():
        return OmegaConf.to_container(compose(f"{group}/{name}")[group])


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra's compose API over conf/. Within hydra.main it leaves that one's Hydra as it was."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
