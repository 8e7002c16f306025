"""A model.py to put in the place of nanoGPT's: an embedding, compared with itself."""

STAND_IN = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embedding.weight, std=0.02)
        print("made")

    def forward(self, tokens, targets=None):
        logits = F.linear(self.embedding(tokens), self.embedding.weight)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, lr, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=decay)
"""
