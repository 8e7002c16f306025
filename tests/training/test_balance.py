"""Balance of experts by a bias: state of a run that moves by the load of each step, and by nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from model.moe import LOAD, MoE
from model.placement import Placement
from model.score import token_losses
from runtime.activation_checkpointing import checkpoint_activations
from tests.support import QUICK, SMOKE, batches, call, composed_run, logits_of, some_tokens
from tests.training.runs import assert_same_run, rewind
from training.balance import LoadBalance
from training.losses import mean_loss
from training.metrics_file import read_metrics
from training.state import TrainState
from training.step import train_step

CPU = torch.device("cpu")
BIAS = "layers.1.mlp.router.selection_bias"


def state_of(*overrides: str) -> TrainState:
    return TrainState.create(composed_run(*SMOKE, "mlp=moe", "precision=fp32", *overrides), 100, CPU)


def biases(state: TrainState) -> torch.Tensor:
    """(layers, experts)."""
    return torch.stack([block.mlp.router.selection_bias for block in state.model.layers]).clone()


def loads(state: TrainState, parts) -> torch.Tensor:
    """Of all micro-batches, by the weights of now: (layers, experts)."""
    outputs = [state.model(part.inputs, Placement.of_batch(part), collect=frozenset({LOAD})).aux for part in parts]
    return sum(torch.stack(list(aux.values())) for aux in outputs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bias_moves_by_the_sign_of_the_load_of_all_micro_batches(precision):
    state, parts = state_of(f"precision={precision}", "mlp.bias_rate=0.25"), batches(4, 1)
    assert state.precision.model.layers[0].mlp.router.selection_bias is state.model.layers[0].mlp.router.selection_bias
    load = sum(loads(state, [part]) for part in parts)
    means = load.mean(1, keepdim=True)
    result = train_step(state, parts, 1.0)
    expected = 0.25 * (means - load).sign()
    if precision == "fp32":
        assert torch.equal(biases(state), expected)
        assert result.reported["lowest_load"] == (load / means).min()
        assert result.reported["highest_load"] == (load / means).max()
    assert biases(state).dtype == torch.float32 and biases(state).unique().tolist() in ([-0.25, 0.25], [-0.25, 0, 0.25])


def test_bias_moves_as_much_where_activations_are_recomputed():
    plain, again = state_of(), state_of()
    checkpoint_activations(again.precision.model)
    for state in (plain, again):
        train_step(state, batches(4, 2), 1.0)
    assert torch.equal(biases(plain), biases(again)) and biases(plain).any()


def test_bias_stays_in_a_skipped_step_in_evaluation_and_in_decoding():
    state, (batch,) = state_of(), batches(4, 4)
    train_step(state, [batch], 1.0)
    before = biases(state)
    token_losses(state.model, batch)
    caches = state.model.make_caches(2, 20)
    logits_of(state.model, some_tokens(2, 9), Placement.prefill(torch.tensor([9, 9]), caches))
    with torch.no_grad():
        state.model.norm.weight.fill_(float("nan"))
    assert train_step(state, [batch], 1.0).skipped
    assert torch.equal(biases(state), before) and before.any()


def test_run_without_a_bias_has_no_buffer_and_reports_its_loads():
    state = state_of("mlp.bias_rate=0", "mlp.balance_loss=0.01", "mlp.router_z_loss=0.001")
    assert not list(state.model.buffers())
    reported = train_step(state, batches(4, 2), 1.0).reported
    assert set(reported) == {"lowest_load", "highest_load", "balance_loss", "router_z_loss"}
    assert 0 <= reported["lowest_load"] <= 1 <= reported["highest_load"]


def test_model_without_experts_has_no_balance():
    assert LoadBalance.of(TrainState.create(composed_run(*SMOKE, "precision=fp32"), 100, CPU).model) == []


@pytest.mark.parametrize(
    "options",
    [
        ("precision=bf16", "optim.qk_clip=5", "attention.qk_norm=false"),
        ("mlp.n_dense_layers=1", "mlp.balance_loss=0.01", "optim=adafactor"),
    ],
    ids=" ".join,
)
def test_run_with_experts_resumed_is_bit_exact(options, workplace, monkeypatch):
    typed = [*QUICK, "mlp=moe", *options, "micro_batch_size=1", "steps=6", "save_every=3", "eval_every=3"]
    assert call("train", [*typed, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=3)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=6)
    half, whole = (
        load_file(workplace / "whole/checkpoints" / step / "model.safetensors")[BIAS]
        for step in ("step_00000003", "step_00000006")
    )
    assert half.any() and not torch.equal(half, whole)
    rows = read_metrics(workplace / "whole/metrics.jsonl")
    assert all(0 <= row["lowest_load"] <= 1 <= row["highest_load"] for row in rows)
    assert all(("balance_loss" in row) == ("mlp.balance_loss=0.01" in options) for row in rows)


def test_bias_evens_the_loads_of_a_router_that_stands_still():
    state, parts = state_of("mlp.bias_rate=0.02"), batches(32, 16)
    with torch.no_grad():
        for block in state.model.layers:
            block.mlp.router.weight[:2].mul_(8)  # of scores that are high or low, but not between
    reported = [train_step(state, parts, 0.0).reported for _ in range(80)]
    first, last = reported[0], reported[-1]
    assert first["highest_load"] > 1.7 and first["lowest_load"] < 0.8
    assert last["highest_load"] < 1.2 and last["lowest_load"] > 0.85


def test_balance_loss_evens_the_loads_as_it_is_minimised():
    state, (batch,) = state_of("mlp.bias_rate=0", "mlp.balance_loss=1.0"), batches(32, 32)
    routers = [block.mlp.router.weight for block in state.model.layers]
    with torch.no_grad():
        for weight in routers:
            weight[:2].mul_(8)
    highest = []
    for _ in range(60):
        _, aux = mean_loss(state.model, batch, collect=frozenset({LOAD}))
        loss = sum(aux[name] for name in state.model.auxiliary_losses)
        for weight, gradient in zip(routers, torch.autograd.grad(loss, routers), strict=True):
            weight.data -= 2.0 * gradient
        loads = torch.stack([value for name, value in aux.items() if name.endswith(LOAD)])
        highest.append((loads / loads.mean(1, keepdim=True)).max())
    assert highest[-1] < highest[0] - 0.3


def test_every_layer_with_experts_is_balanced():
    state = state_of("mlp.n_dense_layers=1")
    assert [type(block.mlp) is MoE for block in state.model.layers] == [False, True]
    train_step(state, batches(4, 2), 1.0)
    assert state.model.layers[1].mlp.router.selection_bias.any()


def test_group_of_experts_has_a_rate_of_its_own_or_is_frozen():
    groups = "optim.groups=[{match: '*.experts.*', train: false}, {match: '*.router.*', lr: 0.5}]"
    state = state_of(groups)
    rates = {id(p): group["lr"] for group in state.optimizer.param_groups for p in group["params"]}
    mlp = state.model.layers[0].mlp
    assert rates[id(mlp.router.weight)] == 0.5 and id(mlp.experts.up_proj) not in rates
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    for _ in range(2):
        train_step(state, batches(4, 2), 1.0)
    moved = {name for name, p in mlp.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("experts.")} and biases(state).any()
