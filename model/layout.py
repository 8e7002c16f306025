"""ParamLayout: what optimizers, QK-clip, initialisation, costs, and import and export may know of a parameter.

Each module has `layout()`, a table of its parameters by name; nobody else matches names.

    def layout(self):                                                             # of an attention
        return {
            **linear("q_proj", self.q_proj, Role.QUERY, self.n_heads, Part("q", self.head_dim, clip_power=0.5)),
            ...
            **linear("o_proj", self.o_proj, Role.RESIDUAL_OUTPUT),
            **nested("q_norm", self.q_norm),
        }
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


class Role(Enum):
    """Use of a matrix, and of the bias beside it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    POSITION = "position"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    LATENT_DOWN = "latent_down"  # from the hidden state to a latent
    LATENT_UP = "latent_up"  # from a latent to what is each head's
    INDEXER = "indexer"  # chooses keys
    MERGE = "merge"  # of a hidden state and an embedding, for multi-token prediction
    GATE = "gate"
    UP = "up"
    ROUTER = "router"  # scores experts
    RESIDUAL_OUTPUT = "residual_output"  # writes to the residual stream
    NORM = "norm"


class Kind(Enum):
    """What an optimizer treats alike."""

    MATRIX = "matrix"  # multiplies vectors: Muon orthogonalises its logical matrices
    TABLE = "table"  # of vectors, of which each token or position has one: embeddings and the LM head
    VECTOR = "vector"
    BIAS = "bias"  # a vector that is added, and starts at zero


class Names(NamedTuple):
    """Names in published checkpoints, in transformers' format; None where there is none.

    Where several matrices have one name, as GPT-2's queries, keys and values, these are the rows of one, in the order
    of the table. GPT-2 stores matrices (but no tables) transposed. Where `{e}` is in a name, each expert's matrix has
    its own, with its number there.
    """

    llama: str | None = None  # and Qwen3 and DeepSeek-V3
    gpt2: str | None = None

    def join(self, inner: Self) -> Self:
        """Names of what is `inner` within the module of these names."""
        joined = (f"{a}.{b}" if a and b else None for a, b in zip(self, inner, strict=True))
        return Names(*joined)


UNPUBLISHED = Names()


class Part(NamedTuple):
    """Neighbouring rows of each head with a use of their own."""

    name: str
    rows: int
    clip_power: float = 0.0  # QK-clip scales these rows by γ to this power, and so the head's scores by γ


class Experts(NamedTuple):
    """The experts of a parameter (count, rows, cols), which has a matrix of each."""

    count: int
    per_token: int  # how many of them a token is multiplied with


@dataclass(frozen=True)
class ParamLayout:
    """Description of a parameter. Its rows (dimension 0; of experts, dimension 1) are divided into heads, one after
    another, and each head into parts: heads · sum of the parts' rows = rows. What is used whole has one head with one
    part."""

    role: Role
    kind: Kind
    heads: int
    parts: tuple[Part, ...]
    fan_in: int | None  # of a matrix or table, its columns
    published: Names = UNPUBLISHED
    experts: Experts | None = None  # of a matrix that is many

    @property
    def rows(self) -> int:
        return self.heads * sum(part.rows for part in self.parts)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Those of the parameter, columns left out."""
        return (self.rows,) if self.experts is None else (self.experts.count, self.rows)

    def active(self, size: int, tokens: int = 1) -> int:
        """Of the parameter's size, in numbers or bytes, what so many tokens meet, at most."""
        if self.experts is None:
            return size
        return size // self.experts.count * min(self.experts.count, self.experts.per_token * tokens)

    @property
    def shard_axis(self) -> int | None:
        """Dimension that parallelism would split, attention's by heads, experts' by expert; None: each device has the
        whole."""
        if self.experts is not None:
            return 0
        if self.role is Role.RESIDUAL_OUTPUT:  # whose bias is added once, to the sum over the devices
            return 1 if self.kind is Kind.MATRIX else None
        by_rows = self.heads > 1 or self.role in (Role.EMBEDDING, Role.HEAD, Role.GATE, Role.UP)
        return 0 if by_rows else None

    def views(self, stored: Tensor) -> dict[str, Tensor]:
        """Views of each part: of the matrix (rows, cols), (heads, part rows, cols); of its bias (rows,),
        (heads, part rows); of matrices of experts (experts, rows, cols), (experts · heads, part rows, cols)."""
        heads = self.heads if self.experts is None else self.heads * self.experts.count
        by_rows = stored if self.experts is None else stored.flatten(0, 1)
        pieces = by_rows.unflatten(0, (heads, -1)).split([part.rows for part in self.parts], dim=1)
        return dict(zip((part.name for part in self.parts), pieces, strict=True))

    def whole(self) -> Self:
        """The same parameter, each of its matrices used whole."""
        return replace(self, heads=1, parts=(Part("whole", self.rows),))


def leaf(
    module: nn.Module, role: Role, kind: Kind, heads: int = 1, parts: tuple[Part, ...] = ()
) -> dict[str, ParamLayout]:
    """Table of a module with a `weight`, and perhaps a `bias` of as many rows. Without parts it is used whole."""
    parts = tuple(part for part in parts if part.rows) or (Part("whole", len(module.weight)),)
    fan_in = None if kind is Kind.VECTOR else module.weight.shape[1]
    table = {"weight": ParamLayout(role, kind, heads, parts, fan_in, Names("weight", "weight"))}
    if getattr(module, "bias", None) is not None:
        table["bias"] = ParamLayout(role, Kind.BIAS, heads, parts, None, Names("bias", "bias"))
    return table


def linear(
    name: str, module: nn.Linear | None, role: Role, heads: int = 1, *parts: Part, published: Names = UNPUBLISHED
) -> dict[str, ParamLayout]:
    """Table of a linear layer called `name`, its weight and its bias; of None, an empty one. Parts without rows are
    left out; without any, the matrix is used whole."""
    return {} if module is None else _within(name, leaf(module, role, Kind.MATRIX, heads, parts), published)


def vector(name: str, parameter: nn.Parameter, role: Role) -> dict[str, ParamLayout]:
    """Table of a vector that is a parameter itself, called `name`. It starts with what it is constructed with."""
    return {name: ParamLayout(role, Kind.VECTOR, 1, (Part("whole", len(parameter)),), None)}


def experts(name: str, parameter: nn.Parameter, role: Role, per_token: int) -> dict[str, ParamLayout]:
    """Table of a parameter (experts, rows, cols) called `name`, of which a token meets `per_token` matrices, each used
    whole."""
    count, rows, cols = parameter.shape
    published, parts = Names(f"{{e}}.{name}.weight"), (Part("whole", rows),)
    return {name: ParamLayout(role, Kind.MATRIX, 1, parts, cols, published, Experts(count, per_token))}


def nested(name: str, module: nn.Module | None, published: Names = UNPUBLISHED) -> dict[str, ParamLayout]:
    """Table of a module called `name` that has a `layout()`; of one without parameters, an empty one."""
    has_parameters = module is not None and any(True for _ in module.parameters())
    return _within(name, module.layout(), published) if has_parameters else {}


def _within(name: str, table: Mapping[str, ParamLayout], published: Names) -> dict[str, ParamLayout]:
    return {
        f"{name}.{inner}": replace(layout, published=published.join(layout.published))
        for inner, layout in table.items()
    }


def check_layouts(module: nn.Module, table: Mapping[str, ParamLayout]) -> None:
    """Raise ValueError where a table does not describe all parameters of the module, or not in their sizes."""
    named = dict(module.named_parameters())
    for name in {**named, **table}:
        if name not in table:
            fault = f"{name} is in no layout(): add it to that of its module, as linear() or nested() do"
        elif name not in named:
            fault = f"{name} is in a layout(), and is no parameter"
        elif named[name].shape[: len(table[name].dimensions)] != table[name].dimensions:
            found, stated = named[name].shape[: len(table[name].dimensions)], table[name].dimensions
            fault = f"{name} has {_by(found)} rows, and {_by(stated)} in its layout()"
        else:
            continue
        raise ValueError(f"{fault} (model/layout.py)")


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def check_buffers(module: nn.Module) -> None:
    """Raise ValueError where a buffer would not come back from a checkpoint as it was: one that is not saved, or is not
    float32."""
    for path, inner in module.named_modules():
        for name, buffer in inner.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] in inner._non_persistent_buffers_set:
                raise ValueError(f"the buffer {name} is not saved: make it persistent, or compute it in forward")
            if buffer.dtype != torch.float32:
                raise ValueError(f"the buffer {name} is {buffer.dtype}: checkpoints hold float32")
