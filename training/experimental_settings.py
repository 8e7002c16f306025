"""Which settings of a run are experimental, besides its device and its precision, which warn where they are chosen."""

from collections.abc import Callable, Sequence

import torch

from common.experimental import warn_experimental
from model.kernels.flex import Flex
from model.kernels.sdpa import SDPA
from model.moe import MoEConfig
from training.run.config import Run

EXPERIMENTS = ("experiment=gpt2_124m",)  # for one GPU, and longer than anything that was tried


def warn_experimental_settings(run: Run, device: torch.device, overrides: Sequence[str]) -> None:
    """overrides: as typed on the command line."""
    for setting, is_chosen in SETTINGS.items():
        if is_chosen(run, device):
            warn_experimental(setting)
    for experiment in EXPERIMENTS:
        if experiment in overrides:
            warn_experimental(experiment)


def _flash(name: str) -> Callable[[Run, torch.device], bool]:
    return lambda run, device: isinstance(run.model.kernel, SDPA) and run.model.kernel.flash == name


def _cudnn(run: Run, device: torch.device) -> bool:
    return isinstance(run.model.kernel, SDPA) and run.model.kernel.backend == "cudnn"


def _flex(run: Run, device: torch.device) -> bool:
    return isinstance(run.model.kernel, Flex) and device.type == "cuda"


def _autotune(run: Run, device: torch.device) -> bool:
    return run.compilation == (True, True) and device.type == "cuda"


def _experts(run: Run, device: torch.device) -> bool:
    return isinstance(run.model.mlp, MoEConfig) and device.type == "cuda"


SETTINGS = {
    "kernel=flex": _flex,
    "kernel.flash=FA3": _flash("FA3"),
    "kernel.flash=FA4": _flash("FA4"),
    "kernel.backend=cudnn": _cudnn,
    "autotune=true": _autotune,
    "mlp=moe": _experts,
}
