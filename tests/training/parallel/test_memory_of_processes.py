"""Memory of each of several processes as predicted, held against what PyTorch's allocator gives out in it."""

import gc

import pytest
import torch

from data.batches import Batch, micro_batch_of
from runtime.memory import allocated_peak
from runtime.world import World
from tests.support import SMOKE, changed, composed_run, some_tokens
from tests.training.parallel.together import together
from training.run.config import Run
from training.run.processes import with_processes
from training.state import TrainState
from training.step import train_step
from training.step_memory import memory

VOCAB, CPU = 500, torch.device("cpu")
PLANS = ("ddp", "fsdp")
MODELS = {
    "mha": ("precision=bf16", "model.n_layers=4"),
    "mla": ("attention=mla", "precision=fp32", "optim=adamw", "batch_tokens=512"),  # one micro-batch of four
    "gqa": ("attention=gqa", "precision=bf16", "activation_checkpointing=true", "model.d_model=128"),
    "small batch": (
        "precision=fp32",
        "model.d_model=128",
        "batch_tokens=256",
        "micro_batch_size=1",
    ),  # the update counts
}


def run_of(model: str, plan: str, processes: int) -> Run:
    overrides = changed([*SMOKE, "micro_batch_size=4"], *MODELS[model])
    return with_processes(composed_run(*overrides, f"parallel={plan}"), processes, ())


def peaks(world: World, runs: list[Run], looks: int) -> list[int]:
    """Bytes, from nothing through two steps of each run, in each process; the least of so many looks."""
    return [_peak(world, run, looks) for run in runs]


def _peak(world: World, run: Run, looks: int) -> int:
    share = run.sequences // world.size
    tokens = some_tokens(share, run.model.context_length, VOCAB, seed=world.rank)

    def steps() -> None:
        state = TrainState.create(run, VOCAB, CPU, world)
        for _ in range(2):  # the first begins without the optimizer's state
            train_step(state, Batch(tokens, tokens).split(micro_batch_of(share, run.micro_batch_size)), 1.0)

    found = []
    # Where all cores are busy, gloo's threads hold what was sent for a moment longer, by chance: a quarter of the peak.
    for _ in range(looks):
        gc.collect()
        found.append(allocated_peak(steps))
    return min(found)


def check(models: list[str], processes: int, tolerance: float, looks: int) -> None:
    runs = [run_of(model, plan, processes) for model in models for plan in PLANS]
    found = together(processes, peaks, runs, looks)
    for run, of_ranks in zip(runs, zip(*found, strict=True), strict=True):
        predicted = memory(run, VOCAB, CPU).peak
        print(run.parallel.name, run.precision, predicted, of_ranks, predicted / max(of_ranks))
        assert predicted == pytest.approx(max(of_ranks), rel=tolerance), run.parallel
        assert predicted == pytest.approx(of_ranks[0], rel=tolerance), run.parallel


def test_memory_of_two_processes_is_what_the_allocator_gives_out():
    check(["mla"], 2, tolerance=0.05, looks=4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_memory_of_processes_is_what_the_allocator_gives_out(processes):
    check(sorted(MODELS), processes, tolerance=0.1, looks=12)


def test_memory_of_processes_shrinks_with_their_number_where_they_share_the_matrices():
    of = {(plan, n): memory(run_of("small batch", plan, n), VOCAB, CPU) for plan in PLANS for n in (1, 4)}
    assert of["ddp", 4].weights == of["ddp", 1].weights and of["ddp", 4].optimizer == of["ddp", 1].optimizer
    assert of["fsdp", 4].weights < 0.3 * of["fsdp", 1].weights
    assert of["fsdp", 4].gradients < 0.3 * of["fsdp", 1].gradients
    assert of["fsdp", 4].optimizer < 0.3 * of["fsdp", 1].optimizer
    assert of["fsdp", 4].copies == of["fsdp", 1].copies  # as many are gathered
    assert of["fsdp", 4].peak < of["ddp", 4].peak
