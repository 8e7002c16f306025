"""A model as one of transformers' own families, which opens without any code of this program."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from common.errors import UserError
from interchange.form import Form
from interchange.hf_code import obstacles
from model.published.families import FAMILIES, family_of
from model.published.family import Family
from model.published.tensors import Misfit
from model.transformer import ModelConfig, TransformerLM

# Where model.bias=false, what else gives a model a bias, by how its name ends:
WITHOUT_BIAS = {"q_proj.bias": "attention.qk_bias=false", "q_proj.up.bias": "attention.qk_bias=false"}
WITHOUT_BIAS |= {"k_proj.bias": "attention.qk_bias=false", "v_proj.bias": "attention.v_bias=false"}


def in_family(model: TransformerLM, name: str | None = None) -> Form:
    """name: of FAMILIES; unset: the first that can express the model. Raises UserError where none can, or as soon as a
    tensor would be lost."""
    family = chosen_family(model.config, name)
    content = family.config_json(model.config, model.vocab_size)
    return Form(family.model_type, family.architecture, content, packed(model, family, content))


def check_family(name: str | None) -> None:
    """Raise UserError where there is none of that name."""
    if name is not None and name not in FAMILIES:
        raise UserError(f"--family {name}: there is no such family: {', '.join(FAMILIES)}")


def chosen_family(config: ModelConfig, name: str | None) -> Family:
    """Raises UserError where it, or any, cannot express the model."""
    try:
        return family_of(config) if name is None else _named(config, name)
    except UserError as error:
        raise UserError(f"{error}{_with_code(config)}") from None


def _named(config: ModelConfig, name: str) -> Family:
    found = FAMILIES[name].obstacles(config)
    if found:
        raise UserError(f"{name} cannot express this model: it has no {', no '.join(map(str, found))}")
    return FAMILIES[name]


def packed(model: TransformerLM, family: Family, content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The published tensors, one after another. Raises UserError where one of ours has no place there."""
    ours = model.state_dict()
    for entry in family.entries(model, content):
        try:
            tensors = entry.pack([ours[name] for name in entry.ours])
        except Misfit as error:
            raise UserError(
                f"{error} is not zero, and transformers' {family.model_type} has no place for it: "
                f"{_without_bias(str(error), model.config)} trains without{_with_code(model.config)}"
            ) from None
        yield from zip(entry.published, tensors, strict=True)


def _without_bias(name: str, config: ModelConfig) -> str:
    """The setting by which a model has no bias of that name."""
    if ".mlp." in name:
        return "mlp.bias=false"
    of_name = next((way for end, way in WITHOUT_BIAS.items() if name.endswith(end)), None)
    return "model.bias=false" if config.bias or of_name is None else of_name


def _with_code(config: ModelConfig) -> str:
    """Another way out, as the end of a refusal."""
    return "" if obstacles(config) else "; as it is, --to hf-code exports it, with a file of code"
