"""Loading a trained model, for sampling, scripts and notebooks."""

from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.hf_names import is_published
from data.tokenizers.base import Tokenizer
from model.transformer import ModelConfig, TransformerLM
from training.run import checkpoint
from training.run.folder import check_is_run, read_tokenizer, resume_command, warn_if_it_diverged
from training.run.published import load_published, look_at


def load_run(
    folder: Path | str, device: torch.device | str = "cpu", which: str = "latest", **changes: Any
) -> tuple[TransformerLM, Tokenizer]:
    """Load a run's weights, in float32, and its tokenizer; or those of a published model, as hf:DIR.

    which: `latest` or `best`, which has the lowest validation loss of those kept. changes: `kernel`, a Kernel;
    `execution`, for MLA: naive, expanded or absorbed. Raises UserError where the run has no such checkpoint, a file of
    it is damaged, or its files do not belong together.
    """
    if is_published(folder):
        found = look_at(folder)
        return load_published(found, changed(found.run.model, **changes)).to(device), found.tokenizer
    folder = Path(folder)
    choose = checkpoint.newest if which == "latest" else checkpoint.best
    found = choose(folder, (checkpoint.MODEL,))
    if found is None:
        check_is_run(folder)
        lacking = "checkpoint" if which == "latest" else "checkpoint with a validation loss"
        raise UserError(f"{folder} has no {lacking} yet: train it on with {resume_command(folder)}")
    warn_if_it_diverged(folder)
    tokenizer = read_tokenizer(folder)
    checkpoint.check_tokenizer(folder, tokenizer, found.manifest.tokenizer)
    config = changed(checkpoint.settings_of(found.path, found.manifest).model, **changes)
    return checkpoint.load_model(found, config, tokenizer.vocab_size).to(device), tokenizer


def changed(config: ModelConfig, kernel=None, execution: str | None = None) -> ModelConfig:
    """Change the kernel or the execution of a model; its weights stay as they are."""
    if kernel is not None:
        config = config.model_copy(update={"kernel": kernel})
    if execution is not None:
        if execution not in config.attention.executions:
            kind = config.attention.describe(config.n_heads)
            raise UserError(f"execution={execution}: the attention of this run ({kind}) runs in one way only")
        config = config.model_copy(update={"attention": config.attention.with_execution(execution)})
    return config
