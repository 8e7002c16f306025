"""Model dimensions that attention, MLP, norms and embeddings share."""

from typing import Annotated, Literal

from pydantic import Field

from common.settings import Change, FrozenSettings

MAX_SIZE = 2**20  # no memory holds a wider model; far beyond, arithmetic overflows and finding divisors takes for ever
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]


class Dimensions(FrozenSettings):
    """Sizes and switches from which attention and MLP derive theirs. The tokenizer owns the vocabulary size."""

    n_layers: Size
    d_model: Size
    n_heads: Size
    # Tokens in a training sequence, and the limit when sampling:
    context_length: Annotated[int, Change.FINE_TUNING] = Field(ge=2, le=MAX_SIZE)
    tie_embeddings: bool = True  # one matrix for the input embedding and the LM head
    position_embedding: Literal["none", "learned", "sinusoidal"] = "none"  # added to each token's embedding
    # On embeddings and on outputs of attention and MLP, in training only:
    dropout: Annotated[float, Change.FINE_TUNING] = Field(0.0, ge=0, lt=1)
    norm: Literal["rms", "layer"] = "rms"  # norm of the residual stream
    bias: bool = False  # on every Linear in attention and MLP, and on LayerNorm; never on the LM head
    logit_softcap: float | None = Field(None, ge=1e-3, le=1e6)  # cap · tanh(logits / cap), within float32
    zero_init: bool = True  # o_proj and down_proj start at zero; false: std / sqrt(2 n_layers)
