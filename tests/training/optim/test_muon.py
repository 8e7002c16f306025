"""Muon: its update by its formula, what it sees as matrices, and what it promises a run."""

import math

import pytest
import torch
from torch import Tensor

from model import cost
from model.initialise import initialised
from model.kernels.sdpa import SDPA
from model.transformer import TransformerLM
from tests.support import (
    ATTENTIONS,
    QUICK,
    SMOKE,
    batches,
    call,
    composed_run,
    configured,
    logits_of,
    relative_error,
    small_model,
    some_tokens,
    training_state,
)
from tests.training.runs import assert_same_run, rewind
from training.losses import Losses, mean_loss
from training.optim.base import scale_rates
from training.optim.muon import Muon, MuonConfig, momentum_after
from training.optim.newton_schulz import COEFFICIENTS, STEPS, newton_schulz
from training.run.checkpoint import _optimizer_tensors
from training.step import reads_found_inf, train_step

# lr, and then what is Muon's; decay and warmup are off where a test does not want them
PLAIN = {"lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.0, "momentum_warmup": 0}
SHAPES = [(8, 8), (8, 32), (32, 8), (1, 16), (24, 16)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_svd(matrix: Tensor) -> Tensor:
    """(rows, cols) -> U Vᵀ in float64, by its definition: the naive twin."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def polynomial(matrix: Tensor) -> Tensor:
    """What the iteration computes, without iterating over matrices: U p(p(...(S / |S|))) Vᵀ, in float64."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_equals_its_polynomial_and_is_near_the_orthogonal_factor(shape):
    matrices = drawn(5, *shape)
    found = newton_schulz(matrices)
    assert found.shape == matrices.shape and found.dtype == torch.float32
    for matrix, each, low in zip(matrices, found, newton_schulz(matrices, torch.bfloat16), strict=True):
        assert relative_error(each, polynomial(matrix)) <= 1e-3
        difference = torch.linalg.svdvals(each.double() - by_svd(matrix))
        # p⁵ is within 0.33 of 1 from 0.004 of the norm on, which the smallest of a square matrix may miss
        small = torch.linalg.svdvals(matrix.double()) / matrix.norm() < 0.004
        assert difference[int(small.sum()) :].max() <= 0.33
        assert relative_error(low, polynomial(matrix)) <= 0.15


def test_newton_schulz_of_a_batch_equals_that_of_each_matrix():
    for shape in SHAPES:
        matrices = drawn(6, *shape)
        for dtype in (torch.float32, torch.bfloat16):
            alone = torch.cat([newton_schulz(matrix[None], dtype) for matrix in matrices])
            assert torch.equal(newton_schulz(matrices, dtype), alone)


def test_newton_schulz_of_zeros_is_zero():
    assert not newton_schulz(torch.zeros(2, 4, 8)).any()


def hidden_names(model: TransformerLM) -> list[str]:
    """The matrices of the layers."""
    return [name for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim >= 2]


def naive_update(model: TransformerLM, name: str, direction: Tensor) -> Tensor:
    """Of one stored matrix, its logical ones taken out by their row numbers, one at a time."""
    layout, update, row = model.layout()[name], torch.zeros_like(direction, dtype=torch.float64), 0
    for _ in range(layout.heads):
        for _, rows, _ in layout.parts:
            matrix = direction[row : row + rows]
            update[row : row + rows] = math.sqrt(max(1, rows / matrix.shape[1])) * polynomial(matrix)
            row += rows
    assert row == len(direction)
    return update


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_muon_update_equals_the_formula(attention, monkeypatch):
    monkeypatch.setattr("training.optim.muon.multiplies_bf16", lambda device: False)
    model = small_model(f"attention={attention}", "model.n_layers=2")
    optimizer = configured(MuonConfig, **PLAIN | {"weight_decay": 0.5}, momentum=0.9).build(model)
    named, buffers = dict(model.named_parameters()), {}
    for step in range(3):
        before = {name: p.detach().double() for name, p in named.items()}
        for i, p in enumerate(named.values()):
            p.grad = drawn(*p.shape, seed=100 * step + i)
        scale_rates(optimizer, 0.5)  # as the schedule says it: of muon_lr=0.02, 0.01
        optimizer.step()
        for name in hidden_names(model):
            grad = named[name].grad.double()
            buffers[name] = 0.9 * buffers.get(name, torch.zeros_like(grad)) + 0.1 * grad
            update = naive_update(model, name, 0.9 * buffers[name] + 0.1 * grad)
            expected = before[name] * (1 - 0.01 * 0.5) - 0.01 * update
            assert relative_error(named[name] - before[name], expected - before[name]) <= 2e-3, name


@pytest.mark.parametrize(("rounded", "tolerance"), [(False, 1e-4), (True, 0.05)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_muon_with_whole_matrices_equals_that_of_pytorch(attention, rounded, tolerance, monkeypatch):
    """per_head=false, no warmup of the momentum. Then learning rate, its factor sqrt(max(1, rows/cols)), decay,
    Nesterov momentum, coefficients and steps are those of torch.optim.Muon. Two differences remain, both of rounding:
    PyTorch always iterates in bfloat16, ours where the device multiplies it natively; and its norm is one in bfloat16,
    ours in float32. So both are compared in float32 closely, and in bfloat16 as far as that rounds."""
    monkeypatch.setattr("training.optim.muon.multiplies_bf16", lambda device: rounded)
    if not rounded:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model, twin = (small_model(f"attention={attention}", "model.n_layers=2") for _ in range(2))
    settings = PLAIN | {"weight_decay": 0.5, "momentum": 0.9, "per_head": False}
    optimizer, names = configured(MuonConfig, **settings).build(model), hidden_names(model)
    mine, its = dict(model.named_parameters()), dict(twin.named_parameters())
    reference = torch.optim.Muon([its[name] for name in names], lr=0.02, weight_decay=0.5, momentum=0.9)
    start = {name: p.detach().clone() for name, p in mine.items()}
    for step in range(4):
        for i, name in enumerate(names):
            mine[name].grad = drawn(*mine[name].shape, seed=100 * step + i)
            its[name].grad = mine[name].grad.clone()
        optimizer.step()
        reference.step()
    for name in names:
        assert relative_error(mine[name] - start[name], its[name] - start[name]) <= tolerance, name


def test_muon_per_head_moves_each_logical_matrix_by_an_orthogonal_matrix():
    """With per_head=false those that are parts of a tall matrix do not."""
    near = {}
    for logical in (True, False):
        model = small_model("attention=mla", "attention.q_lora_rank=24", "attention.qk_rope_head_dim=4")
        optimizer, before = configured(MuonConfig, **PLAIN, per_head=logical).build(model), {}
        for i, (name, p) in enumerate(model.named_parameters()):
            before[name], p.grad = p.detach().clone(), drawn(*p.shape, seed=i)
        optimizer.step()
        for name in hidden_names(model):
            layout = model.layout()[name]
            moved = (dict(model.named_parameters())[name] - before[name]).detach() / 0.02
            for part, rows in layout.views(moved).items():
                spectra = torch.linalg.svdvals(rows / math.sqrt(max(1, rows.shape[1] / rows.shape[2])))
                near[logical, name, part] = ((spectra > 0.6) & (spectra < 1.25)).float().mean().item()
    assert all(share > 0.9 for (logical, *_), share in near.items() if logical)
    assert all(
        near[False, f"layers.{i}.attention.kv_up.weight", part] < 0.6 for i in (0, 1) for part in ("k_nope", "v")
    )


def test_muon_updates_embeddings_head_and_vectors_by_adamw():
    model = small_model("attention=gqa", "model.tie_embeddings=false", "model.bias=true", "position=learned")
    twin = small_model("attention=gqa", "model.tie_embeddings=false", "model.bias=true", "position=learned")
    hidden = hidden_names(model)
    assert not [name for name in hidden if "embedding" in name or "head" in name or "norm" in name]
    others = {name: p for name, p in twin.named_parameters() if name not in hidden}
    optimizer = configured(MuonConfig, lr=1e-3).build(model)
    decayed = [p for p in others.values() if p.ndim >= 2]
    vectors = [p for p in others.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for step in range(3):
        for i, (mine, its) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            mine.grad = its.grad = drawn(*mine.shape, seed=100 * step + i)
        optimizer.step()
        reference.step()
    for name, p in model.named_parameters():
        if name in others:
            assert torch.allclose(p, others[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_training_lowers_the_loss(precision):
    model = small_model("attention=mla", kernel=SDPA())
    state = training_state(model, configured(MuonConfig, lr=3e-3).build(model), precision, clip_norm=1.0)
    data = batches(8, 8)
    losses = [train_step(state, data, 1.0).loss.item() for _ in range(30)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_muon_step_with_nan_loss_changes_nothing(precision):
    """Neither as the first step, nor when there is state."""
    model = small_model("attention=mla", kernel=SDPA())
    optimizer = configured(MuonConfig, lr=1e-3).build(model)
    training = training_state(model, optimizer, precision, clip_norm=1.0)
    good, bad = batches(4, 2), lambda *arguments: (mean_loss(*arguments)[0] * math.nan, {})
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        state = {p: {key: value.clone() for key, value in parts.items()} for p, parts in optimizer.state.items()}
        training.losses = Losses(bad)
        assert train_step(training, good, 1.0).skipped
        training.losses = Losses()
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        kept = [(optimizer.state[p][key], was) for p, parts in state.items() for key, was in parts.items()]
        assert all(torch.equal(found, was) for found, was in kept)
        assert all(part.isfinite().all() for parts in optimizer.state.values() for part in parts.values())
        assert not train_step(training, good, 1.0).skipped
        assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert reads_found_inf(optimizer) and optimizer.found_inf is None


def test_momentum_after_warms_up_to_its_value():
    values = [momentum_after(torch.tensor(float(n)), 0.95, 4).item() for n in range(6)]
    assert values == pytest.approx([0.87, 0.89, 0.91, 0.93, 0.95, 0.95])
    assert momentum_after(torch.tensor(0.0), 0.5, 300) == 0.5
    assert momentum_after(torch.tensor(0.0), 0.95, 0) == pytest.approx(0.95)


def test_muon_state_bytes_equal_what_it_keeps_by_name():
    run = composed_run(*SMOKE, "optim=muon")
    assert run.optim.lr == 2 / 64 and composed_run(*SMOKE, "optim=muon", "optim.lr=0.1").optim.lr == 0.1
    model = initialised(run.model, 257)
    optimizer = run.optim.build(model)
    logits_of(model, some_tokens(1, 8)).sum().backward()
    optimizer.step()
    kept = sum(part.nbytes for state in optimizer.state.values() for part in state.values())
    assert run.optim.state_bytes(cost.on_meta(run.model, 257)) == kept
    names = set(_optimizer_tensors(training_state(model, optimizer)))
    assert {"layers.0.mlp.up_proj.weight/momentum_buffer", "embedding.weight/exp_avg"} <= names


@pytest.mark.parametrize(
    "choice",
    [
        ["attention=mla", "precision=bf16"],
        ["attention=gqa", "precision=fp32"],
        pytest.param(["attention=mha", "compile=true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_muon_run_resumed_is_bit_exact(workplace, monkeypatch, choice):
    options = [*QUICK, "optim=muon", "optim.momentum_warmup=8", "model.dropout=0.1"]
    options += ["micro_batch_size=1", "steps=12", "save_every=5", "eval_every=4", "model.n_layers=1", *choice]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)


def test_muon_run_with_skipped_float16_steps_resumes_bit_exactly(workplace, monkeypatch):
    monkeypatch.setattr("runtime.precision.LossScale.INITIAL", 2.0**28)
    monkeypatch.setattr("runtime.precision.LossScale.GROWTH_STEPS", 3)
    options = [
        *QUICK,
        "optim=muon",
        "precision=fp16",
        "steps=20",
        "max_skipped_updates=30",
        "save_every=5",
        "keep_last=9",
    ]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=10)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=20)


def test_muon_step_without_gradients_keeps_no_state():
    model = small_model("attention=gqa")
    optimizer = configured(MuonConfig, lr=1e-3).build(model)
    assert isinstance(optimizer, Muon)
    optimizer.step()  # without gradients there is nothing to do
    assert not optimizer.state
