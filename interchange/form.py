"""A model as transformers shall see it, before it is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


class Form(NamedTuple):
    """What a folder for transformers says of a model."""

    model_type: str
    architecture: str  # the class of transformers, or of the code
    config: dict[str, Any]  # content of config.json
    tensors: Iterator[tuple[str, Tensor]]  # float32, under their names there, one after another
    code: Path | None = None  # a file that goes with the weights
