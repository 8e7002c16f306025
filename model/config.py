"""The base of the typed configuration objects of the model and of training (data/ has its own: it knows neither)."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen and strict: unknown keys, wrong types, infinities and NaN are refused where the object is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
