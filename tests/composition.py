"""Configurations for tests, which want hundreds: Hydra reads each file, and composes its own settings and each set of
choices, once, without what it prepares for defaults that refer to others, and a plain value is set in what it composed.
Held equal to Hydra's own in tests/training/run/test_composer.py."""

import copy
import functools
import itertools
import pickle
import re
from collections.abc import Sequence
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from omegaconf import flag_override

from common.conf_files import is_group
from common.suggestions import mask_settings
from training.run.composer import compose_request, compose_tree

WHOLE = r"(?:0|[1-9]\d{0,17})"  # with another 0 before it, Hydra takes it for text
NUMBER = rf"(?P<whole>-?{WHOLE})|(?P<number>-?{WHOLE}\.\d+|{WHOLE}e-\d+)"
PLAIN = re.compile(rf"(?P<key>[a-z_0-9]+(\.[a-z_0-9]+)*)=({NUMBER}|(?P<word>[A-Za-z_][\w.-]*(/[\w.-]+)*))")
WORDS = {"null": None, "true": True, "false": False}
# To which other settings refer, and without which nothing is composed.
EARLY = ("cache_dir", "data.path", "data.parts", "optim.name")

READ: dict[tuple, bytes] = {}  # what Hydra read, by the places it looked in and the name
HYDRA_SETTINGS: dict[tuple, bytes] = {}  # Hydra's own, composed, by the places and the choices


def places_of(repository: CachingConfigRepository) -> tuple[str, ...]:
    return tuple(source.path for source in repository.get_sources())


def read_once(repository: CachingConfigRepository, config_path: str) -> Any:
    """What Hydra's own cache gives within one composition, given to the others too: to read takes a third of one."""
    at = (*places_of(repository), config_path)
    if at not in READ:
        READ[at] = pickle.dumps(ORIGINALS[CachingConfigRepository, "load_config"](repository, config_path))
    name = f"config_path={config_path}"
    if name not in repository.cache:
        repository.cache[name] = pickle.loads(READ[at])
    return repository.cache[name]


def choices_if_referred_to(overrides: Any, defaults: list, self_added: bool) -> Any:
    """What defaults may refer to, only where one does: to list it for each file takes a quarter of a composition."""
    referring = any(default.is_interpolation() for default in defaults)
    return ORIGINALS[defaults_list, "_create_interpolation_map"](overrides, defaults, self_added) if referring else None


def merge_onto_hydra_settings(loader: ConfigLoaderImpl, defaults: list, repo: CachingConfigRepository) -> Any:
    """Hydra's own settings, which it merges first, are merged once: they take as long as all of ours."""
    merge = ORIGINALS[ConfigLoaderImpl, "_compose_config_from_defaults_list"]
    own = list(itertools.takewhile(lambda default: default.config_path.startswith("hydra/"), defaults))
    at = (*places_of(repo), *((default.config_path, default.package) for default in own))
    if at not in HYDRA_SETTINGS:
        HYDRA_SETTINGS[at] = pickle.dumps(merge(loader, own, repo))
    hydra_settings, merged = pickle.loads(HYDRA_SETTINGS[at]).hydra, merge(loader, defaults[len(own) :], repo)
    hydra_settings.merge_with(merged.get("hydra", {}))
    with flag_override(merged, "no_deepcopy_set_nodes", True):
        merged.hydra = hydra_settings
    return merged


def copy_shallowly(repository: CachingConfigRepository, delegate: Any) -> None:
    """Other sources take the place of those of the copy and leave the original's."""
    repository.delegate, repository.cache = copy.copy(delegate), {}


FAST = {
    (CachingConfigRepository, "__init__"): copy_shallowly,
    (CachingConfigRepository, "load_config"): read_once,
    (defaults_list, "_create_interpolation_map"): choices_if_referred_to,
    (ConfigLoaderImpl, "_compose_config_from_defaults_list"): merge_onto_hydra_settings,
}
ORIGINALS = {(place, name): getattr(place, name) for place, name in FAST}


def compose_fast(fast: bool = True) -> None:
    """Let Hydra compose so, or as it does by itself."""
    for (place, name), function in (FAST if fast else ORIGINALS).items():
        setattr(place, name, function)


compose_fast()


@functools.lru_cache(maxsize=1000)
def _tree(*words: str) -> bytes:
    return pickle.dumps(compose_tree(*words))


@functools.lru_cache(maxsize=1000)
def _request(*words: str) -> bytes:
    return pickle.dumps(compose_request(words))


def tree_of(*words: str) -> dict[str, Any]:
    """As `compose_tree`, to be changed at will."""
    tree = pickle.loads(_tree(*composed_by_hydra(words)))
    return tree if _set_all(tree, words) else pickle.loads(_tree(*words))


def request_of(words: Sequence[str]) -> dict[str, Any]:
    """As `compose_request`, to be changed at will."""
    request = pickle.loads(_request(*composed_by_hydra(words)))
    plain = _set_all(request["tree"], words)
    return request | {"typed": list(words)} if plain else pickle.loads(_request(*words))


def composed_by_hydra(words: Sequence[str]) -> list[str]:
    """Those that Hydra must see: all, where one refers to others."""
    if any("${" in word for word in words):
        return list(words)
    return [word for word in words if _plain(word) is None]


def _plain(word: str) -> tuple[str, Any] | None:
    """The setting and the value of a word that needs no Hydra; None for another."""
    found = PLAIN.fullmatch(word)
    if found is None or is_group(found["key"]) or found["key"].startswith(EARLY):
        return None
    if found["word"] is None:
        return found["key"], int(found["whole"]) if found["whole"] else float(found["number"])
    if found["word"].lower() in (*WORDS, "nan", "inf") and found["word"] not in WORDS:
        return None
    return found["key"], WORDS.get(found["word"], found["word"])


def _set_all(tree: dict[str, Any], words: Sequence[str]) -> bool:
    """Set the plain values; False where one is of no setting, or of one that is not plain."""
    for key, value in filter(None, map(_plain, words)):
        *path, name = key.split(".")
        section = functools.reduce(lambda at, step: at.get(step) if isinstance(at, dict) else None, path, tree)
        missing = None if key in mask_settings() and "parts" not in section else {}  # a mask's settings are added
        if not isinstance(section, dict) or isinstance(section.get(name, missing), dict | list):
            return False
        section[name] = value
    return True
