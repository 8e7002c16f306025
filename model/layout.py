"""The logical matrices within a stored one: what optimizers and clipping must know of a layer, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """How the rows of a stored matrix divide: into heads, one after another, and within each into named parts.

    heads · sum(parts) = rows. A matrix that is used as one has one head with one part.
    """

    heads: int
    parts: Mapping[str, int]  # rows of each part in each head, in their order

    def views(self, stored: Tensor) -> dict[str, Tensor]:
        """The matrix (rows, cols), or its bias (rows,) -> of each part a view, (heads, its rows, cols) or
        (heads, its rows)."""
        pieces = stored.unflatten(0, (self.heads, -1)).split(list(self.parts.values()), dim=1)
        return dict(zip(self.parts, pieces, strict=True))


def single_matrix(name: str, rows: int) -> MatrixLayout:
    return MatrixLayout(1, {name: rows})
