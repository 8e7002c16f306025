"""Joining the processes that train one run: what torchrun started becomes a World, or one line that says why not."""

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import ranks
from common.errors import UserError
from common.invocation import ROOT
from common.overrides import format_override
from runtime.world import ONE, ProcessGroup, World
from training.parallel.config import OneProcess, Parallel
from training.run.composer import compose_tree
from training.run.config import Run, flatten_config
from training.run.start import how_to_continue

SPOKEN, FOLDER = "headroom/spoken", "headroom/folder"  # keys of the store that the processes share
LOST = ("closed by peer", "Connection reset", "Broken pipe", "Connection refused", "remote process exited", "EOF")
LATE = ("Timed out", "timed out", "Timeout")


@contextmanager
def join(run: Run, device: torch.device) -> Iterator[World]:
    """A context with the processes that train a run together. Raises UserError where they do not come together, and in
    the place of an error that comes because one of them ended or hangs."""
    world = _joined(run.parallel, device)
    try:
        yield world
    except RuntimeError as error:
        line = _described(error, world, run.parallel)
        if line is None:
            raise
        raise UserError(line) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _joined(parallel: Parallel, device: torch.device) -> World:
    if isinstance(parallel, OneProcess):
        return ONE
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
    timeout = datetime.timedelta(seconds=parallel.timeout)
    try:
        if ranks.started_together():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        raise UserError(_not_joined(error, parallel.timeout)) from None
    return (SharedProcessGroup if ranks.size() > 1 else ProcessGroup)(device, timeout)


def _not_joined(error: Exception, timeout: float) -> str:
    first = str(error).splitlines()[0]
    port = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return f"the port {port} is in use: give torchrun another --master-port, or --standalone"
    if any(word in str(error) for word in LATE):
        return (
            f"not all of the {ranks.size()} processes came to {port} within parallel.timeout={timeout:g} seconds: "
            f"start all of them ({first})"
        )
    return f"the processes cannot be joined at {port}: {first}"


class SharedProcessGroup(ProcessGroup):
    """Processes that share a store, in which each says how far it is: so one that hangs can be named, and what goes
    wrong is reported once."""

    way_out = ""  # where the run has a folder

    def __init__(self, device: torch.device, timeout: datetime.timedelta):
        super().__init__(device, timeout)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        self.spoken = f"{SPOKEN}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        ranks.reports_first = self._reports_first
        self.reached(0)

    def reached(self, step: int) -> None:
        self.store.set(f"headroom/step/{self.rank}", str(step))

    def trains_in(self, folder: Path) -> None:
        self.way_out = f"; what was saved stands: {how_to_continue(folder)}"
        if self.is_first:
            self.store.set(FOLDER, str(folder))

    def behind(self) -> dict[int, int]:
        """The processes that have not come as far as this one, and the step that they are at."""
        try:
            steps = {rank: int(self.store.get(f"headroom/step/{rank}")) for rank in range(self.size)}
        except RuntimeError:  # whoever holds the store has ended
            return {}
        others = {rank: step for rank, step in steps.items() if rank != self.rank}
        return {rank: step for rank, step in others.items() if step < steps[self.rank]} or others

    def _reports_first(self) -> bool:
        try:
            return self.store.add(self.spoken, 1) == 1
        except RuntimeError:  # whoever holds the store has ended
            return self.is_first


def restarted(tree: dict, typed: list[str]) -> tuple[dict, list[str]]:
    """The settings and overrides of a command; where torchrun has started its processes again, those that resume the
    run which they had begun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # of the first node, which lasts as long as its agent
        return tree, typed
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=30))
    if not store.check([FOLDER]):  # started for the first time, or they had not come so far
        return tree, typed
    resume = format_override("resume", store.get(FOLDER).decode())
    return compose_tree(resume), [resume]


def check_agreement(world: World, settings: Mapping[str, Any], text: object) -> None:
    """Raise UserError in all processes where they differ in the settings, the text, or the code and versions."""
    if world.size == 1:  # it agrees with itself, and need not read all code
        return
    for name, value in {"settings": settings, "text": text, "code": code_hash()}.items():
        found = world.gathered(_hash(value))
        odd = [rank for rank, of_rank in enumerate(found) if of_rank != found[0]]
        if odd:
            which = _differing(world, settings, odd[0]) if name == "settings" else f"the {name}"
            raise UserError(
                f"the processes disagree: rank {', '.join(map(str, odd))} differs from rank 0 in {which}: give all of "
                "them the same files, settings and packages"
            )


def _differing(world: World, settings: Mapping[str, Any], odd: int) -> str:
    """The first setting in which a rank differs from the first one, with the values of both."""
    of_all = world.gathered(flatten_config(settings))
    first, other = of_all[0], of_all[odd]
    key = next(key for key in {**first, **other} if first.get(key) != other.get(key))
    return f"{key}={other.get(key)}, not {first.get(key)}"


def code_hash() -> str:
    """The hash of this project's Python files, and of the versions that run them."""
    digest = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    for folder in ("common", "model", "data", "runtime", "training"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _described(error: RuntimeError, world: World, parallel: Parallel) -> str | None:
    """What to say of an error that came because another process ended or hangs; None for any other error."""
    if not isinstance(world, SharedProcessGroup):
        return None
    text = str(error)
    if any(word in text for word in LATE):
        late = ", ".join(f"rank {rank}, at step {step}," for rank, step in world.behind().items())
        late = late or "another process"
        return f"{late} did not answer within parallel.timeout={parallel.timeout:g} seconds{world.way_out}"
    if any(word in text for word in LOST):
        return f"another process of the run has ended{world.way_out}"
    return None
