"""Time of a training step, put together from parts of it that are run and timed: a few tokens, or some micro-batches
where they are short, and one update."""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.console import clock
from data.batches import Batch, micro_batch_of
from model.cost import Flops
from runtime.allocator import keep_buffers
from runtime.world import World
from training.losses import mean_loss
from training.parallel.imagined import imagined
from training.run.config import Run
from training.state import TrainState
from training.step import train_step
from training.step_memory import made_up_document_start

MAX_MICRO_BATCHES = 10  # that are timed
MAX_SECONDS = 5.0  # of timing micro-batches; where two would take longer, a few tokens of one are timed instead
SAMPLE_TOKENS = 128  # of a micro-batch, from whose time that of a whole one is estimated
MAX_REPEATED_UPDATE = 1.0  # seconds of an update; one that takes longer is timed once, its first run included
log = logging.getLogger("headroom")


class StepTime(NamedTuple):
    seconds: float  # of a whole step
    measured: str  # what was run for it, in words


def time_step(run: Run, vocab_size: int, flops: Flops, device: torch.device) -> StepTime:
    """The tokens are made up: real ones take as long, and may not be there. Of several processes one is timed, with its
    share of a step; what they send each other takes no time here."""
    with imagined(run.parallel, device) as world:
        return _time_step(_Step(run, vocab_size, device, world), flops)


def _time_step(step: "_Step", flops: Flops) -> StepTime:
    run = step.run
    sample = step.tokens[: max(1, SAMPLE_TOKENS // run.model.context_length), :SAMPLE_TOKENS]
    log.info(f"timing {sample.numel():,} tokens")
    seconds = step.estimate(sample, flops)
    if 2 * seconds > MAX_SECONDS:
        measured = f"{sample.numel():,} tokens{', not compiled,' if run.compile else ''} and one update"
        measured += f" (a micro-batch would take {clock(seconds)}, too long for a dry run)"
        log.info("timing an update")
        updating = step.update()
    else:
        compiling = ", and compiling" if run.compile else ""
        log.info(f"timing an update, and up to {MAX_MICRO_BATCHES} micro-batches for {MAX_SECONDS:.0f} s{compiling}")
        times, updating = step.time_micro_batches()
        measured = f"{'a micro-batch' if len(times) == 1 else f'{len(times)} micro-batches'} and one update"
        seconds = statistics.median(times)  # what else the machine does disturbs some of them
    whole = step.count * seconds + updating
    return StepTime(whole, f"{measured}; the update takes {updating / whole:.0%} of a step")


class _Step:
    """The real model and optimizer of a run, of whose step some parts can be timed."""

    def __init__(self, run: Run, vocab_size: int, device: torch.device, world: World):
        if device.type == "cpu" and run.tune_malloc:
            keep_buffers()
        state = TrainState.create(run, vocab_size, device, world)
        self.run = run
        self.device = device
        share = run.sequences // world.size
        micro_batch = micro_batch_of(share, run.micro_batch_size)
        self.count = share // micro_batch  # micro-batches of a step
        self.state = state
        state.precision.copy_master_weights()
        self.document_start = made_up_document_start(run, vocab_size)
        draw = torch.Generator().manual_seed(run.seed)
        shape = (micro_batch, run.model.context_length)
        self.tokens = torch.randint(vocab_size, shape, generator=draw).to(device)

    def estimate(self, sample: Tensor, flops: Flops) -> float:
        """Seconds of a micro-batch, from a sample of its tokens and from so few that nearly all their time is overhead,
        which a micro-batch takes whatever its length."""
        few = sample[:1, : SAMPLE_TOKENS // 8]
        for each in (few, sample):
            self._micro_batch(mean_loss, each)  # the first one on a device waits for what is loaded once
        overhead = self._micro_batch(mean_loss, few)
        seconds = self._micro_batch(mean_loss, sample)
        if sample.numel() == few.numel():
            return seconds

        def work(tokens: Tensor) -> float:
            return tokens.numel() * flops.training(min(flops.keys, (tokens.shape[1] + 1) / 2))

        per_work = max(0.0, seconds - overhead) / (work(sample) - work(few))
        return seconds + per_work * (work(self.tokens) - work(sample))

    def time_micro_batches(self) -> tuple[list[float], float]:
        """Seconds of each of some micro-batches, and of an update. Of either, the first one takes memory and is
        compiled, and is not counted; but of an update that takes long there is no other."""
        loss = self.state.losses.mean_loss
        first = self._micro_batch(loss, self.tokens)
        updating = self.update()
        spent = 0.0 if self.run.compile else first
        times = []
        while len(times) < MAX_MICRO_BATCHES and spent < MAX_SECONDS:
            times.append(self._micro_batch(loss, self.tokens))
            spent += times[-1]
        return times or [first], self.update() if updating < MAX_REPEATED_UPDATE else updating

    def update(self) -> float:
        """Seconds of all that a step does besides its micro-batches, with the gradients there are."""
        factor = self.run.lr_factor(0)
        return _seconds(self.device, lambda: train_step(self.state, [], factor))

    def _micro_batch(self, loss: Callable, tokens: Tensor) -> float:
        precision = self.state.precision
        batch = Batch.of(tokens, tokens, self.document_start)
        return _seconds(self.device, lambda: precision.backward(loss(precision.model, batch)[0] / self.count))


def _seconds(device: torch.device, what: Callable[[], Any]) -> float:
    start = time.perf_counter()
    what()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
