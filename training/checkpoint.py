"""Saving and loading without pickle: tensors as safetensors, the rest as JSON.

checkpoints/step_00000200/model.safetensors      float32 weights, tied tensors once, the real vocabulary only
                          optimizer.safetensors  its tensors, as "<parameter>/<state>"
                          manifest.json          what Manifest says, with the size and hash of the other files
"""

import hashlib
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from data.durable import discard, make_folder, whole_folder
from data.errors import UserError
from data.prepare import Prepared
from data.sealed import sealed, unsealed
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import Config
from model.transformer import TransformerLM
from training.config import Run, dump
from training.migrate import FORMAT, migrate
from training.precision import LossScale
from training.run_folder import refuse_other_format, refuse_other_settings, resume_command, write_config

MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
log = logging.getLogger("headroom")


class Training(NamedTuple):
    """All that a step changes."""

    model: TransformerLM
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None


class FileMark(Config):
    size: int  # bytes
    sha256: str


class Manifest(Config):
    """What a checkpoint holds besides tensors."""

    format: int
    step: int  # updates done
    val_loss: float | None  # nats per token on the first eval_tokens of the validation set, where it was scored
    loss_scale: LossScale.State | None
    tokenizer: str  # its hash
    corpus: str  # its fingerprint
    config: dict[str, Any]  # the run's, as in config.yaml
    machine: dict[str, str | int]  # what the bits depend on besides
    files: dict[str, FileMark]


class Checkpoint(NamedTuple):
    path: Path
    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]  # of each file that was asked for, in memory of their own


class Damaged(UserError):
    """A checkpoint, or a file of it, is not what was written."""


def save(folder: Path, run: Run, corpus: Prepared, training: Training, step: int, val_loss: float | None) -> None:
    """Writes checkpoints/step_XXXXXXXX of the run in `folder`, whole or not at all, then removes all but the last
    run.keep_last and the best."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    files = {MODEL: training.model.state_dict(), OPTIMIZER: _optimizer_tensors(training)}
    try:
        write(path, run, corpus, training, step, files, val_loss)
    except OSError as error:
        raise UserError(
            f"the checkpoint {path} cannot be written: {error.strerror or error}; what was saved before stands: "
            f"make room, then {resume_command(folder)}"
        ) from None
    done = [path for path in saved(folder) if step_of(path) <= step]
    for other in set(done[: -run.keep_last]) - {best(folder)}:
        try:
            discard(other)
        except OSError as error:
            log.warning(f"{other} cannot be removed: {error.strerror}")


def write(
    path: Path,
    run: Run,
    corpus: Prepared,
    training: Training,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    val_loss: float | None = None,
) -> None:
    """Tensors by file, and the manifest. Raises OSError, and leaves no trace."""
    make_folder(path.parent)
    with whole_folder(path) as writing:
        marks = {}
        for name, tensors in files.items():
            content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
            (writing / name).write_bytes(content)
            marks[name] = FileMark(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        manifest = Manifest(
            format=FORMAT,
            step=step,
            val_loss=val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            loss_scale=training.loss_scale and training.loss_scale.state(),
            tokenizer=corpus.tokenizer.hash,
            corpus=corpus.fingerprint,
            config=dump(run),
            machine=_machine(training.model),
            files=marks,
        )
        (writing / MANIFEST).write_text(sealed(manifest.model_dump()))


def step_of(path: Path) -> int:
    """A checkpoint's step, from its name; -1 for another name, such as a user's own copy may have."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() and digits != path.name else -1


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    return sorted((path for path in folder.glob("checkpoints/step_*") if step_of(path) >= 0), key=step_of)


def steps_done(folder: Path) -> int:
    """Of a run, as its newest checkpoint's name says."""
    return max(map(step_of, saved(folder)), default=0)


def read(path: Path, names: Collection[str]) -> Checkpoint:
    """A checkpoint with the tensors of the files named. Raises Damaged where one of them, or the manifest, is not what
    was written, and UserError where it was written in another format."""
    manifest = _read_manifest(path)
    tensors = {}
    for name in names:
        file = path / name
        try:
            content = file.read_bytes()  # not a map of the file: whoever overwrites it would overwrite the tensors
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {error.strerror}") from None
        mark = manifest.files.get(name)
        if mark is None or len(content) != mark.size or hashlib.sha256(content).hexdigest() != mark.sha256:
            raise Damaged(f"{file} is damaged: it is not what the manifest says was written")
        try:
            tensors[name] = safetensors.torch.load(content)
        except (SafetensorError, KeyError, AssertionError) as error:
            raise Damaged(f"{file} is damaged: {error}") from None
    return Checkpoint(path, manifest, tensors)


def newest(folder: Path, names: Collection[str]) -> Checkpoint | None:
    """The newest checkpoint of a run whose files, of those named, are whole; the damaged ones that were passed over are
    named in a warning. None where there is no checkpoint. Raises UserError where all are damaged."""
    faults = []
    for path in reversed(saved(folder)):
        try:
            found = read(path, names)
        except Damaged as fault:
            faults.append(str(fault))  # the exception itself would keep its frames alive, and the lock they hold
            continue
        for fault in faults:
            log.warning(f"{fault}; taking {path.name}, the newest whole checkpoint")
        return found
    if faults:
        raise UserError(f"{faults[0]}, and no older checkpoint is whole: bring one back, or start a new run")
    return None


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, of those saved where it was scored."""
    scores = {}
    for path in saved(folder):
        try:
            scores[path] = _read_manifest(path).val_loss
        except UserError:
            continue
    scored = {path: loss for path, loss in scores.items() if loss is not None}
    return min(scored, key=scored.get, default=None)


def resume(folder: Path, run: Run, corpus: Prepared, training: Training) -> int:
    """Fills `training` from the run's newest whole checkpoint -> how many steps are done; 0, saying so, where there is
    none yet. Raises UserError, and leaves the run as it was, where data or settings are not what the run began with,
    every checkpoint is damaged, or nothing is left to do."""
    refuse_other_tokenizer(folder, load_tokenizer(folder / "tokenizer.json"), corpus.tokenizer.hash)
    found = newest(folder, (MODEL, OPTIMIZER))
    if found is None:
        log.info(f"{folder} has no checkpoint yet: starting at step 0")
    else:
        _refuse_other_run(folder, run, corpus, training.model, found.manifest)
        load_weights(found, training.model)
        _load_optimizer(found, training)
        if training.loss_scale is not None:
            training.loss_scale.load(found.manifest.loss_scale)
        log.info(f"resuming {folder} after step {found.manifest.step}")
    write_config(folder, run)
    return found.manifest.step if found else 0


def load_weights(found: Checkpoint, model: TransformerLM) -> None:
    """Raises UserError where they are not those of this model."""
    try:
        model.load_state_dict(found.tensors[MODEL])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{found.path}/{MODEL} does not fit the run's settings: {reason}") from None


def refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer, expected: str) -> None:
    """Raises UserError where a run's tokenizer.json is not the tokenizer its tokens were made with."""
    if tokenizer.hash != expected:
        raise UserError(
            f"{folder}/tokenizer.json ({tokenizer.hash[:12]}) is not the tokenizer of its tokens ({expected[:12]}): "
            "bring the run's own tokenizer.json and data back, or start a new run"
        )


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        content = unsealed(file.read_text())
        format = content["format"] if "format" in content else content.pop("version")
        refuse_other_format(path, format)
        migrated = migrate(content["config"], format)
        return Manifest.model_validate(content | {"format": format, "config": migrated})
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None
    except (ValidationError, ValueError, KeyError, TypeError):
        raise Damaged(f"{file} is damaged") from None


def _refuse_other_run(folder: Path, run: Run, corpus: Prepared, model: TransformerLM, manifest: Manifest) -> None:
    if manifest.corpus != corpus.fingerprint:
        raise UserError(
            f"the documents of {folder} have changed since it was trained (fingerprint {manifest.corpus[:12]}, now "
            f"{corpus.fingerprint[:12]}): bring them back, or start a new run"
        )
    refuse_other_tokenizer(folder, corpus.tokenizer, manifest.tokenizer)
    refuse_other_settings(folder, run, manifest.config, manifest.step)
    for name, now in _machine(model).items():
        before = manifest.machine.get(name)
        if before != now:
            log.warning(f"{folder} ran with {name} {before}, this process has {now}: it goes on, not bit for bit")


def _machine(model: TransformerLM) -> dict[str, str | int]:
    """What the bits depend on besides the settings."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {"device": f"{device.type} {processor}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def _load_optimizer(found: Checkpoint, training: Training) -> None:
    index_of = {name: i for i, name in enumerate(_parameter_names(training))}
    parameters, by_index = dict(training.model.named_parameters()), {i: {} for i in index_of.values()}
    try:
        for key, tensor in found.tensors[OPTIMIZER].items():
            name, _, part = key.rpartition("/")
            by_index[index_of[name]][part] = tensor
            if tensor.ndim and tensor.shape != parameters[name].shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, not {tuple(parameters[name].shape)}")
        missing = [name for name, i in index_of.items() if not by_index[i]]
        if missing:
            raise ValueError(f"it holds nothing for {missing[0]}")
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": by_index, "param_groups": groups})
    except (KeyError, ValueError) as error:
        raise UserError(f"{found.path}/{OPTIMIZER} does not fit this run's optimizer: {error}") from None


def _parameter_names(training: Training) -> list[str]:
    """Names in the optimizer's own order, which its state is indexed by."""
    name_of = {parameter: name for name, parameter in training.model.named_parameters()}
    return [name_of[parameter] for group in training.optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    names, state = _parameter_names(training), training.optimizer.state_dict()["state"]
    return {f"{names[i]}/{part}": tensor for i, parts in state.items() for part, tensor in parts.items()}
