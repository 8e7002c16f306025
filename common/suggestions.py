"""Suggestions for misspelt settings ("did you mean"). Imports nothing heavy."""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from common import conf_files
from common.invocation import ROOT, command, quoted, shortest

RENAMED = {  # settings, by their former names
    "most_skipped": "max_skipped_updates",
    "checkpoint_activations": "activation_checkpointing",
    "optim.logical_blocks": "optim.per_head",
    "data.document_mask": "document_mask",
}
ALIASES = {  # settings, by the names that other programs give them
    "answer": ("data.column",),
    "attn": ("attention",),
    "batch_size": ("batch_tokens", "micro_batch_size"),
    "block_size": ("model.context_length", "attention.block_size"),
    "checkpoint": ("resume", "init_from"),
    "checkpoint_every": ("save_every",),
    "dataset": ("data",),
    "depth": ("model.n_layers",),
    "dtype": ("precision",),
    "embed_dim": ("model.d_model",),
    "epochs": ("steps",),
    "eval_interval": ("eval_every",),
    "grad_accum": ("batch_tokens", "micro_batch_size"),
    "grad_clip": ("clip_norm",),
    "gradient_accumulation": ("batch_tokens", "micro_batch_size"),
    "gradient_accumulation_steps": ("batch_tokens", "micro_batch_size"),
    "gradient_checkpointing": ("activation_checkpointing",),
    "heads": ("model.n_heads",),
    "hidden_dim": ("model.d_model",),
    "hidden_size": ("model.d_model",),
    "iters": ("steps",),
    "layers": ("model.n_layers",),
    "learning_rate": ("optim.lr",),
    "log": ("logger",),
    "max_iters": ("steps",),
    "max_seq_len": ("model.context_length",),
    "max_steps": ("steps",),
    "mixed_precision": ("precision",),
    "n_embd": ("model.d_model",),
    "name": ("run_dir",),
    "num_heads": ("model.n_heads",),
    "num_layers": ("model.n_layers",),
    "optimizer": ("optim",),
    "out_dir": ("run_dir",),
    "output_dir": ("run_dir",),
    "run": ("resume",),
    "run_name": ("run_dir",),
    "save_interval": ("save_every",),
    "scheduler": ("schedule",),
    "seq_len": ("model.context_length",),
    "sequence_length": ("model.context_length",),
    "sliding_window": ("attention.window",),
}
LIST_EXAMPLES = {"optim.groups": '[{match: "layers.*.mlp.*", lr: 0.001}]'}  # of those that are empty in conf/
MAX_SUGGESTED = 3
CUTOFF = 0.75  # of difflib's similarity: a slip or two, and not a word of its own
DOTTED_CUTOFF = 0.85  # of keys with their groups, which make unlike ones alike


class Known(NamedTuple):
    """The settings and choices that exist."""

    choices: dict[str, str | None]  # by group
    settings: dict[str, Any]  # by group.name, or the name at the top; and what they are where they are not given

    def of_group(self, group: str) -> list[str]:
        """The settings of the group's choice, by their names."""
        return [key.removeprefix(f"{group}.") for key in self.settings if key.startswith(f"{group}.")]

    def at_the_top(self) -> list[str]:
        return [*self.choices, *(key for key in self.settings if "." not in key and key not in self.choices)]

    def named(self, name: str) -> list[str]:
        """The settings of this name in the groups."""
        return [key for key in self.settings if key.endswith(f".{name}")][:MAX_SUGGESTED]


def nearest(name: str, names: Iterable[str], cutoff: float = CUTOFF) -> str | None:
    """The name that `name` is most likely a slip of, or the only one that it begins; None where none is near."""
    names = list(dict.fromkeys(names))
    slips = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    begun = [one for one in names if one.startswith(f"{name}_")]
    return slips[0] if slips else begun[0] if len(begun) == 1 else None


def hint(*meant: str | None) -> str:
    """The question whether one of these names is meant; empty without one."""
    names = [name for name in meant if name is not None]
    return f"did you mean {' or '.join(names)}?" if names else ""


def aliased(key: str) -> tuple[str, ...]:
    """The settings that other programs call `key`, or call by its last name."""
    return ALIASES.get(key.rpartition(".")[2], ())


def misfit(override: str, known: Known) -> str | None:
    """Return one line on an override that gives a dict for a list, or a list for a dict, or an entry that a list does
    not have: none of which Hydra merges. None for any other."""
    key, _, value = override.lstrip("+~").partition("=")
    opening = value.lstrip()[:1]
    if isinstance(known.settings.get(key), dict) and opening == "[":
        return f"{override}: give a dict, as {quoted(f'{key}={{name: value}}')}"
    lists = [name for name, usual in known.settings.items() if isinstance(usual, list)]
    whole = next((name for name in lists if f"{key}.".startswith(f"{name}.")), None)
    if whole is None or (key == whole and opening != "{"):
        return None
    usual = known.settings[whole]
    if key != whole and key.removeprefix(f"{whole}.") in map(str, range(len(usual))):
        return None
    example = LIST_EXAMPLES.get(whole) or f"[{', '.join(map(str, usual))}]"
    return f"{override}: {whole} is a list: give it as a whole, as {quoted(f'{whole}={example}')}"


def where_all_are() -> str:
    """Where to look for a setting: a list of all would be a wall of names."""
    return f"{command('train.py', '--help')} lists them, {shortest(str(ROOT / 'docs' / 'settings.md'))} explains them"


def no_such_choice(group: str, typed: str) -> str:
    """Return one line: that a group lacks a choice that was typed for it. Where that is a place of text, it names the
    corpus that reads it."""
    listed = f"choose one of {', '.join(conf_files.choices(group))}"
    if group != "data" or not re.search(r"[./*~]", typed):
        return f"{group}={typed}: {listed}"
    on_the_hub = re.fullmatch(r"[\w-]+/[\w-]+", typed) and not os.path.exists(typed)
    meant = f"data={'hub' if on_the_hub else 'files'} {quoted(f'data.path={typed}')}"
    return f"{group}={typed}: {hint(meant)} Or {listed}"


def no_such_setting(key: str, overrides: Sequence[str] = ()) -> str:
    """Return one line: that there is no `key` (group.name, or a name at the top), and the nearest setting there is
    with the choices that the overrides make."""
    if key in RENAMED:
        return renamed(key)
    if aliased(key):
        return f"{key}: no such setting; {hint(*aliased(key))}"
    known = known_settings(overrides)
    group, _, name = key.rpartition(".")
    if not group:
        return _not_at_the_top(name, known)
    if group in known.choices and (known.of_group(group) or _owners(group, name)):
        return _not_of_choice(key, group, known)
    return _of_part(key, known) or _not_in_dict(key, known) or _in_no_group(key, known)


def renamed(key: str) -> str:
    """Return one line on a setting in RENAMED."""
    return f"{key} is called {RENAMED[key]} now: write {RENAMED[key]}="


@functools.cache
def mask_settings() -> tuple[str, ...]:
    """The settings of an attention that only mask=sparse shows, as attention.name; they can be set without it."""
    return tuple(f"attention.{name}" for name in conf_files.keys("mask", "sparse"))


def known_settings(overrides: Sequence[str]) -> Known:
    """Compose the choices among the overrides (of a sweep, the first ones) without the settings."""
    from hydra.errors import HydraException

    try:
        return _composed(*_choices_in(overrides))
    except HydraException:  # one of them is at fault itself
        return _composed()


def _choices_in(overrides: Sequence[str]) -> Iterator[str]:
    for word in overrides:
        choice = re.fullmatch(r"\+*(\w+)=([\w/]+)(?:,.*)?", word)
        if choice and conf_files.is_group(choice[1]):
            yield f"{choice[1]}={choice[2]}"
        elif word.startswith("hydra.searchpath="):
            yield word


@functools.lru_cache(maxsize=100)  # a fifth of a second, and the cells of a sweep share choices
def _composed(*choices: str) -> Known:
    from hydra import compose
    from omegaconf import OmegaConf

    with conf_files.hydra_initialized():
        tree = OmegaConf.to_container(compose("train", list(choices), return_hydra_config=True))
    chosen = tree.pop("hydra")["runtime"]["choices"]
    groups = {group: chosen[group] for group in reversed(chosen) if group.isidentifier()}  # none of Hydra's own
    settings = dict(_items(tree))
    if groups["attention"] != "stack":  # whose parts have masks, not the whole
        settings |= dict.fromkeys(mask_settings())
    return Known(groups, settings)


def _items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key != "_target_":
            yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")


def _of_choices(group: str) -> dict[str, list[str]]:
    return {choice: conf_files.keys(group, choice) for choice in conf_files.choices(group)}


def _owners(group: str, name: str) -> list[str]:
    """The choices of a group that have a setting of about this name."""
    near = nearest(name, {key for keys in _of_choices(group).values() for key in keys})
    return [choice for choice, keys in _of_choices(group).items() if near in keys]


def _not_of_choice(key: str, group: str, known: Known) -> str:
    name = key.removeprefix(f"{group}.")
    valid = known.of_group(group)
    others = _of_choices(group)
    near = nearest(name, [*valid, *(other for keys in others.values() for other in keys)])
    where = f"no such setting of {group}={known.choices[group]}"
    within = [one for one in valid if one.endswith(f".{name}") and not one.startswith("parts.")]
    if within:
        return f"{key}: {where}; {hint(*within)}"
    if near is None or near in valid:
        return f"{key}: {where}; {hint(near) or 'valid: ' + ', '.join(valid)}"
    owners = " or ".join(choice for choice, keys in others.items() if near in keys)
    meant = "it" if near == name else f"did you mean {near}? It"
    part = next((one for one in valid if re.fullmatch(r"parts\.\w+", one)), None)
    in_part = f", so set it in a part, as {group}.{part}.{near}=" if part else ""
    return f"{key}: {where}; {meant} belongs to {group}={owners}{in_part}"


def _not_in_dict(key: str, known: Known) -> str | None:
    """Return one line on a key that a setting does not have which is a dict; None for any other."""
    whole, _, name = key.rpartition(".")
    inner = known.settings.get(whole)
    if not isinstance(inner, dict) or ".parts." in f"{whole}.":
        return None
    beside = f"{whole.rpartition('.')[0]}.{name}"
    meant = beside if beside in known.settings else nearest(name, inner)
    return f"{key}: no such setting; {hint(meant) or 'valid: ' + ', '.join(inner)}"


def _of_part(key: str, known: Known) -> str | None:
    """Return one line on group.part.name, where group.parts.part.name is meant; None for any other key."""
    group, _, rest = key.partition(".")
    part, _, name = rest.partition(".")
    keys = _of_choices(group) if group in known.choices else {}
    owners = [choice for choice, names in keys.items() if "parts" in names]
    if not owners or part == "parts" or not any(name in names for names in keys.values()):
        return None
    choose = "" if known.choices[group] in owners else f" It belongs to {group}={' or '.join(owners)}"
    return f"{key}: no such setting; {hint(f'{group}.parts.{rest}')}{choose}"


def _in_no_group(key: str, known: Known) -> str:
    """Return one line on a key whose group is none, or a group without settings."""
    meant = known.named(key.rpartition(".")[2]) or [nearest(key, known.settings, DOTTED_CUTOFF)]
    return f"{key}: no such setting; {hint(*meant) or where_all_are()}"


def _not_at_the_top(name: str, known: Known) -> str:
    top = known.at_the_top()
    within = known.named(name)
    near = nearest(name, top)
    if not within and near is None:
        near_within = nearest(name, [key.rpartition(".")[2] for key in known.settings])
        within = known.named(near_within) if near_within else []
    return f"{name}: no such setting; {hint(*(within or [near])) or where_all_are()}"
