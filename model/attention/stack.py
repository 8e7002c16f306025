"""Stack of layers with different attentions, as in local-global attention: two layers with a window, then one without.

Each layer has the KV cache of its own attention, so a stack of local layers with a few global ones decodes long texts
in little memory (Gemma 2, arXiv:2408.00118, section 2.2).
"""

import logging
from typing import Self

from pydantic import Field, SerializeAsAny, model_validator

from model.attention.base import AttentionChoice, AttentionConfig, divisors
from model.dimensions import Dimensions
from model.positions import Position


class StackConfig(AttentionChoice):
    """A list of part names that repeats over the layers, and the attention of each part."""

    pattern: tuple[str, ...] = Field(min_length=1)  # names of parts, one per layer; repeats until the last layer
    position: Position = "rope"  # for parts that set none; the config loader has already applied it
    parts: dict[str, SerializeAsAny[AttentionConfig]]  # unused ones are dropped with a warning

    @model_validator(mode="after")
    def _check_part_names(self) -> Self:
        for name in self.pattern:
            if name not in self.parts:
                raise ValueError(
                    f"attention.pattern names {name!r}, which attention.parts does not have: choose from "
                    f"{', '.join(self.parts) or 'none'}, or add it: +attention.parts.{name}.attention=gqa"
                )
        return self

    def derive(self, dimensions: Dimensions) -> Self:
        if dimensions.n_layers % len(self.pattern):
            fitting = [n for n in divisors(dimensions.n_layers) if n <= len(self.pattern)]
            raise ValueError(
                f"attention.pattern of {len(self.pattern)} layers does not repeat evenly in "
                f"n_layers={dimensions.n_layers}: choose a length of {', '.join(map(str, fitting))}, or other n_layers"
            )
        used = {name: self.parts[name].derive(dimensions) for name in dict.fromkeys(self.pattern)}
        for name in self.parts.keys() - used.keys():
            logging.getLogger("headroom").warning(
                f"attention.parts.{name} is in no layer: attention.pattern does not name it"
            )
        return self.model_copy(update={"parts": used})

    def of_layer(self, index: int) -> AttentionConfig:
        return self.parts[self.pattern[index % len(self.pattern)]]

    def qk_clip_obstacle(self) -> str | None:
        reasons = {name: part.qk_clip_obstacle() for name, part in self.parts.items()}
        return next((f"in part {name}, {reason}" for name, reason in reasons.items() if reason), None)

    def describe(self, n_heads: int) -> str:
        parts = (f"{name} is {part.describe(n_heads)}" for name, part in self.parts.items())
        return f"layers in turn {', '.join(self.pattern)}; {'; '.join(parts)}"

    @property
    def executions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.executions))

    def with_execution(self, execution: str) -> Self:
        parts = {
            name: part.with_execution(execution) if execution in part.executions else part
            for name, part in self.parts.items()
        }
        return self.model_copy(update={"parts": parts})
