"""Transformer language model: embedding, pre-norm blocks of attention and MLP on a residual stream, LM head."""

from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from common.settings import Change
from model.attention.base import AttentionChoice
from model.attention.indexer import Indexer
from model.cache import Cache
from model.context import Context
from model.dimensions import Dimensions
from model.kernels.base import Kernel
from model.layout import Kind, Names, ParamLayout, Role, check_buffers, check_layouts, leaf, nested
from model.linear import product
from model.mlp import MLPConfig
from model.mtp import MTP, MTP_LOSS
from model.norm import residual_norm
from model.placement import Placement
from model.positions import position_embedding
from model.upcast import upcast

VOCAB_MULTIPLE = 64  # tensor cores and AMX need aligned widths


class ModelConfig(Dimensions):
    """Model configuration: dimensions, and the choices of attention, MLP and kernel."""

    attention: AttentionChoice
    mlp: MLPConfig
    kernel: Annotated[Kernel, Change.FINE_TUNING]

    @field_validator("attention", "mlp")
    @classmethod
    def _derive(cls, part: AttentionChoice | MLPConfig, info: ValidationInfo) -> AttentionChoice | MLPConfig:
        known = {name: info.data[name] for name in Dimensions.model_fields if name in info.data}
        return part.derive(Dimensions(**known)) if known.keys() == Dimensions.model_fields.keys() else part

    @model_validator(mode="after")
    def _check_kernel(self) -> Self:
        chosen = any(self.attention.of_layer(i).has_indexer for i in range(self.n_layers))
        if chosen and not self.kernel.hides_what_is_not_chosen:
            raise ValueError("kernel=flex cannot attend to what an indexer chooses: choose kernel=auto")
        return self

    @property
    def positions(self) -> str:
        """Name the positional encodings in use, as in `rope`."""
        encodings = [self.position_embedding, *(self.attention.of_layer(i).position for i in range(self.n_layers))]
        return " and ".join(name for name in dict.fromkeys(encodings) if name != "none") or "the causal mask alone"

    def check_training(self, device: torch.device) -> None:
        """Raise Unsupported if the kernel cannot train this model on the device."""
        dropout = any(self.attention.of_layer(i).dropout for i in range(self.n_layers))
        self.kernel.check(device, training=True, dropout=dropout)


class Hidden(NamedTuple):
    """What a forward pass returns: hidden states and auxiliary outputs."""

    x: Tensor  # (B, T, d) after the final norm: the input of the LM head
    aux: dict[str, Tensor]  # auxiliary outputs of the layers, as "layers.3.name"
    stream: Tensor  # (B, T, d) ahead of that norm


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both outputs."""

    def __init__(self, config: ModelConfig, index: int, causal: bool):
        super().__init__()
        self.attention_norm = residual_norm(config)
        self.attention = config.attention.of_layer(index).build(config, config.kernel, causal)
        self.mlp_norm = residual_norm(config)
        self.mlp = config.mlp.of_layer(index).build(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, ctx: Context, cache: Cache | None = None, carried: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """x (B, T, d) -> the same shape, auxiliary outputs, and what the attention leaves for the next layer's."""
        y, aux, carried = self.attention(self.attention_norm(x), ctx, cache, carried)
        x = x + ctx.drop(y, self.dropout)
        y, mlp_aux = self.mlp(self.mlp_norm(x), ctx)
        return x + ctx.drop(y, self.dropout), aux | mlp_aux, carried

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **nested("attention_norm", self.attention_norm, Names("input_layernorm", "ln_1")),
            **nested("attention", self.attention, Names("self_attn", "attn")),
            **nested("mlp_norm", self.mlp_norm, Names("post_attention_layernorm", "ln_2")),
            **nested("mlp", self.mlp, Names("mlp", "mlp")),
        }


class PaddedEmbedding(nn.Module):
    """Token embedding or LM head matrix, its vocabulary padded to a multiple of 64. The padding rows are zero and stay
    zero (nothing reads them, so their gradient is zero), and the state dict leaves them out."""

    def __init__(self, vocab_size: int, d_model: int, role: Role):
        super().__init__()
        self.vocab_size = vocab_size
        self.role = role
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, d_model))
        self.register_state_dict_post_hook(_without_padding)
        self.register_load_state_dict_pre_hook(_with_padding)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up embeddings: (B, T) -> (B, T, d)."""
        return F.embedding(tokens, self.weight)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, self.role, Kind.TABLE)


def _without_padding(module: PaddedEmbedding, state: dict, prefix: str, _metadata) -> None:
    state[prefix + "weight"] = state[prefix + "weight"][: module.vocab_size]


def _with_padding(module: PaddedEmbedding, state: dict, prefix: str, *_) -> None:
    name = prefix + "weight"
    if name in state and state[name].shape == (module.vocab_size, module.weight.shape[1]):
        state[name] = F.pad(state[name], (0, 0, 0, module.weight.shape[0] - module.vocab_size))


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """Logit softcapping in float32, cap · tanh(logits / cap), which bounds them by the cap (Gemma 2, arXiv:2408.00118,
    section 2). Returns the caller's dtype; without a cap, the logits unchanged."""
    return logits if cap is None else (cap * torch.tanh(upcast(logits) / cap)).to(logits.dtype)


class LMHead(NamedTuple):
    """LM head: projects hidden states to logits over the vocabulary."""

    weight: Tensor  # (V', d), with padding rows behind the vocabulary
    vocab_size: int
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, d) after the final norm -> logits (B, T, V), without the padding of the vocabulary."""
        return softcapped(product(hidden, self.weight)[..., : self.vocab_size], self.softcap)


def run_block(
    block: Block, x: Tensor, ctx: Context, cache: Cache | None, carried: Any
) -> tuple[Tensor, dict[str, Tensor], Any]:
    return block(x, ctx, cache, carried)


class TransformerLM(nn.Module):
    """Pre-norm decoder. Its memory is undefined until model.initialise fills it, or weights are loaded."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, causal: bool = True):
        """causal=False makes an encoder: tokens also see those after them, and there are no KV caches."""
        # causal=False is reached by no setting yet: it is for an encoder to come.
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.causal = causal
        self.embedding = PaddedEmbedding(vocab_size, config.d_model, Role.EMBEDDING)
        self.position_embedding = position_embedding(config)
        self.layers = nn.ModuleList(Block(config, i, causal) for i in range(config.n_layers))
        self.norm = residual_norm(config)
        self.head = None if config.tie_embeddings else PaddedEmbedding(vocab_size, config.d_model, Role.HEAD)
        if config.mtp_depth and not causal:
            raise ValueError("mtp_depth=1 predicts tokens that a model with causal=False sees: leave it at 0")
        self.mtp = MTP(config, Block(config, config.n_layers - 1, causal)) if config.mtp_depth else None
        # Distinct rotations in order of first use: in a set the order, and so the traced graph, would change with
        # PYTHONHASHSEED.
        self.ropes = tuple(dict.fromkeys(rope for block in self.layers for rope in block.attention.ropes))
        self.run_block = run_block  # runtime.activation_checkpointing has another
        check_buffers(self)

    def forward(
        self,
        tokens: Tensor,
        at: Placement | None = None,
        *,
        training: bool = False,
        collect: frozenset[str] = frozenset(),
    ) -> Hidden:
        """tokens (B, T) int64 -> hidden states (B, T, d), which `logits` takes.

        at: where the tokens stand, and the KV caches they go on from; unset, at 0..T-1.
        training: dropout is on, and draws from PyTorch's global generator.
        collect: names of the auxiliary outputs that layers shall return, in Hidden.aux.
        """
        at = at or Placement.contiguous(tokens.shape[1], tokens.device)
        ctx = self._context(at, training, collect)
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(at.positions).to(x.dtype)
        x, aux = self._run_blocks(ctx.drop(x, self.config.dropout), ctx)
        return Hidden(self.norm(x), aux, x)

    def look_ahead(
        self,
        stream: Tensor,
        after: Tensor,
        at: Placement,
        *,
        training: bool = False,
        collect: frozenset[str] = frozenset(),
    ) -> Hidden:
        """Multi-token prediction, where config.mtp_depth is 1 (model/mtp.py): hidden states (B, T, d), whose `logits`
        are of the token after the next one, and auxiliary outputs as "mtp.name".

        stream: (B, T, d) of `forward`, for tokens that stand `at` the same places. after: (B, T) the token after each;
        -1 for none, which is embedded as zeros. at: with a cache, that of make_mtp_cache. training, collect: as there.
        """
        ctx = self._context(at, training, collect)
        embedded = self.embedding(after.clamp(min=0)).masked_fill((after < 0)[..., None], 0)
        x = ctx.drop(self.mtp.merged(stream, embedded), self.config.dropout)
        cache = None if at.caches is None else at.caches[0]
        x, aux, _ = self.run_block(self.mtp.block, x, ctx, cache, None)
        return Hidden(self.mtp.norm(x), {f"mtp.{name}": value for name, value in aux.items()}, x)

    def _context(self, at: Placement, training: bool, collect: frozenset[str]) -> Context:
        return Context(at, {rope: rope.table(at.positions, at.below) for rope in self.ropes}, training, collect)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, d) of `forward` -> logits (B, T, V)."""
        return self.lm_head.logits(x)

    def _run_blocks(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Run all layers on x (B, T, d); returns the residual stream and the auxiliary outputs by layer."""
        aux: dict[str, Tensor] = {}
        carried = None
        for i, block in enumerate(self.layers):
            cache = None if ctx.at.caches is None else ctx.at.caches[i]
            x, layer_aux, carried = self.run_block(block, x, ctx, cache, carried)
            for name, value in layer_aux.items():
                aux[f"layers.{i}.{name}"] = value
        return x, aux

    def indexers(self) -> dict[str, Indexer]:
        """The indexers of layers, by their names."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Indexer)}

    def frozen_in_warmup(self) -> list[str]:
        """Names of all parameters but the indexers', where any of these is to be warmed up; else none."""
        indexers = self.indexers().values()
        if not any(indexer.warms_up for indexer in indexers):
            return []
        learning = {parameter for indexer in indexers for parameter in indexer.parameters()}
        return [name for name, parameter in self.named_parameters() if parameter not in learning]

    def freeze_for_warmup(self) -> None:
        """Freeze what `frozen_in_warmup` names."""
        for name in self.frozen_in_warmup():
            self.get_parameter(name).requires_grad_(False)

    @property
    def auxiliary_losses(self) -> dict[str, float]:
        """Weights of the auxiliary losses in training: of layers, by their names in Hidden.aux, and MTP_LOSS."""
        parts = [(name, part) for name, block in self.blocks().items() for part in (block.attention, block.mlp)]
        of_blocks = {
            f"{block}.{name}": weight for block, part in parts for name, weight in part.auxiliary_losses.items()
        }
        return of_blocks if self.mtp is None else of_blocks | {MTP_LOSS: self.config.mtp_weight}

    def blocks(self) -> dict[str, Block]:
        """All blocks, by what their auxiliary outputs are named after; that of multi-token prediction is the last."""
        layers = {f"layers.{i}": block for i, block in enumerate(self.layers)}
        return layers if self.mtp is None else layers | {"mtp": self.mtp.block}

    @property
    def lm_head(self) -> LMHead:
        """LM head with its own matrix, or with the embedding's if tied."""
        return LMHead((self.head or self.embedding).weight, self.vocab_size, self.config.logit_softcap)

    def make_caches(self, batch_size: int, capacity: int) -> list[Cache]:
        """Create one empty KV cache per layer; the caller owns them. Raises ValueError for an encoder."""
        if not self.causal:
            raise ValueError("a model that sees later tokens cannot decode from caches: build it with causal=True")
        return [block.attention.make_cache(batch_size, capacity) for block in self.layers]

    def make_mtp_cache(self, batch_size: int, capacity: int) -> Cache:
        """Create an empty KV cache for `look_ahead`; the caller owns it."""
        return self.mtp.block.attention.make_cache(batch_size, capacity)

    def layout(self) -> dict[str, ParamLayout]:
        """Describe every parameter, by its name. Raises ValueError where a module's layout() lacks one."""
        table = {
            **nested("embedding", self.embedding, Names("model.embed_tokens", "transformer.wte")),
            **nested("position_embedding", self.position_embedding, Names(gpt2="transformer.wpe")),
        }
        for i, block in enumerate(self.layers):
            table |= nested(f"layers.{i}", block, Names(f"model.layers.{i}", f"transformer.h.{i}"))
        table |= nested("norm", self.norm, Names("model.norm", "transformer.ln_f"))
        table |= nested("head", self.head, Names("lm_head", "lm_head"))
        table |= nested("mtp", self.mtp)
        check_layouts(self, table)
        return table
