"""Resuming: which settings of a run may change when it goes on, and which may not."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.sources.tables import format_of
from training.run.config import Run, dump, load
from training.run.folder import acquire_run_lock, newest, read_config, saved
from training.run.origin import flatten_config, is_place, refuse_foreign

# What may change when a run is resumed.
RESUMABLE = [
    "steps",
    "eval_every",
    "save_every",
    "keep_last",
    "sample_every",
    "most_skipped",
    "logger",
    "device",
    "cache_dir",
    "peak_flops",
    "profile_steps",
    "log_attention",
    "checkpoint_activations",
    "dry_run",
]
log = logging.getLogger("headroom")


def refuse_other_settings(folder: Path, run: Run, trained: Run) -> None:
    """Raises UserError where `run` is not the run whose settings were `trained`. Places may differ: what is found there
    is known by its fingerprint, and by the format that a file's name tells, which no fingerprint does."""
    now, before = flatten_config(dump(run)), flatten_config(dump(trained))
    for key in {**now, **before}:
        if is_place(key) and key in now and key in before:
            if format_of(str(now[key])) != format_of(str(before[key])):
                raise UserError(
                    f"{key}={now[key]} is read in another way than {before[key]}, which {folder} was trained with: "
                    "give it a name that ends alike"
                )
        elif key.split(".")[0] not in RESUMABLE and now.get(key) != before.get(key):
            raise UserError(
                f"{folder}/config.yaml says {key}: {now.get(key)}, the run was trained with {before.get(key)}: "
                "bring the run's own config.yaml back, or start a new run"
            )


def refuse_other_steps(folder: Path, run: Run, before: int, done: int, ended: bool) -> None:
    """Raises UserError where a run that was to have `before` steps, and has done `done`, cannot have those of `run`, or
    nothing is left to do. ended: the last thing that a run does was done after its last step."""
    if done > run.steps:
        raise UserError(f"steps={run.steps} is less than the {done} steps that {folder} has done: give a larger steps=")
    if done == run.steps == before and ended:
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


def resumed(resume: str, tree: Mapping[str, Any], typed: list[str]) -> tuple[Run, Path, AbstractContextManager]:
    """The run to resume, a folder or `latest`, with its own stored settings and the few that may change; claimed.

    tree: the composed configuration; typed: the overrides on the command line. Raises UserError for one that would
    change what may not.
    """
    if resume == "":
        raise UserError("resume= names no run: give a run's folder, or latest")
    keys = [word.lstrip("+").partition("=")[0] for word in typed]
    if "init_from" in keys:
        raise UserError(
            f"resume={resume} with init_from: a run that goes on has weights already, its own; leave one of them out"
        )
    folder = newest() if resume == "latest" else Path(str(resume))
    stored, signed = read_config(folder)
    try:
        own = load(stored)
    except UserError as error:
        raise UserError(f"{error} (in {folder}/config.yaml)") from None
    stored = dump(own)
    for key in keys:
        if key.split(".")[0] in (*RESUMABLE, "resume"):
            continue
        if not _is_so(key, tree, stored):
            places = [place for place in flatten_config(stored) if is_place(place) and place != "tokenizer.path"]
            moved = f", and where the same data has moved to ({', '.join(places)})" if places else ""
            raise UserError(
                f"{key} cannot change on resume: only {', '.join(RESUMABLE)} may{moved}; the rest is the run's own, so "
                "leave it out"
            )
        if key.split(".")[0] in ("data", "tokenizer"):
            stored = _with(stored, tree, key.split("."))
    if "path" in stored["tokenizer"]:
        stored["tokenizer"]["path"] = str(folder / "tokenizer.json")  # the run it began with may be gone
    changed = {key.split(".")[0] for key in keys} & {*RESUMABLE}
    try:
        run = load(stored | {key: tree[key] for key in changed})
    except UserError as error:
        raise UserError(f"{error} (in {folder}/config.yaml, or on the command line)") from None
    refuse_foreign(folder, own, run, signed, keys, tree, begun=bool(saved(folder)))
    return run, folder, acquire_run_lock(folder)


def _is_so(key: str, tree: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a setting or a choice that was typed is the one that the run was made with, but for where things are."""
    try:
        return _placeless(load(_with(stored, tree, key.split(".")))) == _placeless(load(stored))
    except (UserError, KeyError, TypeError):
        return False


def _placeless(run: Run) -> dict[str, Any]:
    return {key: None if is_place(key) else value for key, value in flatten_config(dump(run)).items()}


def _with(stored: Mapping[str, Any], tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """`stored`, but at `path` what `tree` has there."""
    name, *rest = path
    return {**stored, name: _with(stored[name], tree[name], rest) if rest else tree[name]}
