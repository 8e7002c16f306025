"""A folder that transformers opens: config.json, safetensors, tokenizer.json and the files beside it, a model card; and
a file of code, where the model needs one."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.atomic_io import UNFINISHED, atomic_folder, make_folder, names_in
from common.errors import UserError, reason
from data.tokenizers.base import Tokenizer
from interchange.card import card
from interchange.form import Form
from model.transformer import TransformerLM
from training.run.load import load_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILE_BYTES = 5_000_000_000  # of weights in one file, at most

# Of a router, whose choice would change; transformers rounds them in no precision either.
IN_FLOAT32 = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias", "router.weight", "router.selection_bias")

log = logging.getLogger("headroom")


class Exported(NamedTuple):
    form: Form
    weights: list[str]  # the files
    numbers: int  # in them


def export(
    run: Path,
    output: Path,
    form_of: Callable[[TransformerLM], Form],
    *,
    dtype: str = "fp32",
    which: str = "latest",
    file_bytes: int = FILE_BYTES,
) -> Exported:
    """Write the model of a run, or of hf:DIR, for transformers: whole or not at all. which: latest or best. Raises
    UserError where form_of does, which is where something would be lost."""
    check_output(output)
    model, tokenizer = load_run(run, which=which)
    form = form_of(model)
    if model.mtp is not None:
        log.warning(f"the module for multi-token prediction is left out: {form.architecture} reads none")
    config = form.config | {"dtype": str(DTYPES[dtype]).removeprefix("torch."), **special_tokens(tokenizer)}
    final = output.resolve()
    with _writing(output), _folders_above(final), atomic_folder(final) as folder:
        names, numbers = _write_weights(folder, in_dtype(form.tensors, DTYPES[dtype]), file_bytes)
        _write(folder / "config.json", config)
        write_tokenizer(folder, tokenizer, model.config.context_length)
        if form.code is not None:
            (folder / form.code.name).write_bytes(form.code.read_bytes())
        (folder / "README.md").write_text(card(run, which, form, dtype))
    return Exported(form, names, numbers)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """A context in which an OSError is one line that names the output."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written: {reason(error)}: choose another folder") from None


@contextmanager
def _folders_above(path: Path) -> Iterator[None]:
    """A context in which the folder that a path is in is there; what was made for it goes where the block fails."""
    new = [above for above in path.parents if not os.path.lexists(above)]
    try:
        make_folder(path.parent)
        yield
    except BaseException:
        for above in new:
            with suppress(OSError):
                above.rmdir()
        raise


def in_dtype(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(torch.float32 if name.endswith(IN_FLOAT32) else dtype).contiguous()


def check_output(output: Path) -> None:
    """Raise UserError where a folder cannot be written, or not without losing what is there."""
    whole = output.resolve()
    if os.path.lexists(whole) and (not whole.is_dir() or names_in(whole) or whole == Path.cwd()):
        raise UserError(f"{output} is there already: choose another folder, or move it away")
    above = next(path for path in whole.parents if os.path.lexists(path))
    with _writing(output), TemporaryDirectory(prefix=UNFINISHED, dir=above):
        pass  # only trying shows whether something can be written there


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> tuple[list[str], int]:
    """Write safetensors files, with an index where there are several -> their names, and how many numbers they hold."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    size, numbers = 0, 0
    for batch in _in_batches(tensors, file_bytes):
        try:
            save_file(batch, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise UserError(f"the weights cannot be written: {str(error)[:200]}") from None
        shards.append(list(batch))
        size += sum(tensor.nbytes for tensor in batch.values())
        numbers += sum(tensor.numel() for tensor in batch.values())
    count = len(shards)
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
        (folder / name).chmod((folder / name).stat().st_mode | 0o044)  # as the files beside it, for others to read
    if count == 1:
        return names, numbers
    places = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    return names, numbers


def _in_batches(tensors: Iterator[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """As many together as have so many bytes, or one."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > most:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += tensor.nbytes
    yield batch


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """A text begins with the token that ends the one before it."""
    end = tokenizer.end_of_text
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """tokenizer.json, and what transformers wants to know beside it."""
    content = tokenizer.plain().content()  # nothing is put before a text, as nothing is here
    _write(folder / "tokenizer.json", content)
    spelled = {number: word for word, number in content["model"]["vocab"].items()}
    spelled |= {token["id"]: token["content"] for token in content.get("added_tokens") or ()}
    end = spelled[tokenizer.end_of_text]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "add_bos_token": False,  # which is for llama.cpp: some kinds of tokenizers put one there
        "add_eos_token": False,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", {**special_tokens(tokenizer), "do_sample": False})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
