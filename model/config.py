"""The base of every typed configuration object."""

from pydantic import BaseModel, ConfigDict


class Unsupported(ValueError):
    """A choice that this device, dtype or shape does not have; the message says what to choose instead."""


class Config(BaseModel):
    """Frozen and strict: unknown keys and wrong types are refused where the object is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
