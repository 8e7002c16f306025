"""Mixture of experts: an MLP whose tokens choose some of many small MLPs (Shazeer et al. 2017, arXiv:1701.06538), with
shared ones for all of them (DeepSeekMoE, arXiv:2401.06066). No token is dropped."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.attention.base import divisors
from model.context import Context
from model.dimensions import MAX_SIZE, Dimensions
from model.grouped import grouped_product
from model.layout import Kind, Names, ParamLayout, Role, experts, leaf, nested
from model.mlp import MLP, MLPConfig, SwiGLU, SwiGLUConfig, swiglu_width
from model.upcast import upcast

UNIT = 8  # of a width that is derived: what grouped products of bfloat16 need
GROUP_SCORES = 2  # a group is as good as its best experts, so many (DeepSeek-V3)
SMALLEST_SUM = 1e-20  # of scores that are divided by it
LOAD = "expert_load"  # auxiliary output: how many tokens chose each expert, (experts,) float32
BALANCE_LOSS, Z_LOSS = "balance_loss", "router_z_loss"  # auxiliary losses


class MoEConfig(MLPConfig):
    """d_ff is each expert's. Unset: as much as makes the experts of one token, shared ones included, as wide as a
    SwiGLU's unset d_ff, rounded up to a multiple of 8."""

    n_experts: int = Field(ge=1, le=MAX_SIZE)
    top_k: int = Field(ge=1, le=MAX_SIZE)
    n_shared_experts: int = Field(ge=0, le=MAX_SIZE)
    n_dense_layers: int = Field(ge=0, le=MAX_SIZE)
    dense_d_ff: int | None = Field(ge=1, le=4 * MAX_SIZE)
    router: Literal["softmax", "sigmoid"]
    renormalise: bool
    scaling: float = Field(gt=0, le=1e6)
    n_groups: int = Field(ge=1, le=MAX_SIZE)
    top_groups: int = Field(ge=1, le=MAX_SIZE)
    bias_rate: float = Field(ge=0, le=1)
    balance_loss: float = Field(ge=0, le=1e6)
    router_z_loss: float = Field(ge=0, le=1e6)

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        of, k = self.n_experts, self.top_k
        if k > of:
            raise ValueError(f"mlp.top_k={k} is more than mlp.n_experts={of}: choose at most that")
        if of % self.n_groups:
            raise ValueError(
                f"mlp.n_groups={self.n_groups} does not divide mlp.n_experts={of}: choose one of "
                f"{', '.join(map(str, divisors(of)))}"
            )
        if self.top_groups > self.n_groups:
            raise ValueError(
                f"mlp.top_groups={self.top_groups} is more than mlp.n_groups={self.n_groups}: choose at most that"
            )
        allowed = of // self.n_groups * self.top_groups
        if k > allowed:
            raise ValueError(
                f"mlp.top_k={k} is more than the {allowed} experts in mlp.top_groups={self.top_groups} of "
                f"mlp.n_groups={self.n_groups}: choose more groups, or a smaller top_k"
            )
        return self

    @model_validator(mode="after")
    def _check_learning(self) -> Self:
        if self.top_k == self.n_experts and (self.bias_rate or self.balance_loss):
            name = "bias_rate" if self.bias_rate else "balance_loss"
            raise ValueError(
                f"mlp.{name}={getattr(self, name)} balances nothing where mlp.top_k={self.top_k} chooses all experts: "
                f"set mlp.{name}=0, or a smaller top_k"
            )
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "mlp.top_k=1 with mlp.renormalise=true gives each chosen expert the weight 1, of which the router "
                "learns nothing: set mlp.renormalise=false, or a larger top_k"
            )
        return self

    def derive(self, dimensions: Dimensions) -> Self:
        if self.n_dense_layers >= dimensions.n_layers:
            raise ValueError(
                f"mlp.n_dense_layers={self.n_dense_layers} leaves none of model.n_layers={dimensions.n_layers} to "
                f"experts: choose at most {dimensions.n_layers - 1}, or mlp=swiglu"
            )
        others = self.n_shared_experts > 0 or self.n_dense_layers > 0
        if self.bias and not others:
            raise ValueError(
                "mlp.bias=true: routed experts have no biases, and there are no others: leave it out, or set "
                "mlp.n_shared_experts=1"
            )
        derived = super().derive(dimensions)
        dense = self.dense_d_ff or swiglu_width(dimensions.d_model)
        return derived.model_copy(update={"bias": derived.bias and others, "dense_d_ff": dense})

    def usual_width(self, dimensions: Dimensions) -> int:
        parts = UNIT * (self.top_k + self.n_shared_experts)
        return -(-swiglu_width(dimensions.d_model) // parts) * UNIT

    def of_layer(self, index: int) -> MLPConfig:
        return SwiGLUConfig(d_ff=self.dense_d_ff, bias=self.bias) if index < self.n_dense_layers else self

    def build(self, dimensions: Dimensions) -> "MoE":
        return MoE(self, dimensions)


class Routes(NamedTuple):
    """Which experts N tokens go to."""

    logits: Tensor  # (N, experts) float32
    scores: Tensor  # (N, experts) float32: their softmax or sigmoid
    experts: Tensor  # (N, k) int64, the best first
    weights: Tensor  # (N, k) float32, what their outputs are multiplied with


class MoE(MLP):
    """Σ weightᵢ · expertᵢ(x) over the k experts that the router chooses for a token, + a shared expert(x), as wide as
    `n_shared_experts` together. Experts are SwiGLUs, the routed ones without biases."""

    def __init__(self, config: MoEConfig, dimensions: Dimensions):
        super().__init__()
        self.config = config
        self.router = Router(config, dimensions.d_model)
        self.experts = Experts(config.n_experts, config.top_k, dimensions.d_model, config.d_ff)
        shared = config.n_shared_experts * config.d_ff
        self.shared = SwiGLU(dimensions.d_model, shared, config.bias) if shared else None
        losses = {BALANCE_LOSS: config.balance_loss, Z_LOSS: config.router_z_loss}
        self.auxiliary_losses: Mapping[str, float] = {name: weight for name, weight in losses.items() if weight}

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = x.flatten(0, 1)  # (N, d)
        routes = self.router(tokens)
        y = self.experts(tokens, routes.experts, routes.weights).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        counted = (ctx.at.positions >= 0).expand(x.shape[:2]).flatten()  # no padding
        return y, {name: value(routes, counted) for name, value in OUTPUTS.items() if name in ctx.collect}

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **nested("router", self.router, Names("gate")),
            **nested("experts", self.experts, Names("experts")),
            **nested("shared", self.shared, Names("shared_experts")),
        }


class Router(nn.Module):
    """Scores of experts in float32, softmax or sigmoid, and the choice of the best k.

    Chosen is by the scores plus `selection_bias`, which no loss moves (training/balance.py), and of equal ones the
    expert that comes first; in published checkpoints it is `e_score_correction_bias`. Mixed is by the scores
    themselves: those of the chosen, divided by their sum with `renormalise`, times `scaling`. With groups, only experts
    of the best `top_groups` can be chosen; a group's score is the sum of its two best (DeepSeek-V3, arXiv:2412.19437,
    section 2.1.2)."""

    def __init__(self, config: MoEConfig, d_model: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.register_buffer("selection_bias", torch.zeros(config.n_experts) if config.bias_rate else None)

    def forward(self, x: Tensor) -> Routes:
        """x (N, d)."""
        config = self.config
        logits = F.linear(upcast(x), upcast(self.weight))
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        chosen = self.choose(scores.detach())
        weights = scores.gather(1, chosen)
        if config.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
        return Routes(logits, scores, chosen, weights * config.scaling)

    def choose(self, scores: Tensor) -> Tensor:
        """scores (N, experts) -> (N, k) experts."""
        config = self.config
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if config.top_groups < config.n_groups:
            groups = scores.unflatten(1, (config.n_groups, -1))
            best = groups.gather(2, first(groups, min(GROUP_SCORES, groups.shape[2]))).sum(-1)  # (N, groups)
            loses = torch.ones_like(best, dtype=torch.bool).scatter(1, first(best, config.top_groups), False)
            scores = groups.masked_fill(loses[:, :, None], -torch.inf).flatten(1)  # 0 may be more than a biased score
        return first(scores, config.top_k)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, Role.ROUTER, Kind.MATRIX)


def first(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, in descending order, of equal ones the lower index
    first, which torch.topk does not promise."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


class Experts(nn.Module):
    """SwiGLUs, of which each token goes through the k that it chose. Their matrices lie in one parameter each; tokens
    are sorted by expert, and each expert multiplies its own at once."""

    def __init__(self, n_experts: int, top_k: int, d_model: int, d_ff: int):
        super().__init__()
        self.top_k = top_k
        self.gate_proj = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.up_proj = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (N, d), chosen and weights (N, k) -> (N, d)."""
        of_expert, order = chosen.flatten().sort(stable=True)  # (N · k,)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))  # the inverse
        every = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(of_expert, every, right=True, out_int32=True)
        rows = _Distribute.apply(x, order, back)  # (N · k, d)
        gate, up = grouped_product(rows, self.gate_proj, ends), grouped_product(rows, self.up_proj, ends)
        weight = weights.flatten().index_select(0, order)[:, None].to(x.dtype)
        hidden = F.silu(gate) * (up * weight)
        return _Collect.apply(grouped_product(hidden, self.down_proj, ends), order, back, self.top_k)

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **experts("gate_proj", self.gate_proj, Role.GATE, self.top_k),
            **experts("up_proj", self.up_proj, Role.UP, self.top_k),
            **experts("down_proj", self.down_proj, Role.RESIDUAL_OUTPUT, self.top_k),
        }


def _distributed(x: Tensor, order: Tensor) -> Tensor:
    """x (N, d) -> (N · k, d): each token once for each expert that it chose, sorted by expert."""
    return x.index_select(0, order // (len(order) // len(x)))


def _collected(y: Tensor, back: Tensor, k: int) -> Tensor:
    """y (N · k, d), sorted by expert -> (N, d): of each token, the sum."""
    return y.index_select(0, back).unflatten(0, (-1, k)).sum(1)


class _Distribute(torch.autograd.Function):
    """_distributed, differentiated by _collected, in an order of its own: PyTorch would add up rows in any order on a
    GPU, and one after another on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = len(order) // len(x)
        return _distributed(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _collected(d_rows, back, ctx.k), None, None


class _Collect(torch.autograd.Function):
    """_collected, differentiated by _distributed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        return _collected(y, back, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _distributed(d_y, order), None, None, None


def expert_load(routes: Routes, counted: Tensor) -> Tensor:
    """How many of the counted tokens chose each expert, (experts,) float32. counted: (N,) bool."""
    chosen = torch.zeros_like(routes.logits).scatter(1, routes.experts, 1.0)
    return (chosen * counted[:, None]).sum(0)


def balance_loss(routes: Routes, counted: Tensor) -> Tensor:
    """Σ fᵢ · pᵢ over experts i, with pᵢ the mean share of a token's scores and fᵢ the load relative to the mean load: 1
    where the experts are chosen evenly (Switch, arXiv:2101.03961, equation 4, for k experts)."""
    load = expert_load(routes, counted).detach()
    tokens = counted.sum().clamp_min(1)
    shares = routes.scores / routes.scores.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    share = (shares * counted[:, None]).sum(0) / tokens
    return (load / (tokens * routes.experts.shape[1] / len(load)) * share).sum()


def z_loss(routes: Routes, counted: Tensor) -> Tensor:
    """The mean of log²Σ exp(logits), which keeps the logits small (ST-MoE, arXiv:2202.08906, equation 5)."""
    return (routes.logits.logsumexp(-1).square() * counted).sum() / counted.sum().clamp_min(1)


OUTPUTS = {LOAD: expert_load, BALANCE_LOSS: balance_loss, Z_LOSS: z_loss}
