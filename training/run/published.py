"""Published models in a folder, in transformers' format, as `hf:DIR` names them: settings, tokenizer and weights. Read
are config.json, tokenizer.json and safetensors files; nothing of the folder is executed or unpickled."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.atomic_io import exists, names_in, read_regular
from common.errors import UserError, reason
from common.hf_names import folder_of
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from model.published.families import FAMILIES
from model.published.family import Family, typed
from model.published.tensors import Entry, Misfit
from model.transformer import ModelConfig, TransformerLM
from runtime.fast_startup import allocate_empty
from training.run.config import Run, compose

MAX_JSON_BYTES = 2**26
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALES = "_scale_inv"  # beside the name of a matrix of 8-bit numbers: what each of its tiles is multiplied by
# Tensors that files hold and no model needs: constants of older versions, and those of multi-token prediction (below).
CONSTANTS = re.compile(r"\.(inv_freq|masked_bias)$|\.attn\.bias$")

log = logging.getLogger("headroom")


class Published(NamedTuple):
    """A published model that was looked at, and whose weights were not yet read."""

    folder: Path
    family: Family
    content: dict[str, Any]  # of config.json
    run: Run  # with its model
    tokenizer: Tokenizer


def look_at(name: Path | str) -> Published:
    """What is in the folder behind `hf:`. Raises UserError where it is no model that this program can be."""
    folder = folder_of(name)
    content = _object(folder / "config.json")
    model_type = content.get("model_type")
    if model_type not in FAMILIES:
        code = ", and its own code is not run" if "auto_map" in content else ""
        raise UserError(f"{folder}/config.json: model_type={model_type} is not known{code}: {', '.join(FAMILIES)}")
    try:
        run = compose(*_overrides(FAMILIES[model_type].settings(content)))
    except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        fault = error if isinstance(error, UserError) else f"it is not what such a model has ({error})"
        raise UserError(f"{folder}/config.json: {fault}") from None
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    rows = content.get("vocab_size")
    if type(rows) is not int or rows < tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary of tokenizer.json has {tokenizer.vocab_size:,} tokens, that of config.json "
            f"{rows}: they belong to different models"
        )
    return Published(folder, FAMILIES[model_type], content, run, tokenizer)


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """Choices first, which the values of their settings follow."""
    fixed = {"model.dropout": 0.0, "model.zero_init": True, "model.own_logit_init": None, "attention.dropout": 0.0}
    every = {**settings, **fixed}
    return [f"{name}={typed(value)}" for name, value in sorted(every.items(), key=lambda item: "." in item[0])]


def load_published(found: Published, config: ModelConfig) -> TransformerLM:
    """The model with its weights in float32, read one tensor after another. config: as found, but for what may change
    without other weights. Raises UserError where files, names or shapes are not those of such a model."""
    with torch.device("meta"):
        model = TransformerLM(config, found.tokenizer.vocab_size)
    entries = found.family.entries(model, found.content)
    with ExitStack() as held, torch.no_grad():
        files = _Files(found, held)
        files.check_names(entries, tied=config.tie_embeddings)
        model = allocate_empty(model)
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for entry in entries:
            try:
                tensors = entry.unpack([files.read(name) for name in entry.published])
            except Misfit as error:
                raise UserError(f"{found.folder}: {error}") from None
            for name, tensor in zip(entry.ours, tensors, strict=True):
                _fill(targets[name], tensor, ", ".join(entry.published) or name, found, is_table=name in TABLES)
    left = found.content["vocab_size"] - found.tokenizer.vocab_size
    if left:
        log.info(f"{left:,} rows of the vocabulary of {found.folder} have no token, and are left out")
    return model


TABLES = ("embedding.weight", "head.weight")


def _fill(target: Tensor, tensor: Tensor, name: str, found: Published, is_table: bool) -> None:
    """Copy a tensor; of a vocabulary, the rows of its tokens, and zeros behind them."""
    rows = found.tokenizer.vocab_size if is_table else len(target)
    expected = (found.content["vocab_size"] if is_table else rows, *target.shape[1:])
    if tuple(tensor.shape) != expected:
        raise UserError(f"{found.folder}: {name} has shape {tuple(tensor.shape)}, and its config.json says {expected}")
    target[:rows].copy_(tensor[:rows])
    target[rows:].zero_()


class _Files:
    """The safetensors files of a folder. Names of tensors are given as transformers' model has them."""

    def __init__(self, found: Published, held: ExitStack):
        self.found = found
        self.open = {file: _opened(found.folder / file, held) for file in _file_names(found.folder)}
        self.places: dict[str, tuple[str, str]] = {}  # by name: the file, and the name there
        for file, opened in self.open.items():
            for name in opened.keys():  # noqa: SIM118
                self.places[self._full(name)] = (file, name)

    def _full(self, name: str) -> str:
        bare = self.found.family.names == "gpt2" and not name.startswith(("transformer.", "lm_head."))
        return f"transformer.{name}" if bare else name

    def check_names(self, entries: Sequence[Entry], tied: bool) -> None:
        """Raise UserError where a tensor is missing, or there is one more."""
        folder = self.found.folder
        wanted = {name for entry in entries for name in entry.published}
        for name in sorted(wanted - self.places.keys()):
            raise UserError(f"{folder}: its safetensors files lack {name}")
        layers = self.found.run.model.n_layers
        for name in sorted(self.places.keys() - wanted):
            further = re.match(r"model\.layers\.(\d+)\.", name)
            of_scale = name.endswith(SCALES) and name.removesuffix(SCALES) in wanted
            of_tied = tied and name == "lm_head.weight"
            predicts_further = further is not None and int(further[1]) >= layers
            if not (of_scale or of_tied or predicts_further or CONSTANTS.search(name)):
                raise UserError(f"{folder}: its safetensors files hold {name}, which this model does not have")

    def read(self, name: str) -> Tensor:
        """In float32."""
        file, stored = self.places[name]
        tensor = self._tensor(file, stored)
        if tensor.dtype == torch.float8_e4m3fn:
            return self._dequantised(name, tensor)
        if not tensor.is_floating_point():
            raise UserError(f"{self.found.folder}/{file}: {stored} is {tensor.dtype}, which holds no weights")
        return tensor.float()

    def _dequantised(self, name: str, tensor: Tensor) -> Tensor:
        if name + SCALES not in self.places:
            raise UserError(f"{self.found.folder}: {name} is of 8-bit numbers, and there is no {name}{SCALES}")
        stated = self.found.content.get("quantization_config") or {}
        block = stated.get("weight_block_size")
        if block is None or len(block) != 2:
            raise UserError(f"{self.found.folder}/config.json: quantization_config states no weight_block_size")
        return dequantised(tensor, self._tensor(*self.places[name + SCALES]).float(), block)

    def _tensor(self, file: str, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self.open[file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.found.folder / file} is damaged: {str(error)[:200]}") from None


def dequantised(tensor: Tensor, scales: Tensor, block: Sequence[int]) -> Tensor:
    """(rows, cols) of 8-bit floating point -> float32: each tile of block[0] × block[1] times its scale."""
    rows, cols = block
    whole = scales.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return tensor.float() * whole[: tensor.shape[0], : tensor.shape[1]]


def _file_names(folder: Path) -> list[str]:
    """The safetensors files of the folder, as its index names them. Raises UserError."""
    if not exists(folder / INDEX):
        if exists(folder / SINGLE):
            return [SINGLE]
        pickled = [name for name in sorted(names_in(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            raise UserError(
                f"{folder} has its weights pickled ({pickled[0]}), which could run any code, and is not read: convert "
                "them to safetensors with transformers, by save_pretrained"
            )
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}")
    places = _object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder")
        if not exists(folder / name):
            raise UserError(f"{folder} is not whole: its index names {name}, which is not there")
    return names


def _opened(path: Path, held: ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return held.enter_context(safe_open(path, framework="pt"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        found = json.loads(read_regular(path, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return found
