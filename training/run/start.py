"""Which run this process trains: a new one, one that goes on, or one that begins with another's weights."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.tokenizers.load import load_tokenizer
from model.transformer import TransformerLM
from training.run import checkpoint
from training.run.config import Run, dump, load
from training.run.folder import newest, refuse_no_run, refuse_unmakeable, resume_command
from training.run.resume import resumed

log = logging.getLogger("headroom")
OWNED = ("model", "attention", "mlp", "tokenizer")  # what weights depend on
STRETCH = ("attention.rope_scaling", "attention.rope_factor", "attention.rope_original_context")
ADJUSTABLE = ("model.dropout", "attention.dropout", "model.context_length", *STRETCH)  # and what of it they do not


def resolve_run(tree: dict[str, Any], typed: list[str]) -> tuple[Run, Path | None, AbstractContextManager | None]:
    """The run, and its folder, claimed, if it has one already.

    tree: the composed configuration; typed: the overrides on the command line.
    """
    resume = tree.pop("resume")
    if resume is not None:
        run, folder, run_lock = resumed(resume, tree, typed)
        checkpoint.refuse_unfit(folder, run)
        return run, folder, run_lock
    if tree["init_from"] is not None:
        base = str(tree["init_from"])
        if not base:
            raise UserError("init_from= names no run: give a run's folder, or latest")
        base = str(newest(with_checkpoint=True)) if base == "latest" else base
        tree = {**config_from_base_run(Path(base), tree, typed), "init_from": base}
    run = load(tree)
    if not run.dry_run:
        refuse_unmakeable(run.run_dir)
    return run, None, None


def config_from_base_run(base: Path, tree: Mapping[str, Any], typed: list[str]) -> dict[str, Any]:
    """The composed settings of a run that begins with the weights of `base`, whose model and tokenizer it takes over.

    typed: the overrides on the command line. Raises UserError for one that would make another model or vocabulary.
    """
    found = checkpoint.newest(base, (checkpoint.MODEL,))
    if found is None:
        refuse_no_run(base)
        raise UserError(f"init_from={base} has no checkpoint yet: train it on with {resume_command(base)}")
    checkpoint.refuse_not_finite(found)
    tokenizer = load_tokenizer(base / "tokenizer.json")
    checkpoint.refuse_other_tokenizer(base, tokenizer, found.manifest.tokenizer)
    their_run = checkpoint.settings_of(found.path, found.manifest)
    checkpoint.refuse_other_weights(found, their_run.model, tokenizer.vocab_size)
    theirs, trained_on = {group: dump(their_run)[group] for group in OWNED}, their_run.model.context_length
    for key in (override.lstrip("+~").partition("=")[0] for override in typed):
        group, _, name = key.partition(".")
        if key == "model.context_length" and theirs["model"].get("position_embedding") == "learned":
            raise UserError(
                f"{key} cannot be chosen with init_from={base}: its learned positions are the "
                f"{theirs['model']['context_length']} of its context"
            )
        if key in ADJUSTABLE and name in theirs[group]:
            theirs[group][name] = tree[group][name]
        elif group == "tokenizer":
            raise UserError(
                f"{key} cannot be chosen with init_from={base}: its weights know the {tokenizer.vocab_size:,} tokens "
                f"of {base}/tokenizer.json"
            )
        elif group in (*OWNED, "position"):
            may = [key for key in ADJUSTABLE if key.partition(".")[2] in theirs[key.partition(".")[0]]]
            raise UserError(
                f"{key} cannot be chosen with init_from={base}: the model is that run's; {' and '.join(may)} may change"
            )
    attention = theirs["attention"]
    if attention.get("rope_scaling") == "yarn" and attention["rope_original_context"] is None:
        attention["rope_original_context"] = trained_on  # which only the base knows
    theirs["tokenizer"] = {
        "_target_": "data.tokenizers.load.StoredConfig",
        "path": str(base / "tokenizer.json"),
        "hash": tokenizer.hash,
    }
    return {**tree, **theirs}


def load_pretrained_weights(base: Path, model: TransformerLM) -> None:
    """Those of its newest whole checkpoint."""
    found = checkpoint.newest(base, (checkpoint.MODEL,))
    if found is None:
        raise UserError(f"init_from={base} has no checkpoint any more: bring it back")
    checkpoint.load_weights(found, model)
    log.info(f"beginning with the weights of {found.path}")
