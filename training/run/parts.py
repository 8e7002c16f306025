"""Choices of conf/'s groups, and parts of stacks and mixes: from trees of plain values to typed settings, and back.

YAML names a config class (`_target_: model.attention.mla.MLAConfig`). It is resolved here and nowhere else: Hydra's
`instantiate` would call anything a configuration names, and a checkpoint's configuration is somebody's file.
"""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from common.conf_files import choices
from common.errors import UserError
from common.invocation import ROOT
from common.suggestions import nearest
from data.sources.corpus import Corpus
from data.sources.mix import MixCorpus, Part
from data.tokenizers.base import TokenizerConfig
from model.attention.base import AttentionChoice, AttentionConfig
from model.attention.stack import StackConfig
from model.kernels.base import Kernel
from model.mlp import MLPConfig
from training.loggers.base import Logger
from training.optim.base import OptimConfig
from training.optim.schedule import Schedule
from training.parallel.config import Parallel
from training.run.composer import choice
from training.run.validation_errors import check_known, dotted, spelled, validated

MODEL_PARTS = {"attention": AttentionChoice, "mlp": MLPConfig, "kernel": Kernel}
RUN_PARTS = {
    "data": Corpus,
    "tokenizer": TokenizerConfig,
    "optim": OptimConfig,
    "schedule": Schedule,
    "logger": Logger,
    "parallel": Parallel,
}
HAVE_PARTS = {"attention": "stack", "data": "mix"}


def load_choice(group: str, name: str) -> Any:
    """One of a group's choices with its default settings, outside a run. Raises UserError for an unknown one."""
    if name not in choices(group):
        raise UserError(f"{group}={name}: choose one of {', '.join(choices(group))}")
    return pop_part({group: choice(group, name)}, group)


def resolve_target(target: Any, base: type, key: str) -> type[BaseModel]:
    """The class a `_target_` names: defined in a file of this project's own packages, and a kind of `base`."""
    problem = UserError(
        f"{key}._target_={target!r} names no {base.__name__} of this project: give module.Class, of a class that is "
        "defined in that module's file"
    )
    if not isinstance(target, str) or not re.fullmatch(r"(model|data|training)(\.[a-z_0-9]+)+\.[A-Za-z_0-9]+", target):
        raise problem
    module_name, _, class_name = target.rpartition(".")
    if not ROOT.joinpath(*module_name.split(".")).with_suffix(".py").is_file():
        raise problem
    found = vars(importlib.import_module(module_name)).get(class_name)
    defined_there = inspect.isclass(found) and found.__module__ == module_name
    if not defined_there or not issubclass(found, base) or inspect.isabstract(found):
        raise problem
    return found


def pop_part(tree: dict[str, Any], group: str) -> BaseModel:
    """Take a group's settings out of a tree -> its settings class. Raises UserError."""
    section = tree.pop(group, None)
    if not isinstance(section, Mapping):
        raise UserError(f"{group}={section!r}: choose one of {', '.join(choices(group))}")
    return _typed(dict(section), group, (MODEL_PARTS | RUN_PARTS)[group])


def _typed(section: dict[str, Any], key: str, base: type) -> BaseModel:
    cls = resolve_target(section.pop("_target_", None), base, key)
    if "parts" in section and key in HAVE_PARTS and "parts" not in cls.model_fields:
        raise UserError(f"{_first_setting(key, 'parts', section['parts'])}: parts are of {key}={HAVE_PARTS[key]}")
    if cls is MixCorpus and isinstance(section.get("parts"), Mapping):
        section["parts"] = {name: _mixed(f"{key}.parts.{name}", name, part) for name, part in section["parts"].items()}
    if cls is StackConfig:
        section |= _of_stack(key, section)
    if issubclass(cls, AttentionConfig):
        section = choice("mask", "sparse") | section  # off, where they are not in view
    return validated(cls, key, section)


def _first_setting(key: str, name: Any, value: Any) -> str:
    """As it was typed, of a tree of settings the first."""
    while isinstance(value, Mapping) and value:
        key = dotted(key, name)
        name, value = next(iter(value.items()))
    return f"{dotted(key, name)}={value!r}"


def _mixed(key: str, name: str, given: Any) -> Part:
    """A part of a mix, as typed (a quota, or a quota and settings of conf/data) or as dumped (a quota and a corpus)."""
    part = dict(given) if isinstance(given, Mapping) else {"quota": given}
    quota = {"quota": part.pop("quota")} if "quota" in part else {}
    corpus = part.pop("corpus", None)
    if not isinstance(corpus, Mapping):
        corpus, part = _chosen(key, "data", choices("data"), {"data": name} | part, besides=("quota",)), {}
    if not quota:
        raise UserError(f"{key}.quota is not set: give {key}.quota=...")
    return validated(Part, key, quota | part, {"corpus": _typed(dict(corpus), key, Corpus)})


def _of_stack(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The pattern and the parts of a stack. Its position is of all parts that do not say otherwise."""
    if not isinstance(section.get("pattern"), list):
        raise UserError(f"{key}.pattern={section.get('pattern')}: give a list of parts, as [local, local, global]")
    _check_no_mask(key, section)
    found: dict[str, Any] = {"pattern": tuple(section["pattern"])}  # YAML has no tuples
    if isinstance(section.get("parts"), Mapping):
        common = {"position": section["position"]} if "position" in section else {}
        found["parts"] = {name: _stacked(key, name, section["parts"], common) for name in section["parts"]}
    return found


def _check_no_mask(key: str, section: Mapping[str, Any]) -> None:
    switches = choice("mask", "sparse")
    given = [name for name in switches if name in section]
    if given:
        first = "mask=sparse" if len(given) == len(switches) else f"{key}.{given[0]}={spelled(section[given[0]])}"
        own = f"{key}.parts.{next(iter(section.get('parts') or ['local']))}.{given[0]}="
        raise UserError(f"{first} does not go with a stack, whose parts have their own masks: set it there, as {own}")


def _stacked(key: str, name: str, parts: Mapping[str, Any], common: Mapping[str, Any]) -> AttentionConfig:
    """A part of a stack, as typed (a choice of conf/attention and settings of it) or as dumped (with its class)."""
    given = parts[name]
    key = f"{key}.parts.{name}"
    part = {"attention": given} if isinstance(given, str) else given
    if not isinstance(part, Mapping) or not part.keys() & {"attention", "_target_"}:
        near = nearest(str(name), [str(other) for other in parts if other != name])
        meant = f"did you mean part {near}? Or " if near else ""
        raise UserError(f"{_first_setting('', key, given)}: {meant}choose its attention, as {key}.attention=gqa")
    settings = {**common, **part}
    if "attention" in part:
        offered = [one for one in choices("attention") if one != HAVE_PARTS["attention"]]
        settings = _chosen(key, "attention", offered, settings)
    return _typed(settings, key, AttentionConfig)


def _chosen(
    key: str, group: str, offered: Sequence[str], part: Mapping[str, Any], besides: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings of the choice of a group that `part` names, with those that `part` changes. besides: what the part
    has for settings that are not its choice's."""
    changes = dict(part)
    name = changes.pop(group)
    if name not in offered:
        there = "a part cannot be" if name in choices(group) else "there is no"
        raise UserError(f"{key}: {there} {group}={name}: choose one of {', '.join(offered)}, as {key}.{group}=")
    settings = choice(group, name) | changes
    cls = resolve_target(settings["_target_"], (MODEL_PARTS | RUN_PARTS)[group], key)
    check_known(cls, key, {name: value for name, value in settings.items() if name != "_target_"}, besides=besides)
    missing = [setting for setting, value in settings.items() if value == "???"]
    if missing:
        raise UserError(f"{key}.{missing[0]} is not set: give it a value")
    return settings


def dump_part(part: BaseModel) -> dict[str, Any]:
    """The inverse of `pop_part`: plain values, with the class as `_target_`."""
    target = {"_target_": f"{type(part).__module__}.{type(part).__name__}"}
    if isinstance(part, MixCorpus):
        parts = {name: {"quota": one.quota, "corpus": dump_part(one.corpus)} for name, one in part.parts.items()}
        return target | part.model_dump(exclude={"parts"}) | {"parts": parts}
    if isinstance(part, StackConfig):
        parts = {name: dump_part(one) for name, one in part.parts.items()}
        return target | {"pattern": list(part.pattern), "position": part.position, "parts": parts}
    return target | part.model_dump()
