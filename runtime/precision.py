"""Mixed precision with float32 master weights. The optimizer updates and checkpoints float32; forward and backward use
bfloat16 or float16 copies of the matrices."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from common.experimental import warn_experimental
from common.settings import FrozenSettings
from runtime.fp8 import check_fp8, multiply_in_fp8
from runtime.world import ONE, World

Weights = Callable[[str, slice], Tensor]  # some rows of a parameter, by its name, or a buffer; they are the caller's
log = logging.getLogger("headroom")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}  # of the copies


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively. Some that do not imitate it, slowly."""
    return {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }.get(device.type, lambda: False)()


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` takes bf16 where the device multiplies it natively, else fp16 on a GPU, else fp32, and logs which. Another
    choice stays as it is, with a warning where the device only imitates it."""
    if precision == "fp8":
        check_fp8(device)
        warn_experimental("precision=fp8")
    native_bf16 = multiplies_bf16(device)
    if precision == "auto":
        chosen = "bf16" if native_bf16 else "fp16" if device.type == "cuda" else "fp32"
        reason = "multiplies bfloat16 natively" if native_bf16 else "has no native bfloat16"
        log.info(f"precision {chosen}: this {device.type} {reason}")
        return chosen
    if (precision == "bf16" and not native_bf16) or (precision == "fp16" and device.type == "cpu"):
        log.warning(f"precision {precision}: this {device.type} only imitates it, slowly; precision=auto is faster")
    return precision


class LossScale:
    """Loss scaling, which keeps float16 gradients from underflowing: the loss is multiplied by a scale that doubles
    after GROWTH_STEPS good steps and halves after a bad one (Micikevicius et al. 2018, arXiv:1710.03740). It lives on
    the device and is never read there, so that no step has to wait.

    It grows up to MAX_SCALE, as in NVIDIA's Apex: float16 then holds gradients down to 2^-48, and a model whose
    gradients are all smaller has nothing to learn from them. Without an end it would double to infinity, from which no
    halving leads back. It shrinks down to MIN_SCALE, where gradients of 2^40 still fit into float16: a smaller scale
    would not make finite what is not finite then, and without an end it would halve to 0.
    """

    INITIAL, GROWTH_STEPS, MIN_SCALE, MAX_SCALE = 2.0**16, 2000, 2.0**-24, 2.0**24

    class State(FrozenSettings):
        scale: float = Field(gt=0, le=2.0**127)
        good_steps: int = Field(ge=0, lt=2000)  # since the scale last changed: fewer than GROWTH_STEPS

    def __init__(self, device: torch.device):
        self.scale = torch.tensor(self.INITIAL, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def update(self, skipped: Tensor) -> None:
        """skipped: scalar bool, true where the step's gradients were not finite."""
        good = self.good_steps + 1
        grown = good == self.GROWTH_STEPS
        self.good_steps = torch.where(skipped | grown, 0, good)
        larger = torch.where(grown, (self.scale * 2).clamp(max=self.MAX_SCALE), self.scale)
        self.scale = torch.where(skipped, (self.scale / 2).clamp(min=self.MIN_SCALE), larger)

    def state(self) -> State:
        return self.State(scale=self.scale.item(), good_steps=self.good_steps.item())

    def load(self, state: State) -> None:
        """Restores a saved state. A scale beyond the limits, from a run before there were any, is clamped to them."""
        self.scale.fill_(min(max(state.scale, self.MIN_SCALE), self.MAX_SCALE))
        self.good_steps.fill_(state.good_steps)


class Shard(NamedTuple):
    """What a process holds of a parameter, or of its optimizer state: all of it, or some rows (dimension 0) where it is
    divided among processes, each of which has as many as the first, as far as there are any (so FSDP divides)."""

    local: Tensor  # of a parameter, the one that the optimizer updates
    shape: torch.Size  # of the whole
    rank: int = 0
    ranks: int = 1  # it is divided among so many

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        return cls(tensor, tensor.shape)

    @property
    def is_whole(self) -> bool:
        return self.ranks == 1

    def rows(self, rank: int | None = None) -> slice:
        """The rows that a process has, this one or that of a rank."""
        count, each = self.shape[0], -(-self.shape[0] // self.ranks)
        rank = self.rank if rank is None else rank if self.ranks > 1 else 0
        return slice(min(rank * each, count), min((rank + 1) * each, count))

    def beside(self, state: Tensor) -> Self:
        """The shard that a tensor of the parameter's optimizer state is: of as many rows, or a number that every
        process has."""
        return Shard.whole(state) if state.shape != self.local.shape else self._replace(local=state)


def is_divided(parameter: Tensor) -> bool:
    """Whether FSDP divides a parameter: a matrix, or those of experts. Vectors are whole in every process."""
    return parameter.ndim >= 2


class Precision(ABC):
    """A precision strategy: the model that forward and backward run on, and how its gradients come to the float32
    parameters that the optimizer updates. A step calls `copy_master_weights`, `backward` for the loss of each
    micro-batch, `finish_gradients` and `clip`; after the update, `loss_scale.update` and `drop_gradients`."""

    model: nn.Module  # forward and backward run on it
    shards: dict[str, Shard]  # the float32 parameters by their names, as this process holds them
    loss_scale: LossScale | None = None  # of float16
    world: World = ONE  # the processes whose gradients are added up

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The float32 parameters that the optimizer updates; of one that is sharded, this process's rows."""
        return [shard.local for shard in self.shards.values()]

    @abstractmethod
    def copy_master_weights(self) -> None:
        """Bring the parameters' numbers to `model`. Call before the first forward after they changed."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the parameters; in float16 they are scaled until the last."""

    @abstractmethod
    def finish_gradients(self) -> None:
        """Call after the last backward of a step: the gradients are then those of all processes, not scaled."""

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`, which may be inf -> their norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that was taken or given up."""
        for parameter in self.parameters:
            parameter.grad = None

    def unscale(self) -> None:
        """Divide the gradients by the loss scale."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.loss_scale is not None and gradients:
            torch._foreach_div_(gradients, self.loss_scale.scale)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale


class MixedPrecision(Precision):
    """Master weights: the model that forward and backward run on, `model`, beside its float32 master weights.

    In float32 it is the model itself. In bfloat16 and float16 it is a twin that shares the vectors and the buffers, and
    has low-precision copies of the matrices, made once per step; gradients accumulate in float32, micro-batch by
    micro-batch. Of several processes, each has the whole model, and the accumulated gradients are summed once a step.
    """

    def __init__(self, model: nn.Module, precision: str, world: World = ONE):
        dtype = DTYPES[precision]
        self.world = world
        self.shards = {name: Shard.whole(parameter) for name, parameter in model.named_parameters()}
        self.master_weights, self.copies = [], []
        # What deepcopy puts in the place of a tensor: a vector or a buffer itself, or a matrix's copy.
        twins = {id(buffer): buffer for buffer in model.buffers()}
        for parameter in self.parameters:
            twins[id(parameter)] = parameter
            if dtype != torch.float32 and parameter.ndim >= 2:
                twins[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                self.master_weights.append(parameter)
                self.copies.append(twins[id(parameter)])
        self.model = copy.deepcopy(model, twins) if self.copies else model
        if precision == "fp8":
            multiply_in_fp8(self.model)
        self.loss_scale = LossScale(self.parameters[0].device) if precision == "fp16" else None

    @torch.no_grad()
    def copy_master_weights(self) -> None:
        if self.copies:
            torch._foreach_copy_(self.copies, self.master_weights)

    def backward(self, loss: Tensor) -> None:
        self.scaled(loss).backward()
        for master, twin in zip(self.master_weights, self.copies, strict=True):
            if twin.grad is None:  # frozen, or not used
                continue
            if master.grad is None:
                master.grad = twin.grad.float()
            else:
                master.grad.add_(twin.grad)
            twin.grad = None

    def finish_gradients(self) -> None:
        self.world.sum_in_place(parameter.grad for parameter in self.parameters if parameter.grad is not None)
        self.unscale()
