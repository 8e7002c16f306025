"""Model dimensions that attention, MLP, norms and embeddings share."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.settings import Change, FrozenSettings

MAX_SIZE = 2**20  # no memory holds a wider model; far beyond, arithmetic overflows and finding divisors takes for ever
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
UNUSED_MTP_WEIGHT = 0.3  # as in conf/; another is refused without a module that it is of


class Dimensions(FrozenSettings):
    """Sizes and switches from which attention and MLP derive theirs. The tokenizer owns the vocabulary size."""

    n_layers: Size
    d_model: Size
    n_heads: Size
    # Tokens in a training sequence, and the limit when sampling:
    context_length: Annotated[int, Change.FINE_TUNING] = Field(ge=2, le=MAX_SIZE)
    tie_embeddings: bool  # one matrix for the input embedding and the LM head
    position_embedding: Literal["none", "learned", "sinusoidal"]  # added to each token's embedding
    # On embeddings and on outputs of attention and MLP, in training only:
    dropout: Annotated[float, Change.FINE_TUNING] = Field(ge=0, lt=1)
    norm: Literal["rms", "layer"]  # norm of the residual stream
    # Added to a mean square or variance, in norms of query and key heads too; unset: 1e-6 of rms, 1e-5 of layer
    norm_eps: float | None = Field(ge=1e-12, le=1e-2)
    bias: bool  # on Linears in attention and, where mlp.bias is unset, in the MLP; on LayerNorm; never on the LM head
    logit_softcap: float | None = Field(ge=1e-3, le=1e6)  # cap · tanh(logits / cap), within float32
    zero_init: bool  # o_proj and down_proj start at zero; false: std / sqrt(2 n_layers)
    # Logit of a token for itself at the start, with tied embeddings, by the last norm's weight; None: that is one, and
    # the logit sqrt(d_model); auto: the optimizer's choice if they are tied, which a Run fills in
    own_logit_init: Annotated[float, Field(gt=0, le=1e3)] | Literal["auto"] | None
    # What an attention leaves unset:
    qk_norm: bool  # RMSNorm on each query and key head; MLA always norms its latents
    qk_bias: bool  # bias on q_proj, and on k_proj unless softmax ignores it
    attention_dropout: Annotated[float, Change.FINE_TUNING] = Field(ge=0, lt=1)  # on the attention weights
    mtp_depth: int = Field(ge=0, le=1)  # 1: multi-token prediction, a module that predicts the token after the next
    mtp_weight: Annotated[float, Change.FINE_TUNING] = Field(ge=0, le=1e6)  # of its loss in the objective

    @model_validator(mode="after")
    def _check_mtp_weight(self) -> Self:
        if not self.mtp_depth and self.mtp_weight != UNUSED_MTP_WEIGHT:
            raise ValueError(
                f"model.mtp_weight={self.mtp_weight} is of multi-token prediction: set model.mtp_depth=1, or leave it"
            )
        return self
