"""The causal language model: blocks of attention and MLP on a residual stream."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import AttentionChoice, Context
from model.cache import Cache
from model.dimensions import Dimensions
from model.kernels.base import Kernel
from model.layout import MatrixLayout, single_matrix
from model.mlp import MLPConfig
from model.norm import residual_norm
from model.positions import position_embedding

VOCAB_MULTIPLE = 64  # matrix units want aligned widths
RESIDUAL_OUTPUTS = ("attention.o_proj.weight", "mlp.down_proj.weight")


class ModelConfig(Dimensions):
    """The dimensions, and what is built with them."""

    attention: AttentionChoice
    mlp: MLPConfig
    kernel: Kernel

    @field_validator("attention", "mlp")
    @classmethod
    def _derive(cls, part: AttentionChoice | MLPConfig, info: ValidationInfo) -> AttentionChoice | MLPConfig:
        known = {name: info.data[name] for name in Dimensions.model_fields if name in info.data}
        return part.derive(Dimensions(**known)) if known.keys() == Dimensions.model_fields.keys() else part

    @property
    def positions(self) -> str:
        """What tells where a token stands, as in `rope`."""
        ways = [self.position_embedding, *(self.attention.of_layer(i).position for i in range(self.n_layers))]
        return " and ".join(way for way in dict.fromkeys(ways) if way != "none") or "the causal mask alone"

    def check_training(self, device: torch.device) -> None:
        """Raises Unsupported where the kernel cannot train this model there."""
        dropout = any(self.attention.of_layer(i).dropout for i in range(self.n_layers))
        self.kernel.check(device, training=True, dropout=dropout)


class Output(NamedTuple):
    logits: Tensor | None  # (B, T, V), or (B, K, V) where K tokens were asked for; None where no logits were
    aux: dict[str, Tensor]  # what layers had to say, as "layers.3.name"
    hidden: Tensor  # (B, T, d) or (B, K, d), normed: what logits are made of


class Block(nn.Module):
    def __init__(self, config: ModelConfig, index: int, causal: bool):
        super().__init__()
        self.attention_norm = residual_norm(config)
        self.attention = config.attention.of_layer(index).build(config, config.kernel, causal)
        self.mlp_norm = residual_norm(config)
        self.mlp = config.mlp.build(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, ctx: Context, cache: Cache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        attended, aux = self.attention(self.attention_norm(x), ctx, cache)
        x = x + ctx.drop(attended, self.dropout)
        return x + ctx.drop(self.mlp(self.mlp_norm(x)), self.dropout), aux


class PaddedEmbedding(nn.Module):
    """One row per token. Rows beyond the vocabulary pad it to a multiple of 64: they are zero and stay zero (nothing
    reads them, so their gradient is zero), and the state dict does not know them."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, d_model))
        self.register_state_dict_post_hook(_without_padding)
        self.register_load_state_dict_pre_hook(_with_padding)

    def forward(self, tokens: Tensor) -> Tensor:
        """The embedding: (B, T) -> (B, T, d)."""
        return F.embedding(tokens, self.weight)


def _without_padding(module: PaddedEmbedding, state: dict, prefix: str, _metadata) -> None:
    state[prefix + "weight"] = state[prefix + "weight"][: module.vocab_size]


def _with_padding(module: PaddedEmbedding, state: dict, prefix: str, *_) -> None:
    name = prefix + "weight"
    if name in state and state[name].shape == (module.vocab_size, module.weight.shape[1]):
        state[name] = F.pad(state[name], (0, 0, 0, module.weight.shape[0] - module.vocab_size))


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), in float32: none is beyond the cap (Gemma 2, arXiv:2408.00118, section 2). Returns the
    caller's dtype; without a cap, the logits themselves."""
    return logits if cap is None else (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)


class LMHead(NamedTuple):
    """What makes logits of hidden states."""

    weight: Tensor  # (V', d): rows beyond the vocabulary are padding
    vocab_size: int
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, d), normed -> (B, T, V): the real vocabulary only."""
        return softcapped(F.linear(hidden, self.weight)[..., : self.vocab_size], self.softcap)


class TransformerLM(nn.Module):
    """Pre-norm decoder. The same seed gives the same float32 weights whatever kernel, device or precision."""

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0, *, causal: bool = True):
        """Without `causal` every token sees those after it too: an encoder, which has no caches."""
        # causal=False is reached by no setting yet: it is for an encoder to come.
        super().__init__()
        self.config, self.vocab_size, self.causal = config, vocab_size, causal
        self.embedding = PaddedEmbedding(vocab_size, config.d_model)
        self.position_embedding = position_embedding(config)
        self.layers = nn.ModuleList(Block(config, i, causal) for i in range(config.n_layers))
        self.norm = residual_norm(config)
        self.head = None if config.tie_embeddings else PaddedEmbedding(vocab_size, config.d_model)
        self.ropes = {block.attention.rope for block in self.layers} - {None}
        self._initialise(seed)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        contiguous: bool = False,
        docs: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        kv_len: int | None = None,
        only: Tensor | None = None,
        logits: bool = True,
        training: bool = False,
        activation_checkpointing: bool = False,
        collect: frozenset[str] = frozenset(),
    ) -> Output:
        """tokens (B, T) int64 -> logits (B, T, V).

        positions: (B, T) or (1, T) of the tokens; negative is padding. Without them: 0..T-1, which is contiguous. With
            caches they are required: a decoder that forgot them would restart at 0 in silence.
        contiguous: the caller's word that the positions given are 0..T-1, with nothing but padding behind, and that the
            caches are empty (a prefill).
        docs: (B, T) the document each token belongs to; its positions begin at 0 in each. For training: caches hold one
            document, so they cannot go with it.
        caches: one per layer, from `make_caches`; written in place.
        kv_len: how many cache rows may be visible, if fewer than the capacity.
        only: (B, K) indices of the tokens whose logits are wanted.
        logits: false for whoever makes them of the hidden states, a piece at a time, as the loss does.
        training: dropout is on, and draws from PyTorch's global generator.
        activation_checkpointing: keep only the input of each block for the backward pass, which recomputes the rest to
            the same bits (Chen et al. 2016, arXiv:1604.06174).
        collect: names of what layers shall say besides; it comes as aux.
        """
        if docs is not None and (positions is None or contiguous or caches is not None):
            raise ValueError("packed documents need positions, which are not contiguous, and no caches")
        if caches is not None and not self.causal:
            raise ValueError("a model that sees later tokens cannot decode from caches: build it with causal=True")
        if caches is not None and activation_checkpointing:
            raise ValueError(
                "activation_checkpointing is for training: with caches nothing is kept for a backward pass"
            )
        if positions is None:
            if caches is not None:
                raise ValueError("a forward pass with caches needs positions: where the tokens stand, from 0")
            positions, contiguous = torch.arange(tokens.shape[1], device=tokens.device)[None], True
        rotary = {rope: rope.table(positions) for rope in self.ropes}
        ctx = Context(
            positions=positions,
            contiguous=contiguous,
            kv_len=kv_len,
            rotary=rotary,
            docs=docs,
            training=training,
            collect=collect,
        )
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions).to(x.dtype)
        x = ctx.drop(x, self.config.dropout)
        aux = {}
        for i, block in enumerate(self.layers):
            if activation_checkpointing:
                x, said = checkpoint(block, x, ctx, use_reentrant=False, preserve_rng_state=training)
            else:
                x, said = block(x, ctx, None if caches is None else caches[i])
            aux |= {f"layers.{i}.{name}": value for name, value in said.items()}
        if only is not None:
            x = x.take_along_dim(only[..., None], dim=1)
        hidden = self.norm(x)
        return Output(self.lm_head.logits(hidden) if logits else None, aux, hidden)

    @property
    def lm_head(self) -> LMHead:
        """With the head's matrix, or the embedding's that it is tied to."""
        return LMHead((self.head or self.embedding).weight, self.vocab_size, self.config.logit_softcap)

    def make_caches(self, batch_size: int, capacity: int) -> list[Cache]:
        """One empty cache per layer; the caller owns them."""
        return [block.attention.make_cache(batch_size, capacity) for block in self.layers]

    def param_layout(self) -> dict[str, MatrixLayout]:
        """The logical matrices within each matrix of the layers, by parameter name. Embeddings and head are not among
        them: their rows are looked up or compared with, one by one."""
        found = {}
        for i, block in enumerate(self.layers):
            for name, split in block.attention.param_layout().items():
                found[f"layers.{i}.attention.{name}"] = split
            for name, parameter in block.mlp.named_parameters():
                if parameter.ndim >= 2:
                    found[f"layers.{i}.mlp.{name}"] = single_matrix(name, parameter.shape[0])
        return found

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Each matrix draws from a generator of (seed, its name), so models that differ in one part share the rest.

        The std is 1/sqrt(width of the input): fan-in for matrices, d_model for embeddings, so that a tied head begins
        with logits of about unit size. Biases start at zero. So do the matrices that write to the residual stream, and
        every block begins as the identity (Zhang et al. 2019, arXiv:1901.09321); without `zero_init` their std is
        divided by sqrt(2 · n_layers), so that all of them together add about as much as one would (Radford et al. 2019,
        section 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue  # without memory there is nothing to draw
            writes = name.endswith(RESIDUAL_OUTPUTS)
            if name.endswith(".bias") or (writes and self.config.zero_init):
                parameter.zero_()
            elif parameter.ndim >= 2:  # norms start at one
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                drawn = torch.empty(parameter.shape).normal_(0, parameter.shape[1] ** -0.5, generator=generator)
                parameter.copy_(drawn / math.sqrt(2 * self.config.n_layers) if writes else drawn)
        for matrix in (self.embedding, self.head):
            if matrix is not None:
                matrix.weight[matrix.vocab_size :] = 0
