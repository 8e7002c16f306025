"""PyTorch's optimizers by name: settings, what they keep, and what they promise a run."""

import math

import pytest
import torch

from common.conf_files import content
from common.errors import UserError
from model import cost
from model.kernels.sdpa import SDPA
from tests.support import QUICK, batches, call, changed, composed_run, small_model, training_state
from tests.training.runs import assert_same_run, rewind
from training.losses import Losses, mean_loss
from training.optim.torch_optim import available
from training.run.config import compose
from training.step import train_step

SHIPPED = ("sgd", "adam", "nadam", "radam", "adafactor", "rmsprop")
SHIPPED_NAMES = {content("optim", name)["name"] for name in SHIPPED}
RATES = {"SGD": 0.1, "ASGD": 0.1, "Adadelta": 1.0}  # of others 0.01
every_optimizer = pytest.mark.parametrize("name", list(available()))


def chosen(name: str, *settings: str):
    return composed_run("optim=torch", f"optim.name={name}", f"optim.lr={RATES.get(name, 0.01)}", *settings).optim


def state_of(optimizer: torch.optim.Optimizer) -> dict:
    return {p: {key: value.clone() for key, value in kept.items()} for p, kept in optimizer.state.items()}


def test_available_optimizers_are_those_of_pytorch_that_train_a_whole_model():
    assert set(available()) >= SHIPPED_NAMES | {"AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD"}
    assert not set(available()) & {"LBFGS", "SparseAdam", "Rprop", "Muon", "Optimizer"}


@every_optimizer
def test_torch_optim_training_lowers_the_loss(name):
    model = small_model("attention=gqa", "mlp=swiglu", "model.n_layers=1", kernel=SDPA())
    state = training_state(model, chosen(name).build(model), clip_norm=1.0)
    losses = [train_step(state, batches(8, 8), 1.0).loss.item() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.1


@every_optimizer
def test_torch_optim_step_with_nan_loss_changes_nothing(name):
    """Neither as the first step, nor when there is state."""
    model = small_model("attention=mla", "model.n_layers=1", kernel=SDPA())
    optimizer, good = chosen(name).build(model), batches(4, 2)
    state = training_state(model, optimizer, clip_norm=1.0)
    for _ in range(2):
        before, kept = [p.detach().clone() for p in model.parameters()], state_of(optimizer)
        state.losses = Losses(lambda *arguments: (mean_loss(*arguments)[0] * math.nan, {}))
        assert train_step(state, good, 1.0).skipped
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(optimizer.state[p][key], was) for p, parts in kept.items() for key, was in parts.items())
        state.losses = Losses()
        assert not train_step(state, good, 1.0).skipped


@every_optimizer
def test_torch_optim_state_layout_and_state_bytes_are_what_it_keeps(name):
    config = chosen(name)
    model = small_model("attention=mla", "model.n_layers=1", "model.bias=true", kernel=SDPA())
    optimizer = config.build(model)
    train_step(training_state(model, optimizer), batches(4, 4), 1.0)
    for parameter in model.parameters():
        kept, expected = optimizer.state[parameter], optimizer.state_layout(parameter)
        assert {key: (value.shape, value.dtype) for key, value in kept.items()} == {
            key: (state.shape, state.dtype) for key, state in expected.items()
        }
    on_meta = cost.on_meta(model.config, 100)
    assert config.state_bytes(on_meta) == sum(v.nbytes for kept in optimizer.state.values() for v in kept.values())


@pytest.mark.parametrize("optim", ["sgd", "adam", "radam", "adafactor"])
def test_torch_optim_weight_decay_is_of_matrices_and_not_of_vectors(optim):
    moved = {}
    for decay in (0.0, 0.5):
        run = composed_run(f"optim={optim}", "optim.lr=0.01", f"optim.weight_decay={decay}")
        model = small_model("attention=gqa", "model.bias=true", "model.n_layers=1", kernel=SDPA())
        train_step(training_state(model, run.optim.build(model)), batches(4, 4), 1.0)
        moved[decay] = dict(model.named_parameters())
    equal = {name: torch.equal(moved[0.0][name], moved[0.5][name]) for name in moved[0.0]}
    assert equal == {name: p.ndim < 2 for name, p in moved[0.0].items()}


RESUMED = [
    ("optim=adafactor",),  # whose state is not shaped as its parameters
    ("optim=sgd", "optim.settings.momentum=0"),  # which keeps nothing
    ("optim=rmsprop", "optim.settings.momentum=0.9", "optim.settings.centered=true", "precision=bf16"),
    *[pytest.param((f"optim={name}",), marks=pytest.mark.slow) for name in SHIPPED if name != "adafactor"],
    *[
        pytest.param(("optim=torch", f"optim.name={name}", "optim.weight_decay=0.01"), marks=pytest.mark.slow)
        for name in available()
        if name not in SHIPPED_NAMES
    ],
]


@pytest.mark.parametrize("choice", RESUMED, ids=" ".join)
def test_torch_optim_run_resumed_is_bit_exact(workplace, monkeypatch, choice):
    options = [
        *changed(QUICK, "data.size=12"),
        "precision=fp32",
        *choice,
        "micro_batch_size=1",
        "steps=8",
        "save_every=3",
    ]
    options = list({option.partition("=")[0]: option for option in options}.values())
    assert call("train", [*options, "eval_every=4", "model.n_layers=1", "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=3)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=8)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["optim=torch"], "optim.name is not set"),
        (["optim=torch", "optim.name=Lion"], "optim.name=Lion: torch .* choose one of ASGD, .*, SGD"),
        (["optim=sgd", "optim.name=LBFGS"], "optim.name=LBFGS: torch .*, or none that can train a whole model"),
        (["optim=torch", "optim.name=SGD", "optim.settings={momentun: 0.9}"], "momentun=0.9: SGD .* mean momentum?"),
        (["optim=torch", "optim.name=SGD", "optim.settings={zzz: 1}"], "it has momentum, dampening, nesterov"),
        (["optim=torch", "optim.name=SGD", "optim.settings={fused: true}"], "fused=true: that is .*: leave it out"),
        (["optim=torch", "optim.name=sgd"], "optim.name=sgd: torch .*: did you mean SGD?"),
        (["optim=torch", "optim.name=Adagrad", "optim.settings={lr: 0.1}"], "beside these: write optim.lr=0.1$"),
        (["optim=torch", "optim.name=Adagrad", "optim.settings={learning_rate: 0.1}"], "these: write optim.lr=0.1$"),
        (["optim=sgd", "optim.settings={lr: 0.1}"], r"optim.settings.lr: no such setting; did you mean optim.lr\?"),
        (["optim=sgd", "optim.settings={momentun: 0.1}"], "settings.momentun: no such setting; did you mean momentum"),
        (["optim=sgd", "optim.settings.foo=1"], "settings.foo: no such setting; valid: momentum, dampening, nesterov"),
        (["optim=sgd", "+optim.settings.weight_decay=1e-4"], "these: write optim.weight_decay=0.0001$"),
        (["optim=sgd", "optim.settings.momentum=much"], 'optim.settings.momentum="much": give a finite number'),
        (["optim=sgd", "optim.settings.momentum=1e400"], "momentum=.*: give a finite number"),
        (["optim=sgd", "optim.settings.nesterov=1"], "nesterov=1: give true or false"),
        (["optim=adam", "optim.settings.betas=[0.9]"], r"betas=\[0.9\]: give a list of 2, as \[0.9, 0.999\]"),
        (["optim=adam", "optim.settings.betas=[0.9, 2]"], "Adam refuses that: Invalid beta parameter at index 1"),
        (["optim=sgd", "optim.weight_decay=-1"], "optim.weight_decay=-1: give at least 0"),
    ],
    ids=str,
)
def test_torch_optim_setting_that_it_does_not_take_is_refused_in_one_line(typed, line):
    with pytest.raises(UserError, match=line) as refused:
        composed_run(*typed)
    assert "\n" not in str(refused.value)


def test_torch_optim_that_the_installed_torch_lacks_is_refused_with_those_it_has(monkeypatch):
    monkeypatch.delattr(torch.optim, "Adafactor")
    available.cache_clear()
    try:
        with pytest.raises(UserError, match=r"optim.name=Adafactor: torch .* choose one of ASGD, Adadelta, Adagrad"):
            compose("optim=adafactor")
    finally:
        available.cache_clear()


def test_torch_optim_settings_are_passed_through():
    optimizer = composed_run("optim=adam", "optim.settings.betas=[0.5, 0.6]").optim.build(small_model("attention=gqa"))
    assert all(tuple(group["betas"]) == (0.5, 0.6) for group in optimizer.param_groups)
    rates = composed_run("optim=adam", "optim.lr=0.25").optim
    assert {group["lr"] for group in rates.build(small_model("attention=gqa")).param_groups} == {0.25}
    assert composed_run("optim=adam", "model=tiny").optim.lr == 0.5 / 128
