"""Saving and loading without pickle: tensors as safetensors, the rest as JSON.

checkpoints/step_00000200/model.safetensors      float32 weights, tied tensors once, the real vocabulary only
                          optimizer.safetensors  its tensors, as "<parameter>/<state>"
                          state.json             what State says
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file

from data.errors import UserError
from data.prepare import Prepared
from data.tokenizer import Tokenizer, load_tokenizer
from model.transformer import ModelConfig, TransformerLM
from training.config import Run, load
from training.run_folder import read_config, write_config

VERSION = 1
log = logging.getLogger("headroom")


class State(NamedTuple):
    """What a checkpoint holds besides tensors."""

    version: int
    step: int  # updates done
    sequences: int  # training windows seen: the next is number `sequences`
    tokenizer: str  # its hash
    corpus: str  # its fingerprint


def save(
    folder: Path, model: TransformerLM, optimizer: torch.optim.Optimizer, step: int, sequences: int, corpus: Prepared
) -> Path:
    """Writes checkpoints/step_XXXXXXXX of the run in `folder`, in a temporary folder that is then renamed."""
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step_{step:08d}"
    state = State(VERSION, step, sequences, corpus.tokenizer.hash, corpus.fingerprint)
    try:
        checkpoints.mkdir(exist_ok=True)
        writing = Path(tempfile.mkdtemp(prefix=".writing-", dir=checkpoints))
        try:
            weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, writing / "model.safetensors")
            save_file(_optimizer_tensors(model, optimizer), writing / "optimizer.safetensors")
            (writing / "state.json").write_text(json.dumps(state._asdict()))
            writing.chmod(0o755)
            os.rename(writing, final)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the checkpoint {final} cannot be written: {error}") from None
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return max(folder.glob("checkpoints/step_*"), default=None)


def resume(folder: Path, run: Run, corpus: Prepared, model: TransformerLM, optimizer: torch.optim.Optimizer) -> int:
    """Fills model and optimizer from the run's newest checkpoint -> how many steps are done; 0, saying so, where there
    is none yet. Raises UserError, and leaves the run as it was, where the data is not what the run began with, the
    checkpoint is damaged, or nothing is left to do."""
    checkpoint = latest(folder)
    state = None if checkpoint is None else _read_state(checkpoint)
    if state and state.corpus != corpus.fingerprint:
        raise UserError(
            f"the documents of {folder} have changed since it was trained (fingerprint {state.corpus[:12]}, now "
            f"{corpus.fingerprint[:12]}): bring them back, or start a new run"
        )
    refuse_other_tokenizer(folder, load_tokenizer(folder / "tokenizer.json"), corpus.tokenizer.hash)
    if state and state.sequences != state.step * run.sequences:
        raise UserError(
            f"{checkpoint} has seen {state.sequences} windows in {state.step} steps, which batch_tokens="
            f"{run.batch_tokens} in {folder}/config.yaml does not make: bring the run's own config.yaml back"
        )
    if state and state.step >= run.steps:
        raise UserError(f"{folder} is complete at step {state.step} of steps={run.steps}: give a larger steps=")
    if state:
        _load_weights(checkpoint, model)
        _load_optimizer(checkpoint, model, optimizer)
        log.info(f"resuming {folder} after step {state.step}")
    else:
        log.info(f"{folder} has no checkpoint yet: starting at step 0")
    write_config(folder, run)
    return state.step if state else 0


def load_run(folder: Path | str, device: torch.device | str = "cpu", **changes: Any) -> tuple[TransformerLM, Tokenizer]:
    """A run's newest weights, in float32, and its tokenizer.

    changes: `kernel`, a Kernel; `execution`, for MLA: naive, expanded or absorbed. Raises UserError where the run has
    no checkpoint, a file of it is damaged, or its files do not belong together.
    """
    folder = Path(folder)
    run = load(read_config(folder))
    checkpoint = latest(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: train it on with python train.py resume={folder}")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    refuse_other_tokenizer(folder, tokenizer, _read_state(checkpoint).tokenizer)
    with torch.device("meta"):
        model = TransformerLM(changed(run.model, **changes), tokenizer.vocab_size)
    model.to_empty(device="cpu")
    _load_weights(checkpoint, model)
    return model.to(device), tokenizer


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


def refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer, expected: str) -> None:
    """Raises UserError where a run's tokenizer.json is not the tokenizer its tokens were made with."""
    if tokenizer.hash != expected:
        raise UserError(
            f"{folder}/tokenizer.json ({tokenizer.hash[:12]}) is not the tokenizer of its tokens ({expected[:12]}): "
            "bring the run's own tokenizer.json and data back, or start a new run"
        )


def _read_state(checkpoint: Path) -> State:
    try:
        content = json.loads((checkpoint / "state.json").read_text())
        if content["version"] != VERSION:
            raise UserError(f"{checkpoint} has format version {content['version']}, this program reads {VERSION}")
        return State(**content)
    except OSError as error:
        raise UserError(f"{checkpoint}/state.json cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{checkpoint}/state.json is damaged") from None


def _load_optimizer(checkpoint: Path, model: TransformerLM, optimizer: torch.optim.Optimizer) -> None:
    index_of = {name: i for i, name in enumerate(_parameter_names(model, optimizer))}
    parameters, by_index = dict(model.named_parameters()), {i: {} for i in index_of.values()}
    try:
        for key, tensor in _read_tensors(checkpoint / "optimizer.safetensors").items():
            name, _, part = key.rpartition("/")
            by_index[index_of[name]][part] = tensor
            if tensor.ndim and tensor.shape != parameters[name].shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, not {tuple(parameters[name].shape)}")
        missing = [name for name, i in index_of.items() if not by_index[i]]
        if missing:
            raise ValueError(f"it holds nothing for {missing[0]}")
        optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError) as error:
        raise UserError(f"{checkpoint}/optimizer.safetensors does not fit this run's optimizer: {error}") from None


def _load_weights(checkpoint: Path, model: TransformerLM) -> None:
    weights = _read_tensors(checkpoint / "model.safetensors")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint}/model.safetensors does not fit the run's config.yaml: {reason}") from None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _parameter_names(model: TransformerLM, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the optimizer's own order, which its state is indexed by."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: TransformerLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{part}": tensor.contiguous() for i, parts in state.items() for part, tensor in parts.items()}
