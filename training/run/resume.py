"""Resuming a run: its stored settings, and the few that may change."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.settings import Change
from data.sources.tables import format_of
from training.run.changes import RESUMABLE, change_of, forbidden_differences, is_place
from training.run.config import Run, dump, flatten_config
from training.run.folder import checkpoint_paths, find_run, read_config
from training.run.signature import check_foreign

log = logging.getLogger("headroom")


def check_same_settings(folder: Path, run: Run, trained: Run) -> None:
    """Raise UserError where `run` is not the run whose settings were `trained`. Places may differ: what is found there
    is known by its fingerprint, and by the format that a file's name tells, which no fingerprint does."""
    now, before = flatten_config(dump(run)), flatten_config(dump(trained))
    for key in filter(is_place, now.keys() & before.keys()):
        if format_of(str(now[key])) != format_of(str(before[key])):
            raise UserError(
                f"{key}={now[key]} is read in another way than {before[key]}, which {folder} was trained with: "
                "give it a name that ends alike"
            )
    for different in forbidden_differences(trained, run, Change.ON_RESUME):
        raise UserError(
            f"{folder}/config.yaml says {different.key}: {different.now}, the run was trained with {different.before}: "
            "bring the run's own config.yaml back, or start a new run"
        )


def check_same_documents(folder: Path, run: Run, trained: str, now: str) -> None:
    """Raise UserError where a run's documents are not those it was trained on. trained, now: their fingerprints."""
    if now != trained:
        places = [f"{key}=" for key in flatten_config(dump(run)) if is_place(key) and key.startswith("data.")]
        moved = f", say with {' or '.join(places)} where they are" if places else ""
        raise UserError(
            f"the documents of data={run.data.name} are not those that {folder} was trained on (fingerprint "
            f"{trained[:12]}, now {now[:12]}): bring these back{moved}, or train its weights on others, in a new run: "
            f"write init_from={folder} in place of resume="
        )


def check_steps(folder: Path, run: Run, before: int, done: int, finished: bool) -> None:
    """Raise UserError where a run that was to have `before` steps, and has done `done`, cannot have those of `run`, or
    nothing is left to do. finished: it also finished, after its last step (checkpoint.is_finished)."""
    if done > run.steps:
        raise UserError(f"steps={run.steps} is less than the {done} steps that {folder} has done: give a larger steps=")
    if done == run.steps == before and finished:
        raise UserError(f"{folder} is complete at step {done} of steps={run.steps}: give a larger steps=")
    if run.steps != before:
        open_steps = [run.schedule.decay_start_step(steps) for steps in (before, run.steps)]
        if None in open_steps:
            log.info(
                f"the learning rate goes on along the curve of steps={run.steps}; up to step {done} it followed that "
                f"of steps={before} (schedule=wsd leaves it open until the cooldown)"
            )
        elif done > min(open_steps):
            raise UserError(
                f"steps={run.steps}: the number of steps can change only before the cooldown, which began at "
                f"step {min(open_steps)}, and {done} are done: start a new run, or move the checkpoints after that "
                "away, if there are older ones"
            )


def open_run(resume: str, tree: Mapping[str, Any], typed: list[str]) -> tuple[Run, Path]:
    """Open the run to resume, a folder or `latest` -> the run, with its own stored settings and the few that may
    change; and its folder.

    tree: the composed configuration; typed: the overrides on the command line. Raises UserError for one that would
    change what may not.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in typed]
    if resume and "init_from" in keys:
        raise UserError(
            f"resume={resume} with init_from: a run that goes on has weights already, its own; leave one of them out"
        )
    folder = find_run("resume", resume)
    stored, signed = read_config(folder)
    own = _load(stored, f"in {folder}/config.yaml: bring the run's own file back")
    repeated = [key for key in keys if key != "resume" and change_of(own, key) < Change.ON_RESUME]
    settings = dump(_with_repeated(own, tree, repeated))
    if "path" in settings["tokenizer"]:
        settings["tokenizer"]["path"] = str(folder / "tokenizer.json")  # the run it began with may be gone
    changed = {key.partition(".")[0] for key in keys if key not in repeated} - {"resume"}
    run = _load(settings | {key: tree[key] for key in changed}, f"in {folder}/config.yaml, or on the command line")
    # A run with a checkpoint needs nothing of the one it began from.
    agreed = [*keys, "init_from"] if checkpoint_paths(folder) else keys
    check_foreign(folder, own, run, signed, agreed, tree)
    return run, folder


def _load(tree: Mapping[str, Any], where: str) -> Run:
    try:
        return Run.from_tree(tree)
    except UserError as error:
        raise UserError(f"{error} ({where})") from None


def _with_repeated(own: Run, tree: Mapping[str, Any], keys: list[str]) -> Run:
    """Apply overrides of settings that may not change: they repeat what the run was made with, or say where its data is
    now. Raises UserError where one would change it."""
    stored = dump(own)
    for key in keys:
        if key.partition(".")[0] not in stored:  # such as experiment, which sets others
            raise _unchangeable(key, own)
    try:
        settings = stored
        for key in keys:
            settings = _replaced(settings, tree, key.split("."))
        repeated = Run.from_tree(settings) if keys else own
        different = [one.key for one in forbidden_differences(own, repeated, Change.ON_RESUME)]
    except (UserError, KeyError, TypeError):  # in this run they make no sense: so they are not its own
        different = [key for key in keys if _at(tree, key) != _at(stored, key)] or keys
    if different:
        typed = (key for key in keys if any(f"{one}.".startswith(f"{key}.") for one in different))
        raise _unchangeable(next(typed, keys[0]), own)
    return repeated


def _unchangeable(key: str, own: Run) -> UserError:
    places = [place for place in flatten_config(dump(own)) if is_place(place) and place != "tokenizer.path"]
    moved = f", and where the same data has moved to ({', '.join(places)})" if places else ""
    tuned = ", or write init_from= in place of resume= for a new run of its weights, in which it may change"
    return UserError(
        f"{key} cannot change on resume: only {', '.join(RESUMABLE)} may{moved}; the rest is the run's own, "
        f"so leave it out{tuned if change_of(own, key) >= Change.FINE_TUNING else ''}"
    )


def _replaced(settings: Mapping[str, Any], tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """Replace the settings at `path` by those that `tree` has there."""
    name, *rest = path
    return {**settings, name: _replaced(settings[name], tree[name], rest) if rest else tree[name]}


def _at(tree: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
