"""The base of every typed settings object: frozen and strict."""

from pydantic import BaseModel, ConfigDict


class FrozenSettings(BaseModel):
    """Raises pydantic.ValidationError for unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
