"""Costs of a model, known before it runs: parameters, FLOPs, bytes of the KV cache. All in closed form, from shapes.

FLOPs are those of matrix products, two per multiply-add. Norms, rotations, softmax and the optimizer are left out, as
is usual: they cost time, but hardly any arithmetic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.layout import Kind, Role
from model.mask import Mask, Pattern
from model.transformer import ModelConfig, TransformerLM

PARTS = ("embedding", "attention", "mlp", "norms", "head")
MTP = "mtp"  # as TransformerLM calls the module
PART_OF_ROLE = {  # attention and MLP share the others
    Role.EMBEDDING: "embedding",
    Role.POSITION: "embedding",
    Role.HEAD: "head",
    Role.NORM: "norms",
}
TRAINING = 3  # a backward pass computes two products for each one of the forward pass
MAX_SCANNED = 2**24  # entries of a mask that are looked at


def on_meta(config: ModelConfig, vocab_size: int) -> TransformerLM:
    """The model on the meta device: its shapes, without its memory."""
    with torch.device("meta"):
        return TransformerLM(config, vocab_size)


def parameters(model: TransformerLM) -> dict[str, int]:
    """Numbers by part, as they lie in memory: the padding of a vocabulary counts, a tied head has none of its own.
    Norms within attention are norms. What is of multi-token prediction is a part of its own, where there is any."""
    counts = dict.fromkeys(PARTS if model.mtp is None else (*PARTS, MTP), 0)
    layouts = model.layout()
    of_attention = {parameter for block in model.layers for parameter in block.attention.parameters()}
    for name, parameter in model.named_parameters():
        part = PART_OF_ROLE.get(layouts[name].role) or ("attention" if parameter in of_attention else "mlp")
        counts[MTP if name.startswith(f"{MTP}.") else part] += parameter.numel()
    return counts


def active_parameters(model: TransformerLM) -> int:
    """Numbers that one token meets: all but those of the experts that it does not choose, and of multi-token
    prediction."""
    layouts = model.layout()
    return sum(layouts[name].active(parameter.numel()) for name, parameter in _of_plain_decoding(model))


def weight_bytes_read(model: TransformerLM, tokens: int, drafts: bool = False) -> int:
    """Of the weights, what a step over so many tokens reads, at most. drafts: by multi-token prediction, whose weights
    it reads too."""
    layouts, read = model.layout(), model.named_parameters() if drafts else _of_plain_decoding(model)
    return sum(layouts[name].active(parameter.nbytes, tokens) for name, parameter in read)


def _of_plain_decoding(model: TransformerLM) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, one) for name, one in model.named_parameters() if not name.startswith(f"{MTP}.")]


def has_experts(model: TransformerLM) -> bool:
    """Whether tokens meet only some of the parameters."""
    return any(layout.experts is not None for layout in model.layout().values())


class Flops(NamedTuple):
    """Of the model as it executes in training. Multi-token prediction is apart: no score and no plain decoding has it,
    and it runs the head once more."""

    per_token: int  # forward, in all layers' matrices and the head
    per_pair: int  # forward, in scores and values, per key that a query attends to, summed over the layers
    keys: float  # what a query of a training window attends to on average, as the mask allows: (T + 1) / 2 if causal
    mtp_per_token: int = 0  # forward, of multi-token prediction
    mtp_per_pair: int = 0
    mtp_keys: float = 0.0

    def forward(self, keys: float | None = None) -> float:
        """Per token. keys: other than the mask allows. A kernel that computes all T and then hides half of them, as the
        naive one does, executes forward(T)."""
        return self.per_token + self.per_pair * (self.keys if keys is None else keys)

    def mtp(self, keys: float | None = None) -> float:
        """Per token, forward, of multi-token prediction, which training does beside `forward`."""
        return self.mtp_per_token + self.mtp_per_pair * (self.mtp_keys if keys is None else keys)

    def training(self, keys: float | None = None) -> float:
        """Per token, forward and backward. What a flash kernel recomputes in its backward pass is not counted."""
        return TRAINING * (self.forward(keys) + self.mtp(keys))


def flops(config: ModelConfig, vocab_size: int, documents: tuple[Tensor, Tensor] | None = None) -> Flops:
    """Every matrix is applied once to each token, of those of experts as many as a token chooses: 2 · numel. (Absorbed
    MLA moves kv_up to the query's side, for as many products.) A query-key pair costs twice the multiply-adds that its
    attention states, `macs_per_pair`.

    documents: positions and documents of the tokens of some windows, each (B, T), where tokens see their own document
    only: pairs are counted as these windows have them, on average. Without, a window is one document: an upper bound.
    """
    model = on_meta(config, vocab_size)
    attentions = [block.attention for block in model.layers]
    macs, of_mtp = _macs_of_matrices(model)
    macs += sum(attention.extra_macs_per_token for attention in attentions)
    windows = documents or (torch.arange(config.context_length)[None], None)
    keys = {pattern: _visible(pattern, *windows) for pattern in {attention.pattern for attention in attentions}}
    per_pair = sum(attention.macs_per_pair for attention in attentions)
    seen = sum(attention.macs_per_pair * keys[attention.pattern] for attention in attentions)
    found = Flops(2 * macs, 2 * per_pair, seen / per_pair)
    if model.mtp is None:
        return found
    attention = model.mtp.block.attention  # of the last layer's kind, so its keys are known
    return found._replace(
        mtp_per_token=2 * (of_mtp + attention.extra_macs_per_token + model.lm_head.weight.numel()),
        mtp_per_pair=2 * attention.macs_per_pair,
        mtp_keys=keys[attention.pattern],
    )


def _macs_of_matrices(model: TransformerLM) -> tuple[int, int]:
    """Multiply-adds per token, of the model and of the matrices of multi-token prediction. To look up a row of an
    embedding is no product; but a tied embedding is the head too."""
    head = Role.EMBEDDING if model.head is None else Role.HEAD
    layouts = model.layout()
    multiplied = {name for name, layout in layouts.items() if layout.kind is Kind.MATRIX or layout.role is head}
    active = {name: layouts[name].active(model.get_parameter(name).numel()) for name in multiplied}
    of_mtp = sum(count for name, count in active.items() if name.startswith(f"{MTP}."))
    return sum(active.values()) - of_mtp, of_mtp


def _visible(pattern: Pattern, positions: Tensor, docs: Tensor | None = None) -> float:
    """Keys that a query sees on average, by the mask's own predicate, in windows of these positions and documents, each
    (B, T). Of many or long windows, every n-th query is asked."""
    every = -(-positions.numel() * positions.shape[1] // MAX_SCANNED)
    mask = Mask(positions, positions, contiguous=True, pattern=pattern, q_doc=docs, k_doc=docs)
    return mask.visible_in(slice(every // 2, None, every), slice(None)).sum(-1).double().mean().item()


def cache_bytes_per_token(model: TransformerLM) -> int:
    """While decoding, of all layers, in the dtype of the weights: counted from the caches themselves."""
    return sum(cache.bytes_per_token for cache in model.make_caches(1, 1))


def cache_bytes(model: TransformerLM, tokens: int) -> int:
    """While decoding one text of that many tokens: windows hold little more than they are wide."""
    return sum(cache.bytes_per_sequence for cache in model.make_caches(1, tokens))
