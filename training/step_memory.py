"""Memory of a training step, predicted without taking it.

Weights, gradients, low-precision copies and the optimizer's state are counted in closed form. Activations are what the
step's own eager code holds besides, run on fake tensors, which have a device, a dtype and a shape, and no numbers. A
compiled step takes less.
"""

import contextlib
import math
from collections.abc import Iterator

import torch

from model.cost import on_meta
from model.kernels.flex import Flex
from model.kernels.sdpa import SDPA
from model.loss import TILE
from model.transformer import ModelConfig, TransformerLM
from runtime.memory import PeakTensorBytes
from runtime.precision import DTYPES, MixedPrecision
from training.run.config import Run
from training.step import accumulate_gradients, losses_of

MAX_TILES = 64  # of logits: the loss goes over them in Python, and a fake operator takes as long as a small real one


def memory(run: Run, vocab_size: int, device: torch.device) -> dict[str, int]:
    """Bytes of tensors at the peak of a training step, by what they are. Activations are all that is none of the
    others: what the backward pass needs of a micro-batch, and what is alive for a moment."""
    model = on_meta(run.model, vocab_size)
    weights = sum(p.nbytes for p in model.parameters())
    dtype = DTYPES[run.precision]
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": run.optim.state_bytes(model),
        "copies": 0 if dtype == torch.float32 else matrices * dtype.itemsize,
        "activations": _activations(run, vocab_size, device),
    }


def _activations(run: Run, vocab_size: int, device: torch.device) -> int:
    """Peak of a step beyond weights, gradients and copies."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second of imports, for who wants it

    shape = (run.micro_batch_size, run.model.context_length)
    end_of_text = vocab_size - 1  # the last token of every vocabulary
    loss = losses_of(run.data, end_of_text, activation_checkpointing=run.activation_checkpointing).mean_loss
    with FakeTensorMode(), device, PeakTensorBytes() as peak, _few_tiles(math.prod(shape) * vocab_size):
        mixed = MixedPrecision(TransformerLM(traceable(run.model), vocab_size), _traceable_precision(run.precision))
        if run.sequences > run.micro_batch_size:  # a later micro-batch, which meets the gradients of those before
            for parameter in mixed.parameters:
                parameter.grad = torch.zeros_like(parameter)
        batch = torch.zeros(shape, dtype=torch.int64)
        accumulate_gradients(mixed, [(batch, batch)], (0, 0), loss)
    weights = sum(parameter.nbytes for parameter in mixed.parameters)
    return max(0, peak.bytes - 2 * weights - sum(copy.nbytes for copy in mixed.copies))


@contextlib.contextmanager
def _few_tiles(logits: int) -> Iterator[None]:
    """Larger tiles in the loss of a micro-batch with so many logits, which are little beside what else it holds."""
    sizes = dict(TILE)
    TILE.update({device: max(size, logits // MAX_TILES) for device, size in sizes.items()})
    try:
        yield
    finally:
        TILE.update(sizes)


def traceable(config: ModelConfig) -> ModelConfig:
    """The model with PyTorch's own fused kernel in the place of one that is compiled or comes from a package: it keeps
    as much for the backward pass (q, k, v, its output and a log-sum-exp), and runs on fake tensors."""
    return config.model_copy(update={"kernel": SDPA()}) if isinstance(config.kernel, Flex | SDPA) else config


def _traceable_precision(precision: str) -> str:
    """Float8 products keep bfloat16 for the backward pass."""
    return "bf16" if precision == "fp8" else precision
