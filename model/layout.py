"""Layout of weight matrices: which rows belong to which head and part, for optimizers and QK-clip.

Muon orthogonalises each logical matrix by itself, and QK-clip scales the rows that make a head's queries and keys; a
stored matrix holds several of them, one below the other."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """Divides the rows of a stored matrix into heads, one after another, and each head into named parts.

    heads · sum(parts) = rows. A matrix that is used whole has one head with one part.
    """

    heads: int
    parts: Mapping[str, int]  # name -> rows of this part in each head, in order

    def views(self, stored: Tensor) -> dict[str, Tensor]:
        """Views of each part: of the matrix (rows, cols), (heads, part rows, cols); of its bias (rows,),
        (heads, part rows)."""
        pieces = stored.unflatten(0, (self.heads, -1)).split(list(self.parts.values()), dim=1)
        return dict(zip(self.parts, pieces, strict=True))


def single_matrix(name: str, rows: int) -> MatrixLayout:
    """Layout of a matrix that is used whole."""
    return MatrixLayout(1, {name: rows})
