"""The folder a run writes to: how it is named, found again, and what it records about its origin."""

import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from common.atomic_io import (
    NOT_THERE,
    UNFINISHED,
    Irregular,
    exists,
    make_folder,
    names_in,
    read_regular,
    sweep,
    write_whole,
)
from common.errors import UserError, reason
from common.invocation import command
from common.lock import lock
from common.overrides import override
from common.paths import entering, is_folder, refuse_unreadable
from data.sources.tables import format_of
from data.tokenizers.tokenizer import Tokenizer
from training.config import ROOT, Run, dump, load
from training.migrate import FORMAT, UNSTATED, migrate, stated_format
from training.origin import is_place, leaves, refuse_foreign, signature

RUNS = Path("runs")
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
LARGEST_CONFIG = 2**18  # bytes of config.yaml; a usual one has 2,000
LONGEST_NUMBER = 100  # characters
BEGINNINGS = {".lock", "environment.yaml", "tokenizer.json"}  # what a run's folder holds before its config.yaml
ADJECTIVES = "amber brave calm clever copper eager gentle golden keen mellow quiet swift"
ANIMALS = "badger crane falcon finch fox hare heron ibex lynx marten otter owl"


def refuse_unmakeable(run_dir: str | None) -> None:
    """Raises UserError where no new run's folder can be made: nothing can be written there, which only trying shows
    (root may write where its access bits say no), or run_dir is there, with more in it than what a process left that
    was killed while it made one."""
    folder = Path(run_dir or RUNS)
    try:
        names = {path.name for path in folder.iterdir()} if run_dir and folder.is_dir() else set()
        ours = ".lock" in names and all(name in BEGINNINGS or name.startswith(UNFINISHED) for name in names)
        taken = bool(names) and not ours
        if run_dir and (taken or folder.is_file()):
            others = f", or continue it with {resume_command(folder)}" if "config.yaml" in names else ""
            raise UserError(f"run_dir={folder} exists already: choose another{others}")
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=there):
            pass
    except OSError as error:
        raise _unmakeable(run_dir, folder, error) from None


def _unmakeable(run_dir: str | None, folder: Path, error: OSError) -> UserError:
    named = f"run_dir={folder}" if run_dir else f"the run's folder {folder}"
    return UserError(f"{named} cannot be made: {reason(error)}: give a folder to write to as run_dir=")


def claim(folder: Path) -> AbstractContextManager:
    """Holds the run for this process. Raises UserError where another one trains in it."""
    try:
        held = lock(folder / ".lock", f"another process is training in {folder}: wait for it, or stop it first")
    except Irregular as error:
        raise UserError(f"{folder}/.lock cannot be held: {reason(error)}: remove it") from None
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written: {reason(error)}: let this user write to it"
        ) from None
    for place in (folder, folder / "checkpoints", folder / "failures"):
        sweep(place)
    return held


def create(run: Run, tokenizer: Tokenizer) -> tuple[Path, AbstractContextManager]:
    """A new folder, run_dir or runs/<time>-<words>, claimed, with all that is known before the first step."""
    refuse_unmakeable(run.run_dir)
    folder = Path(run.run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{_words()}")
    try:
        while not run.run_dir and exists(folder):
            folder = folder.with_name(f"{folder.name}-{_words()}")
        make_folder(folder, exist_ok=bool(run.run_dir))
        claimed = claim(folder)
        write_whole(folder / "environment.yaml", yaml.safe_dump(environment(), sort_keys=False).encode())
        tokenizer.save(folder / "tokenizer.json")
        write_config(folder, run)
    except OSError as error:
        raise _unmakeable(run.run_dir, folder, error) from None
    return folder, claimed


def write_config(folder: Path, run: Run) -> None:
    """config.yaml, with every derived value filled in, signed. Replaced as a whole or not at all."""
    tree = {"format": FORMAT, "signature": signature(run)} | dump(run)
    content = yaml.safe_dump(tree, sort_keys=False).encode()
    if len(content) > LARGEST_CONFIG:
        raise UserError(
            f"the settings are {len(content):,} bytes of config.yaml, {LARGEST_CONFIG:,} are read: give fewer parts"
        )
    try:
        write_whole(folder / "config.yaml", content)
    except OSError as error:
        raise UserError(f"{folder}/config.yaml cannot be written: {reason(error)}") from None


class PlainLoader(yaml.SafeLoader):
    """YAML as config.yaml is written: without aliases, by which a short file can stand for an endless tree, and
    without numbers that take minutes to read."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        node = super().compose_node(parent, index)
        text = not isinstance(node, yaml.ScalarNode) or node.tag == self.DEFAULT_SCALAR_TAG
        if not text and len(node.value) > LONGEST_NUMBER:
            raise yaml.YAMLError(f"it holds {node.value[:20]}..., which is no number")
        return node


def read_config(folder: Path) -> tuple[dict[str, Any], Any]:
    """The tree in a run's config.yaml, migrated, for `load`, and its signature, if any. Raises UserError where there
    is none."""
    refuse_no_run(folder)
    try:
        tree = yaml.load(read_regular(folder / "config.yaml", LARGEST_CONFIG).decode(), PlainLoader)
        if not isinstance(tree, dict):
            raise ValueError("it holds no settings")
        signed, format = tree.pop("signature", None), stated_format(tree)
        refuse_other_format(folder / "config.yaml", format)
        return migrate(tree, format), signed
    except RecursionError:
        fault = "it is nested too deeply"
    except OSError as error:
        fault = reason(error)
    except (ValueError, yaml.YAMLError) as error:
        fault = str(error).splitlines()[0]
    raise UserError(f"{folder}/config.yaml cannot be read: {fault}: bring the run's own back, as a file to be read")


def refuse_other_format(path: Path, format: Any) -> None:
    """Raises UserError where a file was written in a format that this program does not know."""
    if type(format) is not int or not UNSTATED <= format <= FORMAT:
        raise UserError(
            f"{path} has format {format}, this program reads {UNSTATED} to {FORMAT}: take the Headroom that wrote it"
        )


def resume_command(folder: Path) -> str:
    """What continues a run, for a shell."""
    return command("train.py", override("resume", str(folder)))


def refuse_no_run(folder: Path) -> None:
    """Raises UserError where the folder is not a run's, or may not be entered."""
    with entering(folder):
        if exists(folder / "config.yaml"):
            return
        above = next((above for above in folder.parents[:2] if exists(above / "config.yaml")), None)
    if above is not None:  # of a checkpoint, say
        raise UserError(f"{folder} is no run, but lies within one: give the run's folder, {above}")
    raise UserError(f"{folder} is not a run: it has no config.yaml; runs are made in {RUNS}/, or where run_dir= says")


def refuse_other_settings(folder: Path, run: Run, trained: Run) -> None:
    """Raises UserError where `run` is not the run whose settings were `trained`. Places may differ: what is found there
    is known by its fingerprint, and by the format that a file's name tells, which no fingerprint does."""
    now, before = leaves(dump(run)), leaves(dump(trained))
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
        open_steps = [run.schedule.first_open_step(steps) for steps in (before, run.steps)]
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
            places = [place for place in leaves(stored) if is_place(place) and place != "tokenizer.path"]
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
    return run, folder, claim(folder)


def _is_so(key: str, tree: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a setting or a choice that was typed is the one that the run was made with, but for where things are."""
    try:
        return _placeless(load(_with(stored, tree, key.split(".")))) == _placeless(load(stored))
    except (UserError, KeyError, TypeError):
        return False


def _placeless(run: Run) -> dict[str, Any]:
    return {key: None if is_place(key) else value for key, value in leaves(dump(run)).items()}


def _with(stored: Mapping[str, Any], tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """`stored`, but at `path` what `tree` has there."""
    name, *rest = path
    return {**stored, name: _with(stored[name], tree[name], rest) if rest else tree[name]}


def newest(with_checkpoint: bool = False) -> Path:
    """The run under runs/ that was begun or resumed last; or, with_checkpoint, that saved last. One that cannot be read
    is named in a warning and passed over. Raises UserError where there is none, or runs/ cannot be read."""
    try:
        folders = [RUNS / name for name in names_in(RUNS)]
    except OSError as error:
        refuse_unreadable(RUNS.resolve(), error)
    touched = {}
    for folder in folders:
        try:
            if not is_folder(str(folder)):  # as a sweep's multirun.yaml is not
                continue
            files = saved(folder) if with_checkpoint else [folder / "config.yaml"]
            touched[folder] = max(map(_touched, files), default=0)
        except OSError as error:
            log.warning(f"{folder} is passed over: {reason(error)}")
        except UserError as fault:
            log.warning(f"{folder} is passed over: {fault}")
    touched = {folder: when for folder, when in touched.items() if when}
    if not touched:
        what = "run with a checkpoint" if with_checkpoint else "run"
        raise UserError(f"there is no {what} in {RUNS.resolve()}: {command('train.py')} makes one")
    return max(touched, key=touched.get)


def _touched(path: Path) -> float:
    """0 where there is no such file: it may be no run, or one in training, which removes its old checkpoints."""
    try:
        return os.stat(path).st_mtime
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return 0.0


def step_of(path: Path) -> int:
    """A checkpoint's step, from its name; -1 for another name, such as a user's own copy may have."""
    digits = path.name.removeprefix("step_")
    return int(digits) if re.fullmatch("[0-9]{1,15}", digits) and digits != path.name else -1


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps. Raises UserError where they cannot be listed."""
    try:
        paths = [folder / "checkpoints" / name for name in names_in(folder / "checkpoints")]
    except OSError as error:
        refuse_unreadable(f"{folder}/checkpoints", error, "make it a folder that this user may read")
    return sorted((path for path in paths if step_of(path) >= 0), key=step_of)


def environment() -> dict[str, Any]:
    """Versions, machine and git state: what another person would need to know to get the same numbers."""
    packages = (
        "torch",
        "numpy",
        "hydra-core",
        "pydantic",
        "datasets",
        "tokenizers",
        "tiktoken",
        "safetensors",
        "sympy",
    )
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
    }


def _words() -> str:
    return f"{random.choice(ADJECTIVES.split())}-{random.choice(ANIMALS.split())}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # such as datasets, which only some corpora need
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
