"""The folder a run writes to: how it is named, found again, and what it records about its origin."""

import logging
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from data.durable import UNFINISHED, make_folder, sweep, write_whole
from data.errors import UserError
from data.lock import lock
from data.tokenizer import Tokenizer
from training.config import ROOT, Run, dump, load
from training.log import read_metrics, unscored
from training.migrate import FORMAT, UNSTATED, migrate

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
        taken = not all(name in BEGINNINGS or name.startswith(UNFINISHED) for name in names)
        if run_dir and (taken or folder.is_file()):
            others = f", or continue it with resume={folder}" if "config.yaml" in names else ""
            raise UserError(f"run_dir={folder} exists already: choose another{others}")
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=there):
            pass
    except OSError as error:
        raise _unmakeable(run_dir, folder, error) from None


def _unmakeable(run_dir: str | None, folder: Path, error: OSError) -> UserError:
    named = f"run_dir={folder}" if run_dir else f"the run's folder {folder}"
    return UserError(f"{named} cannot be made: {error.strerror}: give a folder to write to as run_dir=")


def claim(folder: Path) -> AbstractContextManager:
    """Holds the run for this process. Raises UserError where another one trains in it."""
    try:
        held = lock(folder / ".lock", f"another process is training in {folder}: wait for it, or stop it first")
    except OSError as error:
        reason = f"the run's folder {folder} cannot be written: {error.strerror}"
        raise UserError(f"{reason}: let this user write to it") from None
    for place in (folder, folder / "checkpoints", folder / "failures"):
        sweep(place)
    return held


def create(run: Run, tokenizer: Tokenizer) -> tuple[Path, AbstractContextManager]:
    """A new folder, run_dir or runs/<time>-<words>, claimed, with all that is known before the first step."""
    refuse_unmakeable(run.run_dir)
    folder = Path(run.run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{_words()}")
    try:
        while not run.run_dir and folder.exists():
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
    """config.yaml, with every derived value filled in. Replaced as a whole or not at all."""
    try:
        write_whole(folder / "config.yaml", yaml.safe_dump({"format": FORMAT} | dump(run), sort_keys=False).encode())
    except OSError as error:
        raise UserError(f"{folder}/config.yaml cannot be written: {error.strerror}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The tree in a run's config.yaml, migrated, for `load`. Raises UserError where there is none."""
    refuse_no_run(folder)
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}/config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder}/config.yaml is damaged: it holds no settings")
    format = tree.pop("format", UNSTATED)
    refuse_other_format(folder / "config.yaml", format)
    return migrate(tree, format)


def refuse_other_format(path: Path, format: Any) -> None:
    """Raises UserError where a file was written in a format that this program does not know."""
    if type(format) is not int or not UNSTATED <= format <= FORMAT:
        raise UserError(
            f"{path} has format {format}, this program reads {UNSTATED} to {FORMAT}: take the Headroom that wrote it"
        )


def resume_command(folder: Path) -> str:
    """What continues a run, for a shell."""
    return "python train.py " + shlex.quote(f"resume={folder}")


def refuse_no_run(folder: Path) -> None:
    """Raises UserError where the folder is not a run's."""
    if not (folder / "config.yaml").exists():
        for above in folder.parents[:2]:  # of a checkpoint, say
            if (above / "config.yaml").exists():
                raise UserError(f"{folder} is no run, but lies within one: give the run's folder, {above}")
        raise UserError(
            f"{folder} is not a run: it has no config.yaml; runs are made in {RUNS}/, or where run_dir= says"
        )


def refuse_other_settings(folder: Path, run: Run, trained: Mapping[str, Any], done: int) -> None:
    """Raises UserError where `run` is not the run whose settings were `trained` for its first `done` steps, or where
    its schedule does not allow another number of steps any more."""
    now, before = leaves(dump(run)), leaves(dump(load(trained)))  # with what was no setting yet, as it was then
    before["tokenizer.path"] = now.get("tokenizer.path")  # of a run that began with another's, its own copy
    for key in now:
        if key.split(".")[0] not in RESUMABLE and now.get(key) != before.get(key):
            raise UserError(
                f"{folder}/config.yaml says {key}: {now.get(key)}, the run was trained with {before.get(key)}: "
                "bring the run's own config.yaml back, or start a new run"
            )
    if done > run.steps:
        raise UserError(f"steps={run.steps} is less than the {done} steps that {folder} has done: give a larger steps=")
    if done == run.steps and not unscored(read_metrics(folder / "metrics.jsonl"), done):
        raise UserError(f"{folder} is complete at step {done} of steps={run.steps}: give a larger steps=")
    if run.steps != trained["steps"]:
        open_steps = [run.schedule.first_open_step(steps) for steps in (trained["steps"], run.steps)]
        if None in open_steps:
            log.info(
                f"the learning rate goes on along the curve of steps={run.steps}; up to step {done} it followed that "
                f"of steps={trained['steps']} (schedule=wsd leaves it open until the cooldown)"
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
    keys = [override.lstrip("+").partition("=")[0] for override in typed]
    if "init_from" in keys:
        raise UserError(
            f"resume={resume} with init_from: a run that goes on has weights already, its own; leave one of them out"
        )
    folder = newest() if resume == "latest" else Path(str(resume))
    stored = read_config(folder)
    for key in keys:
        if key.split(".")[0] not in (*RESUMABLE, "resume") and not _is_so(key, tree, stored):
            raise UserError(
                f"{key} cannot change on resume: only {', '.join(RESUMABLE)} may; the rest is the run's own, so leave "
                "it out"
            )
    if "path" in stored.get("tokenizer", {}):
        stored["tokenizer"]["path"] = str(folder / "tokenizer.json")  # the run it began with may be gone
    changed = {key.split(".")[0] for key in keys} & {*RESUMABLE}
    try:
        run = load(stored | {key: tree[key] for key in changed})
    except UserError as error:
        raise UserError(f"{error} (in {folder}/config.yaml, or on the command line)") from None
    return run, folder, claim(folder)


def _is_so(key: str, tree: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a setting or a choice that was typed is the one that the run was made with."""
    try:
        return dump(load(_with(stored, tree, key.split(".")))) == dump(load(stored))
    except (UserError, KeyError, TypeError):
        return False


def _with(stored: Mapping[str, Any], tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """`stored`, but at `path` what `tree` has there."""
    name, *rest = path
    return {**stored, name: _with(stored[name], tree[name], rest) if rest else tree[name]}


def newest(with_checkpoint: bool = False) -> Path:
    """The run under runs/ that was begun or resumed last; or, with_checkpoint, that saved last."""
    pattern = "*/checkpoints/step_*" if with_checkpoint else "*/config.yaml"
    found = sorted(RUNS.glob(pattern), key=_touched)
    if not found:
        what = "run with a checkpoint" if with_checkpoint else "run"
        raise UserError(f"there is no {what} in {RUNS.resolve()}: python train.py makes one")
    return found[-1].parents[1] if with_checkpoint else found[-1].parent


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a run in training removes its old checkpoints
        return 0.0


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
        "packages": {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
    }


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as `group.key`: value."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _words() -> str:
    return f"{random.choice(ADJECTIVES.split())}-{random.choice(ANIMALS.split())}"


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
