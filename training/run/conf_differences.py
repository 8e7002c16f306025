"""Settings of an attention that differ from conf/, those somebody set. A run stores values, not the choices they came
from, so each attention is compared with the nearest choice."""

from typing import Any

from pydantic import BaseModel

from common.conf_files import choices
from model.attention.base import AttentionChoice, AttentionConfig
from model.attention.stack import StackConfig
from model.dimensions import Dimensions
from model.transformer import ModelConfig
from training.run.composer import choice
from training.run.parts import load_choice

DERIVED = (None, "all")  # what conf/ holds where a dimension follows from the model's
NOT_DERIVED = ("window", "rope_factor", "top_k")  # of which null is a value of its own
OF_THE_MODEL = ("qk_norm", "qk_bias", "attention_dropout")  # settings of the model that an attention takes over


def attention_differences(model: ModelConfig) -> dict[str, Any]:
    """The attention's settings that differ from conf/, by their names behind `attention.`; of a stack, those of its
    parts."""
    usual = choice("model", "shared/block")
    dimensions = model.model_copy(update={name: usual[name] for name in OF_THE_MODEL})
    offers = [load_choice("attention", name) for name in choices("attention")]
    if not isinstance(model.attention, StackConfig):
        return _nearest(model.attention, offers, dimensions)
    found = {}
    for name, part in model.attention.parts.items():
        same_part = [offer.parts[name] for offer in offers if isinstance(offer, StackConfig) and name in offer.parts]
        different = _nearest(part, same_part + offers, dimensions)
        found |= {f"parts.{name}.{key}": value for key, value in different.items()}
    return found


def _nearest(attention: AttentionConfig, offers: list[AttentionChoice], dimensions: Dimensions) -> dict[str, Any]:
    """The differences from the choice of the same class that has the fewest."""
    same_class = (offer for offer in offers if type(offer) is type(attention))
    return min((_differences(attention, offer, dimensions) for offer in same_class), key=len)


def _differences(attention: AttentionConfig, offer: AttentionConfig, dimensions: Dimensions) -> dict[str, Any]:
    """The settings that are not as the choice has them, or as its dimensions derive from the other settings."""
    offered = {key: value for key, value in offer if key != "position"}  # of another group, and of the whole model
    sections = {key: value for key, value in offered.items() if isinstance(value, BaseModel)}
    unset = _unset(offered)
    of_sections = {key: getattr(attention, key).model_copy(update=_unset(dict(part))) for key, part in sections.items()}
    try:
        derived = attention.model_copy(update=unset | of_sections).derive(dimensions)
    except ValueError:  # these settings fit no derived dimensions
        derived = offer
    found = _unequal(attention, {key: value for key, value in offered.items() if key not in sections}, derived)
    for key, part in sections.items():
        different = _unequal(getattr(attention, key), dict(part), getattr(derived, key))
        found |= {f"{key}.{name}": value for name, value in different.items()}
    return found


def _unset(offered: dict[str, Any]) -> dict[str, Any]:
    """What conf/ leaves to be derived."""
    return {key: value for key, value in offered.items() if value in DERIVED and key not in NOT_DERIVED}


def _unequal(actual: BaseModel, offered: dict[str, Any], derived: BaseModel) -> dict[str, Any]:
    expected = offered | {key: getattr(derived, key) for key in _unset(offered)}
    return {key: getattr(actual, key) for key, value in expected.items() if getattr(actual, key) != value}
