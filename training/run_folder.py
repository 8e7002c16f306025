"""The folder a run writes to: how it is named, found again, and what it records about its origin."""

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from data.errors import UserError
from data.tokenizer import Tokenizer
from training.config import ROOT, Run, dump, load

RUNS = Path("runs")
RESUMABLE = ("steps", "eval_every", "save_every", "logger")  # what may change when a run is resumed
ADJECTIVES = "amber brave calm clever copper eager gentle golden keen mellow quiet swift"
ANIMALS = "badger crane falcon finch fox hare heron ibex lynx marten otter owl"


def refuse_taken(run_dir: str | None) -> None:
    """Raises UserError where run_dir cannot become a new run's folder: it is not there, or it is empty."""
    if run_dir is None:
        return
    folder = Path(run_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"run_dir={folder} exists already: choose another, or continue it with resume={folder}")


def create(run: Run, tokenizer: Tokenizer) -> Path:
    """A new folder, run_dir or runs/<time>-<words>, with all that is known before the first step."""
    refuse_taken(run.run_dir)
    folder = Path(run.run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{_words()}")
    try:
        while not run.run_dir and folder.exists():
            folder = folder.with_name(f"{folder.name}-{_words()}")
        folder.mkdir(parents=True, exist_ok=bool(run.run_dir))
        (folder / "environment.yaml").write_text(yaml.safe_dump(environment(), sort_keys=False))
        tokenizer.save(folder / "tokenizer.json")
        write_config(folder, run)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from None
    return folder


def write_config(folder: Path, run: Run) -> None:
    """config.yaml, with every derived value filled in. Replaced as a whole or not at all."""
    temporary = folder / "config.yaml.tmp"
    try:
        temporary.write_text(yaml.safe_dump(dump(run), sort_keys=False))
        os.replace(temporary, folder / "config.yaml")
    except OSError as error:
        raise UserError(f"{folder}/config.yaml cannot be written: {error.strerror}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The tree in a run's config.yaml, for `load`. Raises UserError where there is none."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run, which is a folder with a config.yaml: resume=latest finds the newest")
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}/config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder}/config.yaml is damaged: it holds no settings")
    return tree


def resumed(resume: str, tree: Mapping[str, Any], typed: list[str]) -> tuple[Run, Path]:
    """The run to resume, a folder or `latest`, with its own stored settings and the few that may change.

    tree: the composed configuration; typed: the overrides on the command line. Raises UserError for one that may not
    change.
    """
    keys = [override.lstrip("+").partition("=")[0] for override in typed]
    for key in keys:
        if key.split(".")[0] not in (*RESUMABLE, "resume"):
            raise UserError(
                f"{key} cannot change on resume: only {', '.join(RESUMABLE)} may; the rest is the run's own"
            )
    if resume == "":
        raise UserError("resume= names no run: give a run's folder, or latest")
    folder = newest() if resume == "latest" else Path(str(resume))
    stored = read_config(folder)
    changed = {key.split(".")[0] for key in keys} - {"resume"}
    return load(stored | {key: tree[key] for key in changed}), folder


def newest(with_checkpoint: bool = False) -> Path:
    """The run under runs/ that was begun or resumed last; or, with_checkpoint, that saved last."""
    pattern = "*/checkpoints/step_*" if with_checkpoint else "*/config.yaml"
    found = sorted(RUNS.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        what = "run with a checkpoint" if with_checkpoint else "run"
        raise UserError(f"there is no {what} in {RUNS.resolve()}: python train.py makes one")
    return found[-1].parents[1] if with_checkpoint else found[-1].parent


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


def _words() -> str:
    return f"{random.choice(ADJECTIVES.split())}-{random.choice(ANIMALS.split())}"


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
