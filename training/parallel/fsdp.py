"""FSDP: each process holds a part of the rows of every matrix, and of its optimizer state (PyTorch's FSDP2; Zhao et al.
2023, arXiv:2304.11277). A block's matrices are gathered where it runs, forward and backward, and its gradients are
summed and scattered after each micro-batch."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model.transformer import PaddedEmbedding, TransformerLM
from runtime.precision import DTYPES, LossScale, Precision, Shard, Weights, is_divided
from runtime.world import ProcessGroup, World

EPS = 1e-6  # beside the norm that gradients are divided by, as in torch.nn.utils.clip_grad_norm_


class ShardedPrecision(Precision):
    """The model itself, its matrices sharded by their first dimension, and gathered in low precision; vectors, which
    stay in float32, are whole in every process, as are the buffers. Gradients accumulate in float32."""

    def __init__(self, model: TransformerLM, precision: str, world: ProcessGroup, weights: Weights | None = None):
        """weights: of a model whose own matrices are on the meta device, so that no process ever has more than its rows
        of them; None: the model has them."""
        self.world = world
        self.model = model
        self.loss_scale = LossScale(world.device) if precision == "fp16" else None
        _shard(model, DTYPES[precision], world)
        if weights is not None:
            _fill(model, weights, world)
        self.placed = dict(model.named_parameters())
        self.shards = {name: _shard_of(parameter, world) for name, parameter in self.placed.items()}
        self.matrices = {name for name, parameter in self.placed.items() if isinstance(parameter, DTensor)}

    def copy_master_weights(self) -> None:
        """Give up what an evaluation left gathered of the embedding, which may be of older weights."""
        self.model.reshard()

    def backward(self, loss: Tensor) -> None:
        self.scaled(loss).backward()

    def finish_gradients(self) -> None:
        for name in self.matrices:
            gradient = self.placed[name].grad
            self.shards[name].local.grad = None if gradient is None else gradient.to_local()
            self.placed[name].grad = None
        self.world.sum_in_place(self._gradients(of_matrices=False))
        self.unscale()

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        matrices, vectors = self._gradients(of_matrices=True), self._gradients(of_matrices=False)
        squares = self.world.total(self._norm(matrices) ** 2) + self._norm(vectors) ** 2
        norm = squares.sqrt()
        if limit < math.inf:
            torch._foreach_mul_(matrices + vectors, (limit / (norm + EPS)).clamp(max=1))
        return norm

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for name in self.matrices:  # of a step that was given up before its last micro-batch
            self.placed[name].grad = None

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.world.device)

    def _gradients(self, of_matrices: bool) -> list[Tensor]:
        chosen = [shard.local for name, shard in self.shards.items() if (name in self.matrices) == of_matrices]
        return [parameter.grad for parameter in chosen if parameter.grad is not None]


def _shard(model: TransformerLM, dtype: torch.dtype, world: ProcessGroup) -> None:
    """Shard the matrices of a model over processes, moving those that have memory to a device a block at a time."""
    # Vectors, which forward passes read in float32; and what is in a group together is gathered in one dtype.
    vectors = {parameter for parameter in model.parameters() if not is_divided(parameter)}
    for vector in vectors:
        if not vector.is_meta:
            vector.data = vector.data.to(world.device)
    low = dtype if dtype != torch.float32 else None  # what parameters have, float64 in tests
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=low and torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    options = {"mesh": world.mesh(), "mp_policy": policy}
    for block in model.blocks().values():
        fully_shard(block, ignored_params=vectors, **options)
    fully_shard(model, ignored_params=vectors, **options)
    register_fsdp_forward_method(model, "look_ahead")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the targets of all processes
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _fill(model: TransformerLM, weights: Weights, world: World) -> None:
    """Give a sharded model its weights and buffers, one after another."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def filled(tensor: Tensor) -> Tensor:
        name = names[id(tensor)]
        if not isinstance(tensor, DTensor):
            return weights(name, slice(None)).to(world.device)
        rows = Shard(tensor, tensor.shape, world.rank, world.size).rows()
        local = weights(name, rows).to(world.device)
        padding = rows.stop - rows.start - len(local)  # of a vocabulary, which is not stored
        assert not padding or isinstance(model.get_submodule(name.rpartition(".")[0]), PaddedEmbedding), name
        if padding:
            local = torch.cat([local, local.new_zeros(padding, *local.shape[1:])])
        mesh, places = tensor.device_mesh, tensor.placements
        return DTensor.from_local(local, mesh, places, run_check=False, shape=tensor.shape, stride=tensor.stride())

    model._apply(filled)  # which tells FSDP of it, as nn.Module.to_empty does


def _shard_of(parameter: nn.Parameter, world: World) -> Shard:
    if not isinstance(parameter, DTensor):
        return Shard.whole(parameter)
    local = nn.Parameter(parameter.detach().to_local(), parameter.requires_grad)
    shard = Shard(local, parameter.shape, world.rank, world.size)
    rows = shard.rows()
    assert len(local) == rows.stop - rows.start, "FSDP divides rows in another way"
    return shard
