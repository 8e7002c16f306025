"""What a model costs, known before it runs: parameters, FLOPs, bytes. Nothing here needs the memory it speaks of: the
model's own code is run on the meta device, where tensors have shapes and no numbers, or a layer of it on two tokens.

FLOPs are those of matrix products, two per multiply-add. Norms, rotations, softmax and the optimizer are left out, as
is usual: they cost time, but hardly any arithmetic.
"""

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention.base import Context
from model.kernels.auto import MATMUL, Auto, preferred
from model.kernels.base import Kernel
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.sdpa import by_positions, widened
from model.mask import Mask
from model.norm import NORMS
from model.transformer import ModelConfig, TransformerLM

PARTS = ("embedding", "attention", "mlp", "norms", "head")
TRAINING = 3  # a backward pass computes two products for each one of the forward pass
MOST_SCANNED = 2**24  # entries of a mask that are looked at
MOST_WEIGHTS = 2**25  # of a layer's attention that is run in memory


def on_meta(
    config: ModelConfig, vocab_size: int, kernel: Kernel | None = None, *, device: torch.device | None = None
) -> TransformerLM:
    """The model without its memory. It runs, forward and backward: a fused kernel, which knows its devices only, is
    replaced by one that keeps for the backward pass what a fused one keeps. device: where kernel=auto shall choose as
    if it ran there."""
    if kernel is None and isinstance(config.kernel, Naive | Matmul):
        kernel = config.kernel
    elif kernel is None:
        kernel = Fused(auto_on=device.type if device and isinstance(config.kernel, Auto) else None)
    with torch.device("meta"):
        return TransformerLM(config.model_copy(update={"kernel": kernel}), vocab_size)


def parameters(model: TransformerLM) -> dict[str, int]:
    """Numbers by part, as they lie in memory: the padding of a vocabulary counts, a tied head has none of its own.
    Norms within attention are norms."""
    counts = dict.fromkeys(PARTS, 0)
    for name, module in model.named_modules():
        part = next((part for part in ("attention", "mlp", "head") if part in name.split(".")), "embedding")
        part = "norms" if isinstance(module, NORMS) else part
        counts[part] += sum(p.numel() for p in module.parameters(recurse=False))
    return counts


class Flops(NamedTuple):
    """Of the model as it executes in training."""

    per_token: int  # forward, in all layers' matrices and the head
    per_pair: int  # forward, in scores and values, per key that a query attends to, summed over the layers
    keys: float  # what a query of a training window attends to on average, as the mask allows: (T + 1) / 2 if causal

    def forward(self, keys: float | None = None) -> float:
        """Per token. keys: other than the mask allows. A kernel that computes all T and then hides half of them, as the
        naive one does, executes forward(T)."""
        return self.per_token + self.per_pair * (self.keys if keys is None else keys)

    def training(self, keys: float | None = None) -> float:
        """Per token, forward and backward. What a flash kernel computes anew in its backward pass is not counted."""
        return TRAINING * self.forward(keys)


def flops(config: ModelConfig, vocab_size: int, documents: tuple[Tensor, Tensor] | None = None) -> Flops:
    """Every matrix is applied once to each token: 2 · numel. (Absorbed MLA moves kv_up to the query's side, for as many
    products.) A query-key pair costs 2 · H · (D + Dv), with the shapes that the attention hands to its kernel: H heads
    of D in GQA, however few the key heads; in MLA D = n + r and Dv = v expanded, D = Dv = c + r absorbed.

    documents: positions and documents of the tokens of some windows, each (B, T), where tokens see their own document
    only: pairs are counted as these windows have them, on average. Without, a window is one document: an upper bound.
    """
    length, model = config.context_length, on_meta(config, vocab_size, Fused())
    calls = _kernel_calls(model)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if model.head is not None:
        matrices -= model.embedding.weight.numel()  # to look a row up is no product; a tied embedding is the head too
    if model.position_embedding is not None:
        matrices -= sum(p.numel() for p in model.position_embedding.parameters())
    matrices += sum(block.attention.extra_macs_per_token for block in model.layers)
    per_pair = sum(cost for cost, _ in calls)
    keys = {mask: _visible(mask, *(documents or (torch.arange(length)[None], None))) for _, mask in set(calls)}
    return Flops(2 * matrices, per_pair, sum(cost * keys[mask] for cost, mask in calls) / per_pair)


def _kernel_calls(model: TransformerLM) -> list[tuple[int, Any]]:
    """As `Fused.calls`, of each layer in turn, its attention asked what it does with two tokens: one of each kind, its
    weights zero. On the meta device even a division imports PyTorch's compiler, for a second, and every run counts its
    FLOPs before its first step: so only what is large is asked there."""
    config, known, calls = model.config, {}, []
    largest = max(sum(p.numel() for p in block.attention.parameters()) for block in model.layers)
    where = "cpu" if largest <= MOST_WEIGHTS else "meta"
    positions = torch.arange(2, device=where)[None]
    rotary = {rope: rope.table(positions) for rope in model.ropes}
    ctx = Context(positions=positions, contiguous=True, kv_len=None, rotary=rotary)
    for i, block in enumerate(model.layers):
        kind = config.attention.of_layer(i)
        if kind not in known:
            seen = len(config.kernel.calls)
            weights = {name: torch.zeros(p.shape, device=where) for name, p in block.attention.named_parameters()}
            with torch.no_grad():
                functional_call(block.attention, weights, (torch.zeros(1, 2, config.d_model, device=where), ctx))
            known[kind] = config.kernel.calls[seen:]
        calls += known[kind]
    return calls


def cache_bytes_per_token(model: TransformerLM) -> int:
    """While decoding, of all layers, in the dtype of the weights: counted from the caches themselves."""
    return sum(cache.bytes_per_token for cache in model.make_caches(1, 1))


def cache_bytes(model: TransformerLM, tokens: int) -> int:
    """While decoding one text of that many tokens: windows hold no more than they are wide."""
    return sum(cache.rows * cache.bytes_per_token for cache in model.make_caches(1, tokens))


class LivePeak(TorchDispatchMode):
    """Within its `with` block: `bytes`, the most that tensors made there took at one time. On the meta device it
    predicts what the same code would hold on another. It sees what operators return; not what a kernel allocates and
    frees within itself, nor what an allocator wastes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.alive = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive += storage.nbytes()
            self.bytes = max(self.bytes, self.alive)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.seen.remove(key)
        self.alive -= size


class Fused(Kernel):
    """Stands for a fused kernel: its shapes and what it keeps (q, k, v, its output, and a log-sum-exp per query and
    head), and no numbers. Where indices do not say who sees whom, kernel=sdpa runs it by tiles, each of which keeps its
    mask as numbers to add to the scores."""

    auto_on: str | None = None  # the device whose choice of kernel=auto takes its place, if that is no fused one
    calls: list[tuple[int, Any]] = Field(default_factory=list)  # FLOPs per pair, and the Mask without its positions

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        if self.auto_on and preferred(torch.device(self.auto_on), q, k, dropout) is MATMUL:
            return MATMUL(q, k, v, mask, scale, dropout)
        heads, value_dim = q.shape[2], v.shape[-1]
        nowhere = dataclasses.replace(mask, q_pos=None, k_pos=None, q_doc=None, k_doc=None)
        self.calls.append((2 * heads * (q.shape[-1] + value_dim), nowhere))
        width = max(q.shape[-1], value_dim)  # they want q, k and v equally wide
        q, k, v = (widened(x, width) for x in (q, k, v))
        tiled = not mask.is_plain_causal
        out = by_positions(q, k, v, mask, scale, dropout, _masked) if tiled else _Kept.apply(q, k, v)
        return out[..., :value_dim]


def _masked(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, **_: float) -> Tensor:
    return _Kept.apply(q, k, v, q.new_empty(attn_mask.shape))


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


def _visible(mask: Mask, positions: Tensor, docs: Tensor | None = None) -> float:
    """Keys that a query sees on average, by the mask's own predicate, in windows of these positions and documents, each
    (B, T). Of many or long windows, every n-th query is asked."""
    every = -(-positions.numel() * positions.shape[1] // MOST_SCANNED)
    mask = dataclasses.replace(mask, q_pos=positions, k_pos=positions, q_doc=docs, k_doc=docs)
    return mask.visible(slice(every // 2, None, every)).sum(-1).double().mean().item()
