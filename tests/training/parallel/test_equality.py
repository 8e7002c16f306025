"""Several processes train what one would: gradients and weights, in float64 and in float32."""

import pytest
import torch
from torch import Tensor

from data.batches import Batch
from model.initialise import initialised
from runtime.precision import DTYPES
from runtime.world import ONE, World
from tests.support import composed_run
from tests.training.parallel.together import together
from training.parallel.gather import whole_model
from training.run.config import Run
from training.state import TrainState
from training.step import accumulate_gradients, train_step

VOCAB, LENGTH, MICRO_BATCHES = 75, 32, 4
FEW, SOME, STEPS = 4, 10, 20
MODELS = {
    "gqa": ("attention=gqa", "model.tie_embeddings=false", "model.qk_norm=false", "optim.qk_clip=0.3"),
    "mha": ("attention=mha", "clip_norm=0.1", "model.norm=layer", "model.bias=true"),
    "mla": ("attention=mla", "attention.q_lora_rank=32"),
    "moe": ("attention=mla", "mlp=moe", "model.mtp_depth=1", "mlp.balance_loss=0.01"),
    "dsa": ("attention=dsa", "attention.indexer.top_k=8", "activation_checkpointing=true"),
    "stack": ("attention=stack", "model.dropout=0.1"),
}
PLANS = ("ddp", "fsdp")


def run_of(model: str, optim: str, plan: str = "none") -> Run:
    shape = (f"model.context_length={LENGTH}", f"batch_tokens={LENGTH}", "eval_tokens=64")
    parts = f"optim={optim}", *MODELS[model], f"parallel={plan}"
    run = composed_run("experiment=smoke", "tokenizer=byte", *parts, *shape)
    return run.model_copy(update={"precision": "fp32"})


def state_of(run: Run, world: World = ONE, dtype: torch.dtype = torch.float64) -> TrainState:
    """Weights moved away from where initialisation makes gradients zero."""
    model = initialised(run.model, VOCAB, run.seed).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
        for table in (model.embedding, model.head):
            if table is not None:
                table.weight[VOCAB:] = 0
    return TrainState.of(run, model, world)


def batches_of(step: int, world: World = ONE) -> list[Batch]:
    """The micro-batches of a step, of each process its share. Some targets are not counted, unevenly."""
    tokens = torch.randint(0, VOCAB, (MICRO_BATCHES, 2, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[..., 1:].clone()
    targets[1, :, 5:] = -1
    targets[3, 0] = -1
    each = MICRO_BATCHES // world.size
    mine = slice(world.rank * each, (world.rank + 1) * each)
    return [Batch(*pair) for pair in zip(tokens[mine, ..., :-1], targets[mine], strict=True)]


def gradients(state: TrainState) -> dict[str, Tensor]:
    """The gradient of every parameter in a step, whole."""
    accumulate_gradients(state, batches_of(0, state.world))
    found = {}
    for name, shard in state.precision.shards.items():
        if shard.local.grad is not None:
            mine = shard.local.grad.clone()
            found[name] = mine if shard.is_whole else torch.cat(state.world.gathered(mine))
    state.precision.drop_gradients()
    return found


def weights(state: TrainState) -> dict[str, Tensor]:
    """The parameters and buffers, whole; in the first process."""
    model = whole_model(state)
    return {} if model is None else {name: tensor.clone() for name, tensor in model.state_dict().items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of any tensor from the one expected, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm().clamp(min=1e-6)) for name, one in expected.items())


def trained(world: World, run: Run, dtype: torch.dtype, steps: int) -> tuple:
    """Gradients of the first step, weights after all steps, and the loss of each, as several processes have them."""
    state = state_of(run, world, dtype)
    first = gradients(state)
    losses = [train_step(state, batches_of(step, world), 1.0).loss.item() for step in range(steps)]
    return first, weights(state), losses


def all_trained(world: World, runs: list[Run], dtype: torch.dtype, steps: int) -> list[tuple]:
    return [trained(world, run, dtype, steps) for run in runs]


def check_equal(cases: list[tuple[str, str, str]], steps: int) -> None:
    """Of models, optimizers and plans: gradients within 1e-9 and weights after some steps within 1e-7 of those of one
    process, in float64."""
    found, _ = together(2, all_trained, [run_of(*case) for case in cases], torch.float64, steps)
    for (model, optim, plan), (first, after, losses) in zip(cases, found, strict=True):
        one = trained(ONE, run_of(model, optim), torch.float64, steps)
        assert distance(first, one[0]) < 1e-9, (model, optim, plan)
        assert distance(after, one[1]) < 1e-7, (model, optim, plan)
        assert losses == pytest.approx(one[2], abs=1e-5)


def test_two_processes_train_what_one_would():
    check_equal([("gqa", "muon", "ddp"), ("moe", "adamw", "fsdp")], FEW)
    check_equal([("gqa", "muon", "fsdp")], STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_what_one_would_with_every_attention(model):
    check_equal([(model, optim, plan) for optim in ("adamw", "muon") for plan in PLANS], STEPS)


def test_planted_fault_of_unequal_shares_is_caught(monkeypatch):
    """Each process divides by its own targets, as where losses are means over processes."""
    monkeypatch.setattr("runtime.world.ProcessGroup.total", lambda world, number: number * world.size)
    with pytest.raises(AssertionError):
        check_equal([("gqa", "adamw", "ddp")], steps=1)


def reordered(dtype: torch.dtype) -> list[tuple]:
    """What one process is from itself, with its micro-batches in another order."""
    results = []
    for order in (1, -1):
        state = state_of(run_of("gqa", "adamw"), ONE, dtype)
        losses = [train_step(state, batches_of(step)[::order], 1.0).loss.item() for step in range(SOME)]
        results.append((losses, weights(state)))
    return results


def test_float32_processes_stay_as_near_as_one_with_its_micro_batches_in_another_order():
    dtype = DTYPES["fp32"]
    (losses, after), (other_losses, other) = reordered(dtype)
    usual = max(distance(other, after), 1e-6)
    found, _ = together(2, all_trained, [run_of("gqa", "adamw", plan) for plan in PLANS], dtype, SOME)
    for plan, (first, theirs, their_losses) in zip(PLANS, found, strict=True):
        one = gradients(state_of(run_of("gqa", "adamw"), ONE, dtype))
        assert distance(first, one) < 1e-5, plan
        assert their_losses[0] == pytest.approx(losses[0], abs=1e-5)
        assert distance(theirs, after) < 4 * usual, plan
        assert max(abs(a - b) for a, b in zip(their_losses, losses, strict=True)) < 4 * max(
            1e-6, max(abs(a - b) for a, b in zip(other_losses, losses, strict=True))
        )
