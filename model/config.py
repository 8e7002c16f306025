"""The base of the typed configuration objects of the model and of training (data/ has its own: it knows neither)."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**20  # no memory holds a model so wide; far beyond, arithmetic overflows and lists of divisors never end
Size = Annotated[int, Field(ge=1, le=LARGEST)]  # a dimension


class Config(BaseModel):
    """Frozen and strict: unknown keys, wrong types, infinities and NaN are refused where the object is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
