"""Attention whose keys an indexer may choose: its settings, and what GQA and MLA share of it."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from common.settings import Change, FrozenSettings
from model.attention.base import Attention, AttentionConfig, head_dim_of
from model.attention.chosen_core import INDEX_KEY, ChosenCore
from model.attention.core import AttentionCore
from model.attention.indexer import INDEXER_LOSS, Index, Indexer
from model.context import Context
from model.dimensions import Dimensions, Size
from model.rope import Rope

UNUSED = {"n_heads": 4, "head_dim": None, "stage": "sparse", "weight": 1.0}  # as in conf/; others refused without top_k


class IndexerConfig(FrozenSettings):
    """Settings of an indexer; with top_k unset there is none."""

    top_k: Annotated[Size | None, Change.FINE_TUNING]
    n_heads: Size
    head_dim: Size | None  # unset: d_model / n_heads of the model
    stage: Annotated[Literal["warmup", "sparse"], Change.FINE_TUNING]
    weight: Annotated[float, Change.FINE_TUNING] = Field(ge=0, le=1e6)

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.top_k is None:
            for name, value in UNUSED.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"indexer.{name}={getattr(self, name)} is of an indexer: set attention.indexer.top_k, or "
                        "choose attention=dsa"
                    )
        elif self.stage == "warmup" and not self.weight:
            raise ValueError(
                "indexer.weight=0 leaves indexer.stage=warmup nothing to learn: give a weight above 0, or choose "
                "indexer.stage=sparse"
            )
        return self


class IndexedConfig(AttentionConfig):
    """Settings of an attention that an indexer may choose the keys of."""

    indexer: IndexerConfig

    @property
    def has_indexer(self) -> bool:
        return self.indexer.top_k is not None

    def derived_indexer(self, dimensions: Dimensions) -> IndexerConfig:
        """Derive the indexer's settings. Raises ValueError where it cannot choose."""
        if not self.has_indexer:
            return self.indexer
        if self.window is not None:
            raise ValueError(
                f"indexer.top_k={self.indexer.top_k} chooses among all earlier tokens, and window={self.window} keeps "
                "no others: leave one of the two unset"
            )
        head_dim = self.indexer.head_dim or head_dim_of(dimensions)
        if self.rope_scaling == "ntk" and head_dim in (2, 3):
            raise ValueError(
                f"indexer.head_dim={head_dim} rotates one pair, which rope_scaling=ntk leaves as it is: choose 4 or "
                "more, or linear or yarn"
            )
        return self.indexer.model_copy(update={"head_dim": head_dim})

    def build_indexer(self, d_model: int, query_dim: int, rope_dim: int) -> "Indexer | None":
        """Build the indexer, if there is one. query_dim: the width of what its queries are projected from; rope_dim:
        how much of a key of the attention rotates. As published, the first dimensions of its own rotate, by halves."""
        if not self.has_indexer:
            return None
        rotated = min(rope_dim, self.indexer.head_dim) // 2 * 2
        rope = self.model_copy(update={"rope_layout": "half"}).rope(rotated) if rotated else None
        return Indexer(self.indexer, d_model, query_dim, rope)

    @property
    def described_indexer(self) -> str:
        """An end of `describe`."""
        return f", to {self.indexer.top_k} keys that an indexer chooses" if self.has_indexer else ""

    @property
    def index_elements(self) -> int:
        """What a token caches for the indexer."""
        return self.indexer.head_dim if self.has_indexer else 0


class IndexedAttention(Attention):
    """Attention that has an indexer, or None."""

    indexer: Indexer | None

    @property
    def index_column(self) -> dict[str, tuple[int, ...]]:
        """What a token caches for the indexer, as a column of the KV cache."""
        return {} if self.indexer is None else {INDEX_KEY: (self.indexer.head_dim,)}

    @property
    def index_macs_per_pair(self) -> int:
        return 0 if self.indexer is None else self.indexer.macs_per_pair

    @property
    def auxiliary_losses(self) -> Mapping[str, float]:
        return {} if self.indexer is None else {INDEXER_LOSS: self.indexer.weight}

    @property
    def ropes(self) -> tuple[Rope, ...]:
        rope = None if self.indexer is None else self.indexer.rope
        return super().ropes if rope is None else (*super().ropes, rope)

    def index(self, x: Tensor, source: Tensor | None, ctx: Context) -> Index | None:
        """What the indexer makes of the hidden states x (B, T, d_model) and of what its queries are projected from."""
        return None if self.indexer is None else self.indexer(x, source, ctx)

    def core_of(self, index: Index | None) -> "AttentionCore | ChosenCore":
        """The core, to attend to what the index chooses."""
        return self.core if index is None else ChosenCore(self.core, index)
