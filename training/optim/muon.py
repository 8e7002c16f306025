"""Muon for the matrices between the layers' vectors, AdamW for everything else."""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from common.settings import MAX_COUNT
from model.layout import Kind, ParamLayout
from model.transformer import TransformerLM
from runtime.fast_startup import UncompiledOptimizer
from runtime.precision import Precision, multiplies_bf16
from training.optim.adamw import AdamWConfig, moments
from training.optim.base import StateTensor, shards_of
from training.optim.groups import parameter_groups
from training.optim.newton_schulz import newton_schulz
from training.parallel.spread import Spread

FIRST_MOMENTUM = 0.85


class MuonConfig(AdamWConfig):
    """Muon's rate, muon_lr, is for the matrices of the layers and need not change with the width: an update's spectral
    norm is muon_lr · sqrt(max(1, rows/cols)). lr, beta1, beta2 and eps are AdamW's, for embeddings, head and vectors;
    weight_decay is for all matrices, each at its own rate. The schedule multiplies all rates. Unset, lr is 2 /
    d_model: embeddings bear a larger one than AdamW alone may give the matrices beside them. Unset, bias_lr is 4 · lr:
    heads see positions by the biases of queries and keys, which must outgrow what Muon adds to the matrices beside them
    (docs/studies/why_mla_is_behind.md)."""

    lr_times_width: ClassVar[float] = 2.0
    bias_lr_factor: ClassVar[float] = 4.0
    own_logit_init: ClassVar[float | None] = 1.0  # the weight of the last norm grows fast enough at 2 / d_model

    muon_lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    momentum_warmup: int = Field(ge=0, le=MAX_COUNT)  # updates until the momentum, from 0.85 on, is that
    per_head: bool  # orthogonalise each logical matrix (a head's queries, ...); false: each stored matrix

    @property
    def base_lrs(self) -> dict[str, float]:
        return {"muon_lr": self.muon_lr, **super().base_lrs}

    def build(self, model: TransformerLM, precision: Precision | None = None) -> "Muon":
        shards, world = shards_of(model, precision)
        table = {name: layout if self.per_head else layout.whole() for name, layout in model.layout().items()}
        layouts = {shards[name].local: layout for name, layout in table.items()}
        spread = None
        if world.size > 1:
            matrices = {name: layout for name, layout in table.items() if layout.kind is Kind.MATRIX}
            spread = Spread([shards[name] for name in matrices], [*map(newton_schulz_cost, matrices.values())], world)
        return Muon(parameter_groups(model, self.groups, self.options, shards), layouts, spread)

    def options(self, layout: ParamLayout) -> dict[str, Any]:
        """Options of Muon for a matrix, and of AdamW for others."""
        if layout.kind is not Kind.MATRIX:
            return super().options(layout)
        return {
            "lr": self.muon_lr,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "momentum_warmup": self.momentum_warmup,
        }

    def state_layout(self, layout: ParamLayout, shape: torch.Size) -> dict[str, StateTensor]:
        return state_of(layout, shape)


def state_of(layout: ParamLayout, shape: torch.Size) -> dict[str, StateTensor]:
    of_matrix = {"momentum_buffer": StateTensor(shape)}
    return (of_matrix if layout.kind is Kind.MATRIX else moments(shape)) | {"updates": StateTensor.count()}


class Muon(UncompiledOptimizer, torch.optim.Optimizer):
    """For every logical matrix W (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with momentum m,
    gradient g and the group's rate η, muon_lr times what the schedule gives every group:

        M <- m M + (1 - m) g
        W <- (1 - η · weight_decay) W - η · sqrt(max(1, rows/cols)) · orthogonal(m M + (1 - m) g)

    An orthogonal update has the same gain in every direction; the factor makes it one between root mean squares, so
    that one rate suits every shape and width (Yang et al. 2023, arXiv:2310.17813). The update does not depend on the
    gradient's size: clipping only changes how much of the momentum each step is.

    Matrices of equal shape in a group are orthogonalised together. Embeddings, head and vectors learn by AdamW.

    With found_inf set, as PyTorch's gradient scaler does, a step changes nothing where that is 1, and the device is not
    waited for.
    """

    _step_supports_amp_scaling = True
    grad_scale = found_inf = None  # arguments of `step`, set while it runs, as PyTorch's gradient scaler does

    def __init__(self, groups: list[dict], layouts: Mapping[nn.Parameter, ParamLayout], spread: Spread | None = None):
        """groups: those of matrices have a momentum, the others what AdamW needs. spread: where several processes
        train, which of them orthogonalises a matrix."""
        super().__init__(groups, {})
        self.layouts = layouts
        self.spread = spread

    def state_layout(self, parameter: nn.Parameter) -> dict[str, StateTensor]:
        """State tensors of a parameter after a step, by name."""
        return state_of(self.layouts[parameter], parameter.shape)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
            else:
                self._step_adamw(group)

    def _step_matrices(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                updates = torch.zeros((), device=p.device)
                self.state[p] = {"momentum_buffer": torch.zeros_like(p), "updates": updates}
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        counts = [self.state[p]["updates"] for p in parameters]
        skipped = torch.zeros_like(counts[0]) if self.found_inf is None else self.found_inf
        # A skipped step counts for nothing: zero gradients, a momentum factor of one, a rate of zero.
        momentum = torch.where(skipped > 0, 1.0, momentum_after(counts[0], group["momentum"], group["momentum_warmup"]))
        rate = group["lr"] * (1 - skipped)
        fresh = [torch.where(skipped > 0, 0.0, p.grad) * (1 - momentum) for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, fresh)
        ahead = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(ahead, fresh)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        if self.spread is None:
            self._subtract_orthogonal(parameters, parameters, ahead, rate)
        else:
            torch._foreach_add_(parameters, self.spread(parameters, ahead, functools.partial(self._updates, rate=rate)))
        torch._foreach_add_(counts, [1 - skipped] * len(counts))  # of one tensor, a CPU would read its number

    def _updates(self, parameters: list[nn.Parameter], directions: list[Tensor], rate: Tensor) -> list[Tensor]:
        """What a step adds to whole matrices that go in these directions."""
        updates = [torch.zeros_like(direction) for direction in directions]
        self._subtract_orthogonal(parameters, updates, directions, rate)
        return updates

    def _subtract_orthogonal(
        self, parameters: list[nn.Parameter], stored: list[Tensor], directions: list[Tensor], rate: Tensor
    ) -> None:
        """Subtract from tensors of the parameters' shapes their directions, orthogonalised, times the rate."""
        for matrices, along in self._by_shape(parameters, stored, directions):
            _, rows, cols = matrices[0].shape
            updates = newton_schulz(torch.cat(along), _dtype(matrices[0])) * (rate * math.sqrt(max(1, rows / cols)))
            torch._foreach_sub_(matrices, updates.split([len(stack) for stack in matrices]))

    def _by_shape(
        self, parameters: list[nn.Parameter], stored: list[Tensor], directions: list[Tensor]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Views (heads, rows, cols) of logical matrices, and of their directions, those of a shape together."""
        found = {}
        for parameter, whole, direction in zip(parameters, stored, directions, strict=True):
            layout = self.layouts[parameter]
            for part, along in zip(layout.views(whole).values(), layout.views(direction).values(), strict=True):
                matrices, alongs = found.setdefault(part.shape[1:], ([], []))
                matrices.append(part)
                alongs.append(along)
        return list(found.values())

    def _step_adamw(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                updates = torch.zeros((), device=p.device)
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "updates": updates}
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq")),
            [],
            [self.state[p]["updates"] for p in parameters],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz_cost(layout: ParamLayout) -> int:
    """What orthogonalising a parameter's logical matrices costs, in products per step of the iteration."""
    matrices = layout.heads * (layout.experts.count if layout.experts else 1)
    return sum(matrices * part.rows * layout.fan_in * min(part.rows, layout.fan_in) for part in layout.parts)


def _dtype(matrix: Tensor) -> torch.dtype:
    """What products of the iteration are made in."""
    low = matrix.dtype == torch.float32 and multiplies_bf16(matrix.device)
    return torch.bfloat16 if low else matrix.dtype


def momentum_after(updates: Tensor, momentum: float, warmup: int) -> Tensor:
    """Momentum of the update that comes after so many, a scalar: linear from 0.85, or `momentum` if that is less."""
    first = min(FIRST_MOMENTUM, momentum)
    return first + (momentum - first) * ((updates + 1) / (warmup + 1)).clamp(max=1)
