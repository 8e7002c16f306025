"""A trained model, for sampling, scripts and notebooks."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.tokenizer import Tokenizer, load_tokenizer
from model.transformer import ModelConfig, TransformerLM
from training import checkpoint
from training.config import load
from training.run_folder import refuse_no_run, resume_command

log = logging.getLogger("headroom")


def load_run(
    folder: Path | str, device: torch.device | str = "cpu", which: str = "latest", **changes: Any
) -> tuple[TransformerLM, Tokenizer]:
    """A run's weights, in float32, and its tokenizer.

    which: `latest` or `best`, which has the lowest validation loss of those kept. changes: `kernel`, a Kernel;
    `execution`, for MLA: naive, expanded or absorbed. Raises UserError where the run has no such checkpoint, a file of
    it is damaged, or its files do not belong together.
    """
    folder = Path(folder)
    if which == "latest":
        found = checkpoint.newest(folder, (checkpoint.MODEL,))
    else:
        chosen = checkpoint.best(folder)
        found = chosen and checkpoint.read(chosen, (checkpoint.MODEL,))
    if found is None:
        refuse_no_run(folder)
        raise UserError(f"{folder} has no {which} checkpoint yet: train it on with {resume_command(folder)}")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    checkpoint.refuse_other_tokenizer(folder, tokenizer, found.manifest.tokenizer)
    model = empty_model(changed(load(found.manifest.config).model, **changes), tokenizer.vocab_size)
    checkpoint.load_weights(found, model)
    return model.to(device), tokenizer


OWNED = ("model", "attention", "mlp", "tokenizer")  # what weights depend on
ADJUSTABLE = ("model.dropout", "model.context_length")  # and what of it they do not


def begun_from(base: Path, tree: Mapping[str, Any], typed: list[str]) -> dict[str, Any]:
    """The composed settings of a run that begins with the weights of `base`, whose model and tokenizer it takes over.

    typed: the overrides on the command line. Raises UserError for one that would make another model or vocabulary.
    """
    found = checkpoint.newest(base, (checkpoint.MODEL,))
    if found is None:
        refuse_no_run(base)
        raise UserError(f"init_from={base} has no checkpoint yet: train it on with {resume_command(base)}")
    tokenizer = load_tokenizer(base / "tokenizer.json")
    checkpoint.refuse_other_tokenizer(base, tokenizer, found.manifest.tokenizer)
    theirs = {group: dict(found.manifest.config[group]) for group in OWNED}
    for key in (override.lstrip("+~").partition("=")[0] for override in typed):
        group, _, name = key.partition(".")
        if key in ADJUSTABLE:
            theirs[group][name] = tree[group][name]
        elif group == "tokenizer":
            raise UserError(
                f"{key} cannot be chosen with init_from={base}: its weights know the {tokenizer.vocab_size:,} tokens "
                f"of {base}/tokenizer.json"
            )
        elif group in OWNED:
            raise UserError(
                f"{key} cannot be chosen with init_from={base}: the model is that run's; "
                f"{' and '.join(ADJUSTABLE)} may change"
            )
    theirs["tokenizer"] = {
        "_target_": "data.tokenizer.StoredConfig",
        "path": str(base / "tokenizer.json"),
        "hash": tokenizer.hash,
    }
    return {**tree, **theirs}


def begin_with_weights_of(base: Path, model: TransformerLM) -> None:
    """Those of its newest whole checkpoint."""
    found = checkpoint.newest(base, (checkpoint.MODEL,))
    if found is None:
        raise UserError(f"init_from={base} has no checkpoint any more: bring it back")
    checkpoint.load_weights(found, model)
    log.info(f"beginning with the weights of {found.path}")


def empty_model(config: ModelConfig, vocab_size: int) -> TransformerLM:
    """A model whose weights are yet to be loaded."""
    with torch.device("meta"):
        model = TransformerLM(config, vocab_size)
    return model.to_empty(device="cpu")


def changed(config: ModelConfig, kernel=None, execution: str | None = None) -> ModelConfig:
    """The same weights, run in another way."""
    if kernel is not None:
        config = config.model_copy(update={"kernel": kernel})
    if execution is not None:
        if execution not in config.attention.executions:
            kind = type(config.attention).__name__.removesuffix("Config")
            raise UserError(f"execution={execution}: the attention of this run, {kind}, runs in one way only")
        config = config.model_copy(update={"attention": config.attention.model_copy(update={"execution": execution})})
    return config
