"""A process that begins or resumes an FSDP run holds no more than its share of it, and one parameter."""

import gc
from collections.abc import Callable

import pytest
import torch

from data.batches import Batch
from model.initialise import initialised
from runtime.memory import allocated_peak
from runtime.world import World
from tests.support import SMOKE, changed, composed_run, some_tokens
from tests.training.parallel.test_equality import weights
from tests.training.parallel.test_sharded_checkpoints import CORPUS, loaded_state
from tests.training.parallel.together import together
from training.run import checkpoint
from training.run.config import Run
from training.run.processes import with_processes
from training.state import TrainState
from training.step import train_step

VOCAB, CPU = 500, torch.device("cpu")
SLACK = 1.1  # vectors, and what the allocator and the profiler round up


def run_of(processes: int) -> Run:
    words = changed([*SMOKE, "micro_batch_size=1"], "precision=fp32", "model.d_model=128", "model.n_layers=4")
    return with_processes(composed_run(*words, "optim=adamw", "parallel=fsdp"), processes, ())


def peak_of(begin: Callable[[], TrainState]) -> tuple[TrainState, int]:
    """The state, and the most bytes that were allocated until it was there."""
    states = []
    gc.collect()
    peak = allocated_peak(lambda: states.append(begin()))
    return states[0], peak


def sizes(state: TrainState) -> tuple[int, int, int]:
    """Bytes of the process's weights, of all weights, and of the largest parameter."""
    of_whole = [shard.shape.numel() * shard.local.itemsize for shard in state.precision.shards.values()]
    return sum(shard.local.nbytes for shard in state.precision.shards.values()), sum(of_whole), max(of_whole)


def begun_and_saved(world: World, folder) -> tuple[int, ...]:
    run = run_of(world.size)
    state, peak = peak_of(lambda: TrainState.create(run, VOCAB, CPU, world))
    begun = (peak, *sizes(state))
    tokens = some_tokens(1, run.model.context_length, VOCAB, seed=world.rank)
    train_step(state, [Batch(tokens, tokens)], 1.0)
    checkpoint.save(folder, run, CORPUS, state, 4.0)
    return begun


def resumed(world: World, folder) -> tuple[int, ...]:
    state, peak = peak_of(lambda: loaded_state(world, folder, run_of(world.size), VOCAB))
    return peak, *sizes(state)


def test_process_that_begins_or_resumes_holds_its_share_and_one_parameter(tmp_path):
    for peak, mine, whole, largest in together(4, begun_and_saved, tmp_path):
        assert peak < SLACK * (mine + largest) < 0.5 * whole
    for peak, mine, whole, largest in together(4, resumed, tmp_path):  # with AdamW's two numbers for each weight
        assert peak < SLACK * (3 * mine + largest) < 0.35 * 3 * whole
    for peak, mine, whole, largest in together(2, resumed, tmp_path):  # each reads files that two others wrote
        assert peak < SLACK * (3 * mine + largest) < 0.65 * 3 * whole


def begun(world: World) -> dict[str, torch.Tensor]:
    return weights(TrainState.create(run_of(world.size), VOCAB, CPU, world))


def test_sharded_model_begins_with_the_weights_of_a_whole_one():
    expected = initialised(run_of(2).model, VOCAB, run_of(2).seed).state_dict()
    found = together(2, begun)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_planted_fault_of_a_model_that_is_built_whole_is_caught(monkeypatch, tmp_path):
    monkeypatch.setattr("training.state.without_matrices", lambda config, vocab: initialised(config, vocab, 0))
    with pytest.raises(AssertionError):
        test_process_that_begins_or_resumes_holds_its_share_and_one_parameter(tmp_path)
