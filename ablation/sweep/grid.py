"""What varies in a sweep: from the overrides of one command to its cells, one for each combination of values.

A cell's name is a function of what varies, `attention=gqa,seed=1`, and so is its folder's: the same command finds the
same cells again. A setting that only some choices have is marked: `if:attention.kv_lora_rank=8` applies where it
exists, and cells that would differ in nothing else are one.
"""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from ablation.sweep.stored import PlannedCell
from common.conf_files import choices, hydra_initialized, is_group
from common.errors import UserError
from common.overrides import OF_PARTS, WHERE_IT_EXISTS, hydra_arguments, key_of
from common.suggestions import Known, known_settings, no_such_choice, no_such_setting
from training.run.composer import compose_tree
from training.run.config import OF_COMMANDS

SEED = "seed"
MAX_NAME = 150  # characters of a cell's name: a folder's has at most 255 bytes
MAX_CELLS = 10_000
ONE_VARIANT = "this model"  # where nothing but the seed varies


class Override(NamedTuple):
    key: str
    word: str  # as Hydra takes it, with its quotes: key=value


class Varying(NamedTuple):
    """A setting that varies, and its values."""

    key: str
    values: list[Override]


class Grid(NamedTuple):
    """A sweep before anything of it is composed."""

    command: list[str]  # overrides of the command itself, such as match=
    fixed: list[str]  # those of a run that are the same in all cells
    varying: list[Varying]
    cells: list[PlannedCell]  # by seed, and within a seed by variant: a sweep that is stopped has whole comparisons


def grid_of(typed: Sequence[str], before: Collection[str] = ()) -> Grid:
    """typed: the overrides on the command line; before: settings that vary in the sweep that they add to, be it with
    one value here. Raises UserError for what cannot be read, and where nothing varies."""
    optional = {key_of(word) for word in typed if word.startswith(WHERE_IT_EXISTS)}
    words = hydra_arguments([*(word.removeprefix(WHERE_IT_EXISTS) for word in typed), "-m"])[:-1]
    fixed, varying = _parsed(words)
    varying += _varying_of_experiment(fixed, {key_of(word) for word in words})
    if not varying and not before:
        # Raises for a misspelt experiment, which would have stated what varies:
        compose_tree(*(one.word for one in fixed))
        raise UserError("-m is for a sweep, and nothing varies: give several values, as in attention=mha,mla seed=1,2")
    named = {SEED, *before}
    varying += [Varying(one.key, [one]) for one in fixed if one.key in named]
    varying.sort(key=lambda one: (one.key == SEED, not is_group(one.key), one.key))  # as names have them
    _check_varying(varying)
    rest = [one for one in fixed if one.key not in named]
    command = [one.word for one in rest if one.key in OF_COMMANDS]
    own = [one for one in rest if one.key not in OF_COMMANDS]
    cells = list(_cells(own, varying, optional))
    given = {key_of(word) for cell in cells for word in cell.overrides}
    nowhere = next((key for key in sorted(optional) if key not in given and key not in OF_COMMANDS), None)
    if nowhere is not None:
        raise UserError(f"{WHERE_IT_EXISTS}{no_such_setting(nowhere, cells[0].overrides)}")
    return Grid(command, [one.word for one in own], varying, cells)


def _check_varying(varying: Sequence[Varying]) -> None:
    of_command = next((one.key for one in varying if one.key in OF_COMMANDS), None)
    if of_command:
        raise UserError(f"{of_command} is of the whole sweep, and cannot vary within it: give it one value")
    count = math.prod(len(one.values) for one in varying)
    if count > MAX_CELLS:
        raise UserError(f"this sweep would be {count:,} runs, {MAX_CELLS:,} are the most: give fewer values")


def _parsed(words: Sequence[str]) -> tuple[list[Override], list[Varying]]:
    """Split overrides into those of one value and those of several."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    fixed, varying = [], []
    with hydra_initialized():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for word in words:
            (override,) = parser.parse_overrides([word])
            if not override.is_sweep_override():
                fixed.append(Override(key_of(word), word))
                continue
            key = override.get_key_element()
            values = [Override(key_of(word), f"{key}={value}") for value in override.sweep_string_iterator()]
            varying.append(Varying(key_of(word), _distinct(word, values)))
    return fixed, varying


def _distinct(word: str, values: list[Override]) -> list[Override]:
    if not values:
        raise UserError(f"{word} has no values: give at least one")
    seen = set()
    for value in values:
        same = value.word if _seed(value.word) is None else _seed(value.word)  # 01 is 1
        if same in seen:
            raise UserError(f"{word} gives {value.word} twice: a sweep has one run of each value, and seeds for more")
        seen.add(same)
    return values


def _varying_of_experiment(fixed: Sequence[Override], typed: set[str]) -> list[Varying]:
    """What varies by an experiment's file, where the command line does not give it."""
    experiments = [one.word for one in fixed if one.key == "experiment"]
    params = _sweeper_params(*experiments) if experiments else {}
    return _parsed([f"{key}={value}" for key, value in params.items() if key not in typed])[1]


@functools.cache
def _sweeper_params(*experiments: str) -> dict[str, Any]:
    """hydra.sweeper.params in the files of experiments."""
    from hydra import compose
    from hydra.errors import HydraException

    try:
        with hydra_initialized():
            return dict(compose("train", list(experiments), return_hydra_config=True).hydra.sweeper.params or {})
    except HydraException:  # composing the cells says what is wrong
        return {}


def _cells(fixed: Sequence[Override], varying: Sequence[Varying], optional: set[str]) -> Iterator[PlannedCell]:
    """The cells, each once: where a marked setting does not exist, its values make no difference."""
    ordered = sorted(varying, key=lambda one: one.key != SEED)  # the seed varies slowest
    seen = set()
    for combination in itertools.product(*(one.values for one in ordered)):
        chosen = {one.key: one for one in combination}
        given = _existing([*fixed, *(chosen[one.key] for one in varying)], optional)
        varied = [one for one in given if one.key in chosen]
        name = ",".join(map(_label, varied))
        if name in seen:
            continue
        seen.add(name)
        variant = ",".join(_label(one) for one in varied if one.key != SEED)
        seed = _seed(chosen[SEED].word) if SEED in chosen else None
        words = [one.word for one in given]
        yield PlannedCell(name=_folder_name(name), variant=variant or ONE_VARIANT, seed=seed, overrides=words)


def _existing(overrides: list[Override], optional: set[str]) -> list[Override]:
    """Leave out marked settings that these choices do not have. Raises UserError for one that they lack unmarked, where
    another choice of the sweep has it."""
    if not optional:
        return overrides
    known = known_settings([one.word for one in overrides if is_group(one.key)])
    return [one for one in overrides if one.key not in optional or _exists(one.key, known)]


def _exists(key: str, known: Known) -> bool:
    group = key.partition(".")[0]
    in_part = re.match(OF_PARTS, key) and f"{group}.parts" in known.settings
    return key in known.settings or is_group(key) or bool(in_part)


def check_known(cells: Sequence[PlannedCell], varying: Sequence[Varying]) -> None:
    """Raise UserError for a setting that some cells' choices have and others do not: it says how to mark it."""
    for one in varying:
        _check_choices(one)
    groups = {one.key for one in varying if is_group(one.key)}
    if not groups:
        return
    by_choice: dict[tuple[str, ...], PlannedCell] = {}
    for cell in cells:
        by_choice.setdefault(tuple(word for word in cell.overrides if key_of(word) in groups), cell)
    known = {choice: known_settings(_choices(cell)) for choice, cell in by_choice.items()}
    for choice, cell in by_choice.items():
        for word in cell.overrides:
            key = key_of(word)
            if word.startswith(("+", "~")) or _exists(key, known[choice]):
                continue
            having = [",".join(other) for other in by_choice if _exists(key, known[other])]
            if not having:
                raise UserError(no_such_setting(key, cell.overrides))
            raise UserError(
                f"{key} is no setting of {','.join(choice)}, but of {' and '.join(having)}: "
                f"write {WHERE_IT_EXISTS}{word}, and it applies where it exists"
            )


def _check_choices(varying: Varying) -> None:
    """Raise UserError for a group that lacks one of these choices."""
    names = [one.word.partition("=")[2] for one in varying.values]
    if is_group(varying.key) and not set(names) <= set(choices(varying.key)):
        raise UserError(no_such_choice(varying.key, ",".join(names)))


def _choices(cell: PlannedCell) -> tuple[str, ...]:
    return tuple(word for word in cell.overrides if is_group(key_of(word)))


def _label(override: Override) -> str:
    """As it stands in a name: without the quotes and marks that Hydra needs."""
    value = override.word.partition("=")[2]
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return f"{override.key}={value}"


def _seed(word: str) -> int | None:
    found = re.fullmatch(f"{SEED}=([0-9]{{1,19}})", word)
    return int(found[1]) if found else None  # else composing it says what is wrong


def _folder_name(name: str) -> str:
    """A name that every file system takes, be it one that knows no capitals; where that changes it, with a hash of it,
    so that no two are the same."""
    safe = re.sub(r"[^A-Za-z0-9_.,=+@-]", "_", name)[:MAX_NAME].lstrip(".")
    return safe if safe == name == name.lower() else f"{safe}-{short_hash(name)}"


def short_hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]
