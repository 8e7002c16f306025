"""Starting a run: a new one, one that is resumed, or one that begins with the weights of another (fine-tuning)."""

import copy
import functools
import logging
import operator
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import process
from common.errors import UserError
from common.hf_names import folder_of, is_published
from common.settings import Change
from data.shards.prepare import Prepared
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import StoredConfig
from model.initialise import initial_weight, without_matrices
from model.rope import FROM_CONTEXT
from runtime.allocator import keep_buffers
from runtime.world import ONE, World
from training.run import checkpoint
from training.run.changes import change_of
from training.run.composer import compose_tree
from training.run.config import Run, dump, flatten_config, pop_command_settings
from training.run.experiments import experiment_named
from training.run.folder import (
    acquire_run_lock,
    check_is_run,
    check_makeable,
    checkpoint_paths,
    find_run,
    read_tokenizer,
    resume_command,
    warn_if_it_diverged,
)
from training.run.published import check_before_training, load_published, look_at
from training.run.resume import open_run
from training.state import TrainState

log = logging.getLogger("headroom")


def resolve_run(
    tree: dict[str, Any], typed: list[str], held: ExitStack, resume: Any = None, locks: bool = True
) -> tuple[Run, Path | None]:
    """Determine the run; and its folder, if it has one already.

    tree: the composed configuration; typed: the overrides on the command line; held: takes the lock on the folder;
    resume: the folder to go on with, or latest; locks: false in processes beside the one that holds the lock.
    """
    if resume is not None:
        run, folder = open_run(str(resume), tree, typed)
        if locks:
            held.enter_context(acquire_run_lock(folder))
        checkpoint.check_fits(folder, run)
        return run, folder
    with experiment_named(typed):
        run = run_of(tree, typed)
    if not run.dry_run and locks:
        check_makeable(run.run_dir)
    return run, None


def run_of(tree: Mapping[str, Any], typed: list[str]) -> Run:
    """The new run of a composed configuration; where it begins with the weights of another, with that one's model and
    tokenizer. typed: the overrides on the command line."""
    if tree["init_from"] is not None:
        base = find_run("init_from", str(tree["init_from"]), with_checkpoint=True)
        tree = {**config_from_base_run(base, tree, typed), "init_from": str(base)}
    run = Run.from_tree(tree)
    if isinstance(run.tokenizer, StoredConfig) and run.data.numbers is not None:
        run.tokenizer.check_numbers(run.data.name, run.data.numbers)
    return run


def compose_start(*overrides: str) -> Run:
    """The new run that `python train.py *overrides` begins: `compose` knows of no base run. Raises UserError."""
    tree = compose_tree(*overrides)
    pop_command_settings(tree)
    return run_of(tree, list(overrides))


def config_from_base_run(base: Path, tree: Mapping[str, Any], typed: list[str]) -> dict[str, Any]:
    """Replace the model and the tokenizer of the composed settings by those of `base`, whose weights the run begins
    with.

    typed: the overrides on the command line. Raises UserError for one that would make another model or vocabulary.
    """
    base_run, tokenizer = _base_run(base)
    settings = dump(base_run)
    owned = copy.deepcopy({group: settings[group] for group in settings if change_of(base_run, group) == Change.NEVER})
    for key in (override.lstrip("+~").partition("=")[0] for override in typed):
        group = key.partition(".")[0]
        if _adds_indexer(key, settings["attention"], tree["attention"]):
            if is_published(base):
                raise UserError(
                    f"{key} cannot add an indexer to {base}: begin a run with it, and then another with that"
                )
            owned["attention"]["indexer"] = tree["attention"]["indexer"]
        elif group in owned or group == "position":  # which sets what the model owns
            _check_changeable(key, base, base_run, tokenizer.vocab_size)
            *path, name = key.split(".")
            into, taken = (functools.reduce(operator.getitem, path, of) for of in (owned, tree))
            into[name] = taken[name]
    if _has_indexer(settings["attention"]) and not _has_indexer(owned["attention"]):
        raise UserError(
            f"attention.indexer.top_k cannot be unset with init_from={base}, whose weights have an indexer: choose as "
            "many keys as model.context_length for dense attention"
        )
    attention = owned["attention"]
    if attention.get("rope_scaling") in FROM_CONTEXT and attention["rope_original_context"] is None:
        attention["rope_original_context"] = base_run.model.context_length  # which only the base knows
    owned["tokenizer"] = {
        "_target_": "data.tokenizers.load.StoredConfig",
        "path": str(folder_of(base) / "tokenizer.json"),
        "hash": tokenizer.hash,
    }
    return {**tree, **owned}


def _adds_indexer(key: str, base: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a setting gives the attention of a base run, which had none, an indexer: as attention=dsa does to mla."""
    if key != "attention" and not key.startswith("attention.indexer."):
        return False
    adds = _has_indexer(wanted) and not _has_indexer(base)
    return adds and base["_target_"] == wanted["_target_"]


def _has_indexer(attention: Mapping[str, Any]) -> bool:
    return attention.get("indexer", {}).get("top_k") is not None


def _base_run(base: Path) -> tuple[Run, Tokenizer]:
    """Read what the newest whole checkpoint was trained with. Raises UserError where nothing can begin with its
    weights."""
    if is_published(base):
        published = look_at(base)
        check_before_training(published)
        return published.run, published.tokenizer
    found = checkpoint.newest(base, (checkpoint.MODEL,))
    if found is None:
        check_is_run(base)
        raise UserError(f"init_from={base} has no checkpoint yet: train it on with {resume_command(base)}")
    checkpoint.check_finite(found)
    warn_if_it_diverged(base)
    tokenizer = read_tokenizer(base)
    checkpoint.check_tokenizer(base, tokenizer, found.manifest.tokenizer)
    run = checkpoint.settings_of(found.path, found.manifest)
    checkpoint.check_weights(found, run.model, tokenizer.vocab_size)
    return run, tokenizer


def _check_changeable(key: str, base: Path, base_run: Run, vocab_size: int) -> None:
    """Raise UserError where a setting of the model or the tokenizer must be as it is in the base run."""
    refused = f"{key} cannot be chosen with init_from={base}"
    if key == "model.context_length" and base_run.model.position_embedding == "learned":
        raise UserError(f"{refused}: its learned positions are the {base_run.model.context_length} of its context")
    if change_of(base_run, key) >= Change.FINE_TUNING:
        return
    if key.partition(".")[0] == "tokenizer":
        raise UserError(f"{refused}: its weights know the {vocab_size:,} tokens of {base}/tokenizer.json")
    settings = flatten_config({group: dump(base_run)[group] for group in ("model", "attention")})
    may = [name for name in settings if change_of(base_run, name) >= Change.FINE_TUNING]
    raise UserError(f"{refused}: the model is that run's; {', '.join(may)} may change")


def _state_from_base(run: Run, base: Path, vocab_size: int, device: torch.device, world: World) -> TrainState:
    """The state that begins with the weights of the base run's newest whole checkpoint. An indexer that it had not
    begins freshly initialised."""
    if is_published(base):
        return _state_from_published(run, base, device, world)
    share = checkpoint.share_of(run, vocab_size, world)
    found = checkpoint.newest(base, (checkpoint.MODEL,), share)
    if found is None:
        raise UserError(f"init_from={base} has no checkpoint any more: bring it back")
    log.info(f"loaded the weights of {found.path}")
    added = _fresh_indexers(run, vocab_size, found.tensors[checkpoint.MODEL].keys())
    if added:
        log.info(f"freshly initialised: {', '.join(added)}")
    found.written(checkpoint.MODEL).update(added)
    found.tensors[checkpoint.MODEL].update({name: one[share.rows(name)].clone() for name, one in added.items()})
    return checkpoint.state_with_weights(found, run, vocab_size, device, world)


def _state_from_published(run: Run, base: Path, device: torch.device, world: World) -> TrainState:
    """The state that begins with published weights, which every process reads whole."""
    model = load_published(look_at(base), run.model)
    log.info(f"loaded the weights of {folder_of(base)}")
    return TrainState.of(run, model if run.parallel.shards else model.to(device), world)


def _fresh_indexers(run: Run, vocab_size: int, known: Collection[str]) -> dict[str, Tensor]:
    """The weights of indexers, whole, that are not known."""
    model = without_matrices(run.model, vocab_size)
    layouts = model.layout()
    names = [f"{path}.{name}" for path, one in model.indexers().items() for name, _ in one.named_parameters()]
    return {name: initial_weight(model, layouts, name, run.seed) for name in names if name not in known}


def begin_or_resume(
    run: Run,
    corpus: Prepared,
    device: torch.device,
    world: World,
    folder: Path | None,
    make: Callable[[], Path],
) -> tuple[TrainState, Path]:
    """The training state of a run, from its newest checkpoint if it has one; and its folder. world: the processes that
    train it; folder: None for a new run, of which make() makes one, in the first process."""
    if device.type == "cpu" and run.tune_malloc:
        keep_buffers()
    state = folder and checkpoint.restore(folder, run, corpus, device, world)
    if state is None:
        state = first_state(run, corpus.tokenizer.vocab_size, device, world)
    if folder is None:
        folder = world.from_first(make() if world.is_first else None)
    return state, folder


def first_state(run: Run, vocab_size: int, device: torch.device, world: World = ONE) -> TrainState:
    """The state that a run begins with: the weights of its base, or freshly initialised ones."""
    if run.init_from is not None:
        return _state_from_base(run, Path(run.init_from), vocab_size, device, world)
    state = TrainState.create(run, vocab_size, device, world)
    if state.model.frozen_in_warmup():
        log.warning(
            "attention.indexer.stage=warmup trains the indexer alone, and all other weights stay random: give "
            "init_from= of a trained run, or choose attention.indexer.stage=sparse"
        )
    return state


def how_to_continue(folder: Path) -> str:
    """The command that resumes a run, or begins it again where nothing is saved."""
    if process.in_sweep:
        return "its sweep goes on with it"
    verb = "continue" if checkpoint_paths(folder) else "begin again"
    return f"{verb} with: {resume_command(folder)}"
