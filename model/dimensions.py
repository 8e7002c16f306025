"""The dimensions that the parts of a model share."""

from typing import Annotated, Literal

from pydantic import Field

from common.settings import FrozenSettings

MAX_SIZE = 2**20  # no memory holds a model so wide; far beyond, arithmetic overflows and lists of divisors never end
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]  # a dimension


class Dimensions(FrozenSettings):
    """What everything else derives from. The vocabulary belongs to the tokenizer."""

    n_layers: Size
    d_model: Size
    n_heads: Size
    context_length: int = Field(ge=2, le=MAX_SIZE)  # tokens in a training window, and the most a text may have
    tie_embeddings: bool = True  # one matrix for the input embedding and the output head
    position_embedding: Literal["none", "learned", "sinusoidal"] = "none"  # added to each token's embedding
    dropout: float = Field(0.0, ge=0, lt=1)  # of the embedding and of what each layer adds, while training
    norm: Literal["rms", "layer"] = "rms"  # of the residual stream
    bias: bool = False  # of all matrices in attention and MLP, and of a LayerNorm; never of the head
    logit_softcap: float | None = Field(None, ge=1e-3, le=1e6)  # cap · tanh(logits / cap); beyond, float32 loses them
    zero_init: bool = True  # what writes to the residual stream begins at zero; false: small, the deeper the smaller
