"""Memory of a training step, predicted without taking it.

Weights, gradients, low-precision copies and the optimizer's state are counted in closed form. Activations, and the peak
of all together, are those of the step's own eager code, run on fake tensors, which have a device, a dtype and a shape,
and no numbers. A compiled step takes less.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from data.batches import Batch
from model.cost import on_meta
from model.kernels.flex import Flex
from model.kernels.sdpa import SDPA
from model.transformer import ModelConfig, TransformerLM
from runtime.memory import PeakTensorBytes
from runtime.precision import DTYPES
from training.losses import Losses, mean_loss
from training.run.config import Run
from training.state import TrainState
from training.step import accumulate_gradients

MAX_TILES = 256  # of logits: the loss goes over them in Python, and a fake operator takes as long as a small real one


def made_up_document_start(run: Run, vocab_size: int) -> int | None:
    """What `run.document_start` is where there is no tokenizer: the last token of every vocabulary ends a text."""
    return vocab_size - 1 if run.document_mask else None


class StepMemory(NamedTuple):
    """Bytes of tensors in a training step."""

    weights: int
    gradients: int  # in float32, of all weights that are not frozen
    optimizer: int
    copies: int  # of the matrices, in low precision
    activations: int  # the most that a micro-batch holds of all else, for its backward pass or for a moment
    peak: int  # the most at one time: less than the sum where gradients come as activations go


def memory(run: Run, vocab_size: int, device: torch.device) -> StepMemory:
    model = on_meta(run.model, vocab_size)
    run.optim.freeze(model)
    weights = sum(p.nbytes for p in model.parameters())
    dtype = DTYPES[run.precision]
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    optimizer = run.optim.state_bytes(model)
    accumulation = _accumulate_fake(run, vocab_size, device)
    return StepMemory(
        weights=weights,
        gradients=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        optimizer=optimizer,
        copies=0 if dtype == torch.float32 else matrices * dtype.itemsize,
        activations=accumulation.activations,
        peak=accumulation.bytes + optimizer,
    )


class _AccumulationPeak(PeakTensorBytes):
    """Also counts `activations`: the most beyond the weights that it watches and the gradients they have by then."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self._watched: list[tuple[nn.Parameter, int]] = []

    def watch(self, weights: Iterable[nn.Parameter]) -> None:
        self._watched = [(weight, weight.nbytes) for weight in weights]

    def count(self, storage: torch.UntypedStorage) -> None:
        super().count(storage)
        if self._watched:
            known = sum(size if weight.grad is None else 2 * size for weight, size in self._watched)
            self.activations = max(self.activations, self.alive - known)


def _accumulate_fake(run: Run, vocab_size: int, device: torch.device) -> _AccumulationPeak:
    """Run gradient accumulation on fake tensors, of one micro-batch: all but the first of a step take the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second of imports, for who wants it

    shape = (run.micro_batch_size, run.model.context_length)
    document_start = made_up_document_start(run, vocab_size)
    loss = functools.partial(mean_loss, min_tile=math.prod(shape) * vocab_size // MAX_TILES)
    with FakeTensorMode(), device, _AccumulationPeak() as peak:
        state = TrainState.of(eager_run(run), TransformerLM(traceable(run.model), vocab_size))
        state.losses = Losses(loss)
        state.optimizer.state.clear()  # Adagrad has it before the first step, and `memory` adds it for all
        precision = state.precision
        if run.sequences > run.micro_batch_size:  # a later micro-batch, which meets the gradients of those before
            for parameter in precision.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        peak.watch({id(p): p for p in (*precision.parameters, *precision.model.parameters())}.values())
        tokens = torch.zeros(shape, dtype=torch.int64)
        accumulate_gradients(state, [Batch.of(tokens, tokens, document_start)])
    return peak


def traceable(config: ModelConfig) -> ModelConfig:
    """The model with PyTorch's own fused kernel in the place of one that is compiled or comes from a package: it keeps
    as much for the backward pass (q, k, v, its output and a log-sum-exp), and runs on fake tensors."""
    return config.model_copy(update={"kernel": SDPA()}) if isinstance(config.kernel, Flex | SDPA) else config


def eager_run(run: Run) -> Run:
    """The run as it can be traced: not compiled, and with bfloat16 for float8, whose products keep as much for the
    backward pass."""
    precision = "bf16" if run.precision == "fp8" else run.precision
    return run.model_copy(update={"precision": precision, "compile": False, "autotune": False})
