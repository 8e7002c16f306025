"""Composing conf/ with Hydra: whole configurations, and single choices of a group for parts of stacks and mixes.

Hydra is imported where it composes, and not with this module: the command lines answer --help without it.
"""

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

from common.cli import one_line_errors
from common.conf_files import content, hydra_initialized
from common.hydra_errors import one_line_hydra_errors, plain_tree
from common.overrides import hydra_arguments


def compose_tree(*overrides: str) -> dict[str, Any]:
    """The tree of plain values that `python train.py *overrides` trains with. Raises UserError in the words of the
    command line."""
    from hydra import compose

    with hydra_initialized(), one_line_hydra_errors(overrides):
        return plain_tree(compose("train", hydra_arguments(overrides)))


def asks_hydra_itself(words: Sequence[str]) -> bool:
    """Whether words of the command line are Hydra's flags or settings, which hydra.main minds."""
    return any(re.match(r"-|[+~]*hydra\b", word) for word in words)


def compose_request(words: Sequence[str]) -> dict[str, Any]:
    """What train.py trains with, of overrides of its own settings alone: hydra.main would compose them twice, a sixth
    of a second each. Raises what Hydra raises."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    with hydra_initialized():
        cfg = compose("train", list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return request_of(cfg)


def request_of(cfg: Any) -> dict[str, Any]:
    """The composed tree, the overrides that were typed, and the choice of each group, of what Hydra composed."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    with one_line_errors():
        tree = plain_tree(cfg)
    return {"tree": tree, "typed": list(hydra_config.overrides.task), "choices": dict(hydra_config.runtime.choices)}


def merged(*overrides: str) -> list[str]:
    """The overrides; of several of one setting, which train.py refuses, the last."""
    return list({override.lstrip("+").partition("=")[0]: override for override in overrides}.values())


def choice(group: str, name: str) -> dict[str, Any]:
    """One of a group's choices, as Hydra composes it without the rest of a run: a value to be given yet is '???', and
    what refers to other settings is left as it is written."""
    return copy.deepcopy(_choice(group, name))


@functools.cache
def _choice(group: str, name: str) -> dict[str, Any]:
    found = content(group, name)
    if "defaults" not in found:  # all there is to compose, without Hydra's fifth of a second, which sample.py saves
        return found
    from hydra import compose
    from omegaconf import OmegaConf

    with hydra_initialized():
        return OmegaConf.to_container(compose(f"{group}/{name}")[group])
