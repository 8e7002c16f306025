"""The base of every typed configuration object."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen and strict: unknown keys, wrong types, infinities and NaN are refused where the object is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
