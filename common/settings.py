"""The base class of all settings, frozen and strict, and marks for when a setting of a run may change."""

from enum import IntEnum

from pydantic import BaseModel, ConfigDict

MAX_COUNT = 2**40  # of steps, tokens, documents or bytes: beyond any run, and exact in a float


class FrozenSettings(BaseModel):
    """Raises pydantic.ValidationError for unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Change(IntEnum):
    """When a setting of a run may change, as in `steps: Annotated[int, Change.ON_RESUME]`. A field without a mark has
    that of the field that holds its group."""

    NEVER = 0  # the weights depend on it
    FINE_TUNING = 1  # in a run that begins with this run's weights
    ON_RESUME = 2  # there, and in this run when it goes on
