"""The base of what describes data: typed, frozen, and named."""

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict


class DataConfig(BaseModel, ABC):
    """Strict: unknown keys, wrong types, infinities and NaN are refused where the object is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """A short word for folders."""
