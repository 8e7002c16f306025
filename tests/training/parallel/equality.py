"""Run by several processes (processes.py): trains with each plan in float64, and in one process beside it, and prints how
far apart they are, as JSON, from the first process."""

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Batch
from model.initialise import initialised
from runtime.world import ONE, ProcessGroup, World
from training.run.config import Run, compose
from training.state import TrainState
from training.step import accumulate_gradients, train_step

VOCAB, LENGTH, STEPS = 75, 32, 20
MODELS = {
    "gqa": ("attention=gqa", "model.tie_embeddings=false", "model.qk_norm=false", "optim.qk_clip=0.3"),
    "mla": ("attention=mla",),
    "moe": ("attention=mla", "mlp=moe", "model.mtp_depth=1", "mlp.balance_loss=0.01"),
    "dsa": ("attention=dsa", "attention.indexer.top_k=8", "activation_checkpointing=true"),
    "stack": ("attention=stack", "model.dropout=0.1"),
}


def state_of(run: Run, world: World) -> TrainState:
    """Weights in float64, moved away from where initialisation makes gradients zero."""
    model = initialised(run.model, VOCAB, run.seed).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for table in (model.embedding, model.head):
            if table is not None:
                table.weight[VOCAB:] = 0
    return TrainState.of(run, model, world)


def batches_of(step: int, world: World) -> list[Batch]:
    """Four micro-batches of a step, of each process its share. Some targets are not counted, unevenly."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (4, 2, LENGTH + 1), generator=generator)
    targets = tokens[..., 1:].clone()
    targets[1, :, 5:] = -1
    targets[3, 0] = -1
    each = 4 // world.size
    mine = slice(world.rank * each, (world.rank + 1) * each)
    return [Batch(*pair) for pair in zip(tokens[mine, ..., :-1], targets[mine], strict=True)]


def whole(state: TrainState, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of this process's rows -> of all rows."""
    found = {}
    for name, tensor in tensors.items():
        shard, world = state.precision.shards[name], state.world
        found[name] = tensor if shard.is_whole else torch.cat(world.gathered(tensor))
    return found


def gradients(state: TrainState) -> dict[str, Tensor]:
    accumulate_gradients(state, batches_of(0, state.world))
    found = {name: shard.local.grad for name, shard in state.precision.shards.items() if shard.local.grad is not None}
    found = whole(state, {name: gradient.clone() for name, gradient in found.items()})
    state.optimizer.zero_grad(set_to_none=True)
    return found


def trained(state: TrainState) -> tuple[dict[str, Tensor], list[float]]:
    losses = [train_step(state, batches_of(step, state.world), 1.0).loss.item() for step in range(STEPS)]
    return whole(state, {name: shard.local.detach() for name, shard in state.precision.shards.items()}), losses


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / (expected[name].norm() + 1e-12)) for name in expected)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = ProcessGroup()
    report = {}
    for model in sys.argv[1:] or MODELS:
        for optim in ("adamw", "muon"):
            common = ("experiment=smoke", "tokenizer=byte", f"optim={optim}", *MODELS[model])
            common = common if optim == "muon" or model != "stack" else (*common, "clip_norm=0.1")
            run = compose(*common, f"model.context_length={LENGTH}", f"batch_tokens={LENGTH}").model_copy(
                update={"precision": "fp32"}
            )
            one = state_of(run, ONE)
            expected, (weights, losses) = gradients(one), trained(one)
            for plan in ("ddp", "fsdp"):
                chosen = run.model_copy(update={"parallel": compose(*common, f"parallel={plan}").parallel})
                state = state_of(chosen, world)
                of_one_step = distance(gradients(state), expected)
                after, their_losses = trained(state)
                report[f"{model} {optim} {plan}"] = {
                    "gradients": of_one_step,
                    "weights": distance(after, weights),
                    "losses": max(abs(a - b) for a, b in zip(their_losses, losses, strict=True)),
                    "loss": losses[-1],
                }
    if world.is_first:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
