"""Memory of a training step, predicted without taking it; of several processes that train together, that of one.

Weights, gradients, low-precision copies and the optimizer's state are counted in closed form. Activations, and the peak
of all together, are those of the step's own eager code, run on fake tensors, which have a device, a dtype and a shape,
and no numbers, and beside imagined processes. A compiled step takes less.
"""

import functools
import gc
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch, micro_batch_of
from model.cost import on_meta
from model.kernels.flex import Flex
from model.kernels.sdpa import SDPA
from model.transformer import ModelConfig, TransformerLM
from runtime.memory import PeakTensorBytes
from runtime.precision import DTYPES, MixedPrecision, Precision
from runtime.world import World
from training.losses import Losses, mean_loss
from training.parallel.imagined import imagined
from training.run.config import Run
from training.state import TrainState
from training.step import accumulate_gradients, reads_found_inf

MAX_TILES = 256  # of logits: the loss goes over them in Python, and a fake operator takes as long as a small real one


def made_up_document_start(run: Run, vocab_size: int) -> int | None:
    """What `run.document_start` is where there is no tokenizer: the last token of every vocabulary ends a text."""
    return vocab_size - 1 if run.document_mask else None


class StepMemory(NamedTuple):
    """Bytes of tensors in a training step, in one process."""

    weights: int
    gradients: int  # in float32, of all weights that are not frozen
    optimizer: int
    copies: int  # of the matrices, in low precision; where processes share these, the copies gathered at one time
    activations: int  # the most that a micro-batch holds of all else, with what is gathered, for its backward pass or
    # for a moment
    accumulating: int  # the most at one time until all gradients are there: less than the sum where they come as
    # activations go
    updating: int  # the most at one time after that; 0 where the optimizer's step cannot be run on fake tensors

    @property
    def peak(self) -> int:
        return max(self.accumulating, self.updating)


def memory(run: Run, vocab_size: int, device: torch.device) -> StepMemory:
    """Of a run, its processes counted. Raises no error where a step of them would."""
    with imagined(run.parallel, device) as world:
        return _memory(run, vocab_size, device, world)


def _memory(run: Run, vocab_size: int, device: torch.device, world: World) -> StepMemory:
    """Run gradient accumulation and an update on fake tensors, of one micro-batch: all but the first of a step take the
    same."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second of imports, for who wants it

    share = run.sequences // world.size
    shape = (micro_batch_of(share, run.micro_batch_size), run.model.context_length)
    document_start = made_up_document_start(run, vocab_size)
    loss = functools.partial(mean_loss, min_tile=math.prod(shape) * vocab_size // MAX_TILES)
    with FakeTensorMode(), device, _StepPeak() as peak:
        state = TrainState.of(eager_run(run), TransformerLM(traceable(run.model), vocab_size), world)
        if run.parallel.shards:
            gc.collect()  # what sharding leaves of whole matrices is in cycles, on fake tensors alone
            peak.restart()  # without these matrices, which no process has when it begins a run
        state.losses = Losses(loss)
        state.optimizer.state.clear()  # Adagrad has it before the first step, and it is added here for all
        precision = state.precision
        held = {id(weight): (weight, size) for weight, size in _held(precision)}.values()
        if share > shape[0]:  # a later micro-batch, which meets the gradients of those before
            for weight in precision.model.parameters() if run.parallel.shards else precision.parameters:
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        tokens = torch.zeros(shape, dtype=torch.int64)
        with peak.watching(held):
            accumulate_gradients(state, [Batch.of(tokens, tokens, document_start)])
        accumulating = peak.bytes
        updating = _updated(state, peak)
        return StepMemory(
            weights=sum(p.nbytes for p in precision.parameters),
            gradients=sum(p.nbytes for p in precision.parameters if p.requires_grad),
            optimizer=(optimizer := run.optim.state_bytes(state.model, precision)),
            copies=_copies(run, vocab_size),
            activations=peak.activations,
            accumulating=accumulating + optimizer,
            updating=updating,
        )


class _StepPeak(PeakTensorBytes):
    """Also counts `activations`: the most beyond the weights that it watches and the gradients they have by then."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self._watched: list[tuple[Tensor, int]] = []

    @contextmanager
    def watching(self, weights: Iterable[tuple[Tensor, int]]) -> Iterator[None]:
        """weights: with the bytes of each in this process."""
        self._watched = list(weights)
        yield
        self._watched = []

    def restart(self) -> None:
        """Count the most from now on."""
        self.bytes = self.alive

    def count(self, storage: torch.UntypedStorage) -> None:
        super().count(storage)
        if self._watched:
            known = sum(size if weight.grad is None else 2 * size for weight, size in self._watched)
            self.activations = max(self.activations, self.alive - known)


def _held(precision: Precision) -> Iterable[tuple[Tensor, int]]:
    """The weights and copies that a process holds throughout, as they bear their gradients, and their bytes."""
    if isinstance(precision, MixedPrecision):
        return [(p, p.nbytes) for p in (*precision.parameters, *precision.model.parameters())]
    return [(weight, precision.shards[name].local.nbytes) for name, weight in precision.model.named_parameters()]


def _updated(state: TrainState, peak: _StepPeak) -> int:
    """Bytes at the peak of an update, the gradients there."""
    if not reads_found_inf(state.optimizer):  # it may read numbers, of which there are none
        return 0
    peak.restart()
    state.precision.clip(state.clip_norm or math.inf)
    state.optimizer.step()
    return peak.bytes


def _copies(run: Run, vocab_size: int) -> int:
    model = on_meta(run.model, vocab_size)
    dtype = DTYPES[run.precision]
    whole = _matrix_numbers(model)
    if not run.parallel.shards:
        return 0 if dtype == torch.float32 else whole * dtype.itemsize
    blocks = [_matrix_numbers(block) for block in model.blocks().values()]
    two = max(map(sum, itertools.pairwise(blocks)), default=sum(blocks))  # the next one is gathered while one runs
    return (whole - sum(blocks) + two) * dtype.itemsize


def _matrix_numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def traceable(config: ModelConfig) -> ModelConfig:
    """The model with PyTorch's own fused kernel in the place of one that is compiled or comes from a package: it keeps
    as much for the backward pass (q, k, v, its output and a log-sum-exp), and runs on fake tensors."""
    return config.model_copy(update={"kernel": SDPA()}) if isinstance(config.kernel, Flex | SDPA) else config


def eager_run(run: Run) -> Run:
    """The run as it can be traced: not compiled, and with bfloat16 for float8, whose products keep as much for the
    backward pass."""
    precision = "bf16" if run.precision == "fp8" else run.precision
    return run.model_copy(update={"precision": precision, "compile": False, "autotune": False})
