"""Run folders: how they are named, locked and found again, and their config.yaml and environment.yaml."""

import functools
import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from common import plain_yaml
from common.atomic_io import (
    NOT_THERE,
    UNFINISHED,
    NotRegularFile,
    exists,
    make_folder,
    names_in,
    read_regular,
    remove_unfinished,
    write_atomic,
)
from common.errors import UserError, reason
from common.invocation import ROOT, command
from common.lock import lock
from common.overrides import format_override
from common.paths import entering, is_folder, raise_unreadable
from common.suggestions import DOTTED_CUTOFF, nearest
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from training.metrics_file import ended_skipping
from training.run.config import Run, dump
from training.run.migrate import FORMAT, UNSTATED, migrate, stated_format
from training.run.signature import signature

RUNS = Path("runs")
log = logging.getLogger("headroom")
MAX_CONFIG_BYTES = 2**18  # a usual one has 2,000
FILES_BEFORE_CONFIG = {".lock", "environment.yaml", "tokenizer.json"}  # made before config.yaml
ADJECTIVES = "amber brave calm clever copper eager gentle golden keen mellow quiet swift"
ANIMALS = "badger crane falcon finch fox hare heron ibex lynx marten otter owl"


def check_makeable(run_dir: str | None) -> None:
    """Raise UserError where no new run's folder can be made: nothing can be written there, which only trying shows
    (root may write where its access bits say no), or run_dir is there, with more in it than what a process left that
    was killed while it made one."""
    folder = Path(run_dir or RUNS)
    try:
        names = {path.name for path in folder.iterdir()} if run_dir and folder.is_dir() else set()
        ours = ".lock" in names and all(name in FILES_BEFORE_CONFIG or name.startswith(UNFINISHED) for name in names)
        taken = bool(names) and not ours
        if run_dir and (taken or folder.is_file()):
            others = f", or continue it with {resume_command(folder)}" if "config.yaml" in names else ""
            raise UserError(f"run_dir={folder} exists already: choose another{others}")
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=there):
            pass
    except OSError as error:
        raise _not_makeable(run_dir, folder, error) from None


def _not_makeable(run_dir: str | None, folder: Path, error: OSError) -> UserError:
    named = f"run_dir={folder}" if run_dir else f"the run's folder {folder}"
    return UserError(f"{named} cannot be made: {reason(error)}: give a folder to write to as run_dir=")


def acquire_run_lock(folder: Path) -> AbstractContextManager:
    """Lock the run's folder for this process, and remove what a killed one left half-written. Raises UserError where
    another one trains in it."""
    try:
        run_lock = lock(folder / ".lock", f"another process is training in {folder}: wait for it, or stop it first")
    except NotRegularFile as error:
        raise UserError(f"{folder}/.lock cannot be held: {reason(error)}: remove it") from None
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written: {reason(error)}: let this user write to it"
        ) from None
    for place in (folder, folder / "checkpoints", folder / "failures"):
        remove_unfinished(place)
    return run_lock


def create(run: Run, tokenizer: Tokenizer, choices: Mapping[str, str], held: ExitStack) -> Path:
    """Make and lock a new folder, run_dir or runs/<time>-<words>, with all that is known before the first step.
    choices: the choice of each group that the run was composed of; held: takes the lock."""
    check_makeable(run.run_dir)
    try:
        folder = _made_folder(run.run_dir)
        held.enter_context(acquire_run_lock(folder))
        known = environment() | {"choices": {group: name for group, name in choices.items() if group.isidentifier()}}
        write_atomic(folder / "environment.yaml", yaml.safe_dump(known, sort_keys=False).encode())
        tokenizer.save(folder / "tokenizer.json")
        write_config(folder, run)
    except OSError as error:
        raise _not_makeable(run.run_dir, Path(run.run_dir or RUNS), error) from None
    return folder


def _made_folder(run_dir: str | None) -> Path:
    """Make the folder of a new run. Without run_dir one that no other process has: its making decides, since another
    run may begin in the same second."""
    if run_dir:
        make_folder(Path(run_dir))
        return Path(run_dir)
    folder = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{_words()}"
    while True:
        try:
            make_folder(folder, exist_ok=False)
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{folder.name}-{_words()}")


def write_config(folder: Path, run: Run) -> None:
    """Write config.yaml, with every derived value filled in, signed. Replaced as a whole or not at all."""
    tree = {"format": FORMAT, "signature": signature(run)} | dump(run)
    content = yaml.safe_dump(tree, sort_keys=False).encode()
    if len(content) > MAX_CONFIG_BYTES:
        raise UserError(
            f"the settings are {len(content):,} bytes of config.yaml, {MAX_CONFIG_BYTES:,} are read: give fewer parts"
        )
    try:
        write_atomic(folder / "config.yaml", content)
    except OSError as error:
        raise UserError(f"{folder}/config.yaml cannot be written: {reason(error)}") from None


def read_config(folder: Path) -> tuple[dict[str, Any], Any]:
    """Read a run's config.yaml -> the tree in it, migrated, for `load`, and its signature, if any. Raises UserError
    where there is none."""
    check_is_run(folder)
    try:
        tree = plain_yaml.parse(read_regular(folder / "config.yaml", MAX_CONFIG_BYTES).decode())
        if not isinstance(tree, dict):
            raise ValueError("it holds no settings")
        signed, format = tree.pop("signature", None), stated_format(tree)
        check_format(folder / "config.yaml", format)
        return migrate(tree, format), signed
    except RecursionError:
        fault = "it is nested too deeply"
    except OSError as error:
        fault = reason(error)
    except (ValueError, yaml.YAMLError) as error:
        fault = str(error).splitlines()[0]
    raise UserError(
        f"{folder}/config.yaml cannot be read: {fault}: bring the run's own file back{_without_config(folder)}"
    )


def _without_config(folder: Path) -> str:
    """What can be done where config.yaml is lost, as the end of an error."""
    if not checkpoint_paths(folder):
        return ""
    begin = format_override("init_from", str(folder))
    return f" (a checkpoint's manifest.json holds the same settings), or begin a new run with its weights: {begin}"


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read a run's tokenizer.json. Raises UserError where it is missing or damaged."""
    try:
        return load_tokenizer(folder / "tokenizer.json")
    except UserError as error:
        raise UserError(
            f"{error}: bring the run's own back; the run's prepared text, in its cache_dir, has a copy of it"
        ) from None


def warn_if_it_diverged(folder: Path) -> None:
    """Warn of the weights of a run that ended in skipped updates."""
    if ended_skipping(folder / "metrics.jsonl"):
        log.warning(
            f"{folder} diverged: its last update was skipped, and its weights may write nonsense; take another run"
        )


def check_format(path: Path, format: Any) -> None:
    """Raise UserError where a file was written in a format that this program does not know."""
    if type(format) is not int or not UNSTATED <= format <= FORMAT:
        raise UserError(
            f"{path} has format {format}, this program reads {UNSTATED} to {FORMAT}: take the Headroom that wrote it"
        )


def resume_command(folder: Path) -> str:
    """Return the shell command that resumes a run."""
    return command("train.py", format_override("resume", str(folder)))


def check_is_run(folder: Path) -> None:
    """Raise UserError where the folder is not that of a run, or may not be entered."""
    with entering(folder):
        if exists(folder / "config.yaml"):
            return
        above = next((above for above in folder.parents[:2] if exists(above / "config.yaml")), None)
    if above is not None:  # of a checkpoint, say
        raise UserError(f"{folder} is no run, but lies within one: give the run's folder, {above}")
    within = _run_within(folder)
    if within is not None:  # a sweep's, say
        raise UserError(f"{folder} is not a run, but has some within: give one of them, as {within}")
    if is_folder(str(folder)) and checkpoint_paths(folder):
        raise UserError(f"{folder} has no config.yaml: bring it back{_without_config(folder)}")
    meant = f"hf:{folder}, which is a published model" if exists(folder / "config.json") else _meant(folder)
    fault = "it has no config.yaml" if exists(folder) else "there is no such folder"
    way_out = f"did you mean {meant}?" if meant else f"runs are made in {RUNS}/, or where run_dir= says"
    raise UserError(f"{folder} is not a run: {fault}; {way_out}")


def _run_within(folder: Path) -> Path | None:
    try:
        return next((folder / name for name in sorted(names_in(folder)) if exists(folder / name / "config.yaml")), None)
    except OSError:
        return None


def _meant(folder: Path) -> Path | None:
    """The folder under runs/ that has that name, or of whose name it is most likely a slip."""
    try:
        name = nearest(folder.name, names_in(RUNS), DOTTED_CUTOFF)
    except OSError:
        return None
    return RUNS / name if name and RUNS / name != folder else None


def find_run(setting: str, name: str, with_checkpoint: bool = False) -> Path:
    """Find the folder that resume= or init_from= names: its path, or `latest`. Raises UserError where it names none."""
    if not name:
        raise UserError(f"{setting}= names no run: give a run's folder, or latest")
    if name == "latest":
        return newest(with_checkpoint)
    if name in ("last", "newest") and not os.path.lexists(name):
        raise UserError(f"{setting}={name}: there is no such folder; did you mean {setting}=latest?")
    return Path(name)


def parallel_of(resume: str, tree: Mapping[str, Any], typed: Sequence[str]) -> Mapping[str, Any]:
    """The setting parallel= of a run that is to be resumed: as typed, or its own."""
    if any(word.lstrip("+~").startswith("parallel") for word in typed):
        return tree["parallel"]
    try:
        return read_config(find_run("resume", resume))[0]["parallel"]
    except UserError:  # which whoever opens the run says, beside what else is wrong
        return tree["parallel"]


def newest(with_checkpoint: bool = False) -> Path:
    """The run under runs/ that was begun or resumed last; or, with_checkpoint, that saved last. One that cannot be read
    is named in a warning and passed over. Raises UserError where there is none, or runs/ cannot be read."""
    try:
        folders = [RUNS / name for name in names_in(RUNS)]
    except OSError as error:
        raise_unreadable(RUNS.resolve(), error)
    touched = {}
    for folder in folders:
        try:
            if not is_folder(str(folder)):  # as a file of somebody is not
                continue
            files = checkpoint_paths(folder) if with_checkpoint else [folder / "config.yaml"]
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
    """Return a file's time of modification; 0 where there is no such file: it may be no run, or one in training, which
    removes its old checkpoints."""
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


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps. Raises UserError where they cannot be listed."""
    try:
        paths = [folder / "checkpoints" / name for name in names_in(folder / "checkpoints")]
    except OSError as error:
        raise_unreadable(f"{folder}/checkpoints", error, "make it a folder that this user may read")
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


@functools.cache
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
