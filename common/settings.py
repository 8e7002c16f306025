"""The base of every typed settings object: frozen and strict."""

from pydantic import BaseModel, ConfigDict


class FrozenSettings(BaseModel):
    """Unknown keys, wrong types, infinities and NaN are refused where the object is made (pydantic.ValidationError)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
