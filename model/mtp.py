"""Multi-token prediction: a module that predicts the token after the next one (DeepSeek-V3, arXiv:2412.19437, section
2.2, at depth 1).

    x_i = M [norm(h_i) ; norm(Emb(t_{i+1}))]        P(t_{i+2}) = softmax(head(norm(block(x)_i)))

h is the residual stream of the model ahead of its last norm. Embedding and LM head are the model's; the three norms,
the matrix M and the block, built as the model's last one, are the module's. Training adds its cross-entropy to the
objective, so that h_i has to know more than the next token; decoding leaves the module out, or drafts with it.
"""

import torch
from torch import Tensor, nn

from model.dimensions import Dimensions
from model.layout import ParamLayout, Role, linear, nested
from model.linear import Linear
from model.norm import residual_norm

MTP_LOSS = "mtp_loss"  # the auxiliary output: nats per target


class MTP(nn.Module):
    """What the module has of its own. TransformerLM.look_ahead runs it."""

    def __init__(self, dimensions: Dimensions, block: nn.Module):
        super().__init__()
        self.hidden_norm = residual_norm(dimensions)
        self.embedding_norm = residual_norm(dimensions)
        self.merge = Linear(2 * dimensions.d_model, dimensions.d_model, bias=False)
        self.block = block
        self.norm = residual_norm(dimensions)

    def merged(self, stream: Tensor, embedded: Tensor) -> Tensor:
        """M [norm(h) ; norm(e)]: the model's residual stream and embeddings of the next tokens -> the block's input,
        (B, T, d) each."""
        return self.merge(torch.cat((self.hidden_norm(stream), self.embedding_norm(embedded)), -1))

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **nested("hidden_norm", self.hidden_norm),
            **nested("embedding_norm", self.embedding_norm),
            **linear("merge", self.merge, Role.MERGE),
            **nested("block", self.block),
            **nested("norm", self.norm),
        }
