"""Published models in a folder, in transformers' format, as `hf:DIR` names them: settings, tokenizer and weights. Read
are config.json, tokenizer.json and safetensors files; nothing of the folder is executed or unpickled."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.atomic_io import names_in, open_regular
from common.errors import UserError, reason
from common.hf_names import folder_of
from common.json_files import read_object
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from model.attention.base import divisors
from model.published.families import FAMILIES
from model.published.family import Family, typed
from model.published.tensors import Entry, Misfit
from model.transformer import ModelConfig, TransformerLM
from runtime.fast_startup import allocate_empty
from training.run.config import Run, compose

MAX_JSON_BYTES = 2**26
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SCALES = "_scale_inv"  # beside the name of a matrix of 8-bit numbers: what each of its tiles is multiplied by
# Tensors that files hold and no model needs: constants of older versions, and those of multi-token prediction (below).
CONSTANTS = re.compile(r"\.(inv_freq|masked_bias)$|\.attn\.bias$")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_BLOCK = 2**16
TABLES = ("embedding.weight", "head.weight")
# What values of the wrong kind raise on their way through a family.
UNFIT = (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError)

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
    if os.path.isfile(folder):
        raise UserError(f"{name} is a file: give the folder that it is in")
    content = _config(folder)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        code = ", and its own code is not run" if "auto_map" in content else ""
        raise UserError(f"{folder}/config.json: model_type={model_type} is not known{code}: {', '.join(FAMILIES)}")
    try:
        run = compose(*_overrides(FAMILIES[model_type].settings(content)))
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from None
    except UNFIT:
        raise UserError(f"{folder}/config.json: its values are not what such a model has") from None
    stated = content.get("quantization_config")
    if stated is not None and not (isinstance(stated, dict) and stated.get("quant_method") == "fp8"):
        raise UserError(f"{folder}/config.json: quantization_config={str(stated)[:80]}: only quant_method=fp8 is known")
    _check_fetched(folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    rows = content.get("vocab_size")
    if type(rows) is not int or rows < tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary of tokenizer.json has {tokenizer.vocab_size:,} tokens, that of config.json "
            f"{rows}: they belong to different models"
        )
    return Published(folder, FAMILIES[model_type], content, run, tokenizer)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json", MAX_JSON_BYTES)
    except FileNotFoundError:
        raise UserError(f"{folder} is no published model: there is no {folder / 'config.json'}") from None


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """Choices first, which the values of their settings follow. What the run has besides a model fits any of them."""
    fixed = {"model.dropout": 0.0, "model.zero_init": True, "model.own_logit_init": None, "attention.dropout": 0.0}
    window = settings["model.context_length"]
    every = {**settings, **fixed, "batch_tokens": window, "eval_tokens": window, "micro_batch_size": 1}
    every = _in_parts(every) if every["attention"] == "stack" else every
    return [f"{name}={typed(value)}" for name, value in sorted(every.items(), key=lambda item: "." in item[0])]


def _in_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stack, by `attention.windows` of each layer: the settings of its two parts, and their pattern."""
    windows = settings["attention.windows"]
    names = ["global" if window is None else "local" for window in windows]
    length = next(n for n in divisors(len(names)) if names == names[:n] * (len(names) // n))
    found = {name: value for name, value in settings.items() if not name.startswith("attention.")}
    # An indexer is unset in a part, and its settings are not there to be set again.
    for name in settings.keys() - found.keys() - {"attention.windows", "attention.indexer.top_k"}:
        for part in ("local", "global"):
            found[name.replace("attention.", f"attention.parts.{part}.", 1)] = settings[name]
    found["attention.parts.local.window"] = next(window for window in windows if window is not None)
    found["attention.parts.global.window"] = None
    return {**found, "attention.pattern": f"[{','.join(names[:length])}]"}


def check_before_training(found: Published) -> None:
    """Raise UserError where its files have not the tensors of such a model, of which none is read."""
    with ExitStack() as held:
        _model_and_files(found, found.run.model, held)


def _model_and_files(
    found: Published, config: ModelConfig, held: ExitStack
) -> tuple[TransformerLM, list[Entry], "_Files"]:
    """The model without weights, where each of its tensors lies, and the files, which have them all."""
    with torch.device("meta"):
        model = TransformerLM(config, found.tokenizer.vocab_size)
    entries = found.family.entries(model, found.content)
    files = _Files(found, held)
    files.check_names(entries, tied=config.tie_embeddings)
    return model, entries, files


def load_published(found: Published, config: ModelConfig) -> TransformerLM:
    """The model with its weights in float32, read one tensor after another. config: as found, but for what may change
    without other weights. Raises UserError where files, names or shapes are not those of such a model."""
    with ExitStack() as held, torch.no_grad():
        model, entries, files = _model_and_files(found, config, held)
        model = allocate_empty(model)
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for entry in entries:
            given = [files.read(name) for name in entry.published]
            try:
                tensors = entry.unpack(given)
            except Misfit as error:
                raise UserError(f"{found.folder}: {error}") from None
            except (RuntimeError, IndexError, TypeError):
                shapes = ", ".join(
                    f"{name} {tuple(one.shape)}" for name, one in zip(entry.published, given, strict=True)
                )
                raise UserError(f"{found.folder}: {shapes[:300]}: other shapes than its config.json says") from None
            for name, tensor in zip(entry.ours, tensors, strict=True):
                _fill(targets[name], tensor, ", ".join(entry.published) or name, found, is_table=name in TABLES)
    left = found.content["vocab_size"] - found.tokenizer.vocab_size
    if left:
        log.info(f"{left:,} rows of the vocabulary of {found.folder} have no token, and are left out")
    return model


def _fill(target: Tensor, tensor: Tensor, name: str, found: Published, is_table: bool) -> None:
    """Copy a tensor; of a vocabulary, the rows of its tokens, and zeros behind them."""
    rows = found.tokenizer.vocab_size if is_table else len(target)
    expected = (found.content["vocab_size"] if is_table else rows, *target.shape[1:])
    if tuple(tensor.shape) != expected:
        raise UserError(f"{found.folder}: {name} has shape {tuple(tensor.shape)}, and its config.json says {expected}")
    if not tensor.isfinite().all():
        raise UserError(f"{found.folder}: {name} holds numbers that are not finite, of which nothing is learned")
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
                full = self._full(name)
                if full in self.places:
                    raise UserError(f"{found.folder} holds {full} twice, in {self.places[full][0]} and {file}")
                self.places[full] = (file, name)

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
        further_layers = range(layers, layers + int(self.found.content.get("num_nextn_predict_layers") or 0))
        for name in sorted(self.places.keys() - wanted):
            further = re.match(r"model\.layers\.(\d{1,9})\.", name)
            of_scale = name.endswith(SCALES) and name.removesuffix(SCALES) in wanted
            of_tied = tied and name == "lm_head.weight" and self._is_embedding(name)
            predicts_further = further is not None and int(further[1]) in further_layers
            if not (of_scale or of_tied or predicts_further or CONSTANTS.search(name)):
                raise UserError(f"{folder}: its safetensors files hold {name}, which this model does not have")

    def _is_embedding(self, name: str) -> bool:
        """Whether a head that is tied is the embedding; one that differs would be lost."""
        embedding = "transformer.wte.weight" if self.found.family.names == "gpt2" else "model.embed_tokens.weight"
        return torch.equal(self.read(name), self.read(embedding))

    def read(self, name: str) -> Tensor:
        """In float32."""
        file, stored = self.places[name]
        tensor = self._tensor(file, stored)
        scaled = name + SCALES in self.places
        known = (torch.float8_e4m3fn,) if scaled else FLOATS
        if tensor.dtype not in known:
            fault = "is not known with scales" if scaled else "holds no weights, or needs scales"
            raise UserError(f"{self.found.folder}/{file}: {stored} is {tensor.dtype}, which {fault}")
        return self._dequantised(name, tensor) if scaled else tensor.float()

    def _dequantised(self, name: str, tensor: Tensor) -> Tensor:
        block = (self.found.content.get("quantization_config") or {}).get("weight_block_size")
        scales = self._tensor(*self.places[name + SCALES]).float()
        whole = (
            isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= MAX_BLOCK for n in block)
        )
        if not whole or tensor.ndim != 2:
            raise UserError(
                f"{self.found.folder}: {name} has scales, and its config.json no weight_block_size for them"
            )
        tiles = tuple(-(-size // n) for size, n in zip(tensor.shape, block, strict=True))
        if tuple(scales.shape) != tiles:
            raise UserError(f"{self.found.folder}: {name}{SCALES} has shape {tuple(scales.shape)}, not {tiles}")
        return dequantised(tensor, scales, block)

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
    """The safetensors files of the folder: the one of all tensors, or those that an index names. Raises UserError."""
    try:
        names = names_in(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {reason(error)}") from None
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return _indexed(folder, names)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise UserError(
            f"{folder} has its weights pickled ({pickled[0]}), which could run any code, and is not read: convert "
            "them to safetensors with transformers, by save_pretrained"
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _indexed(folder: Path, there: Sequence[str]) -> list[str]:
    places = read_object(folder / INDEX, MAX_JSON_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder")
        if name not in there:
            raise UserError(f"{folder} is not whole: its index names {name}, which is not there")
    return names


def _check_fetched(path: Path) -> None:
    """Raise UserError where what was cloned is what Git LFS leaves in place of a large file, or cannot be read."""
    try:
        with open_regular(path) as file:  # what is no file would be waited for
            fetched = file.read(len(LFS_POINTER)) != LFS_POINTER
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not fetched:
        raise UserError(f"{path} is a pointer of Git LFS and not the file itself: run git lfs pull in its folder")


def _opened(path: Path, held: ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open

    _check_fetched(path)
    try:
        return held.enter_context(safe_open(path, framework="pt"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
