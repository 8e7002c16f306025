"""Ways to train one run: in one process, or in several, each of which has the whole model or a share of it."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from common.settings import FrozenSettings
from training.optim.base import OptimConfig

MAX_PROCESSES = 4096


class Parallel(FrozenSettings, ABC):
    """Settings of one way to train."""

    name: ClassVar[str]  # as it is typed
    shards: ClassVar[bool] = False  # whether a process has a share of each matrix only

    @property
    @abstractmethod
    def count(self) -> int:
        """How many processes train."""

    @abstractmethod
    def obstacle(self, precision: str, compiled: bool, optim: OptimConfig) -> str | None:
        """Why a run with these settings cannot train in this way, with the way out; None: it can."""


class OneProcess(Parallel):
    name = "none"

    @property
    def count(self) -> int:
        return 1

    def obstacle(self, precision: str, compiled: bool, optim: OptimConfig) -> str | None:
        return None


class Processes(Parallel, ABC):
    processes: int | None = Field(ge=1, le=MAX_PROCESSES)  # unset: as many as torchrun started, or as there are GPUs
    timeout: float = Field(gt=0)  # seconds that processes wait for one another

    @property
    def count(self) -> int:
        return self.processes or max(1, torch.cuda.device_count() if torch.cuda.is_available() else 1)


class DDP(Processes):
    """Data parallel: every process has the whole model, and its share of each step."""

    name = "ddp"

    def obstacle(self, precision: str, compiled: bool, optim: OptimConfig) -> str | None:
        return None


class FSDP(Processes):
    """Fully sharded data parallel: every process has a share of each matrix too, and of its optimizer state."""

    name = "fsdp"
    shards = True

    def obstacle(self, precision: str, compiled: bool, optim: OptimConfig) -> str | None:
        if precision == "fp8":
            return "precision=fp8 multiplies whole matrices only: choose bf16, or parallel=ddp"
        if compiled:
            return "compile=true compiles the loss whole, and FSDP gathers matrices within it: choose parallel=ddp"
        if not optim.acts_on_rows:
            return "this optimizer needs matrices whole: choose muon or adamw, or parallel=ddp"
        return None
