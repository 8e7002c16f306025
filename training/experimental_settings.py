"""Which settings of a run are experimental, besides its device and its precision, which warn where they are chosen."""

from collections.abc import Iterator, Sequence

import torch

from common.experimental import warn_experimental
from model.kernels.sdpa import SDPA
from training.run.config import Run

EXPERIMENTS = ("experiment=gpt2_124m",)  # for one GPU, and longer than anything that was tried


def warn_experimental_settings(run: Run, device: torch.device, overrides: Sequence[str]) -> None:
    """overrides: as typed on the command line."""
    for choice in _chosen(run, device, overrides):
        warn_experimental(choice)


def _chosen(run: Run, device: torch.device, overrides: Sequence[str]) -> Iterator[str]:
    kernel = run.model.kernel
    if isinstance(kernel, SDPA) and kernel.flash:
        yield f"kernel.flash={kernel.flash}"
    if isinstance(kernel, SDPA) and kernel.backend == "cudnn":
        yield "kernel.backend=cudnn"
    if run.compilation == (True, True) and device.type == "cuda":
        yield "autotune=true"
    yield from (experiment for experiment in EXPERIMENTS if experiment in overrides)
