"""TrainState: parameters that are frozen or unused, and buffers that are state."""

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from model.layout import Role, linear
from model.linear import Linear
from model.transformer import TransformerLM
from runtime.precision import Precision
from tests.support import QUICK, SMOKE, batches, call, composed_run
from tests.training.runs import assert_same_run, rewind
from training.run.config import Run
from training.state import TrainState
from training.step import train_step

FROZEN = ("embedding.weight", "layers.0.attention.q_proj.weight", "layers.1.attention_norm.weight")
UNUSED = "layers.0.mlp.unused.weight"
CPU = torch.device("cpu")


@pytest.fixture
def partly_trained(monkeypatch):
    """Models are built with some parameters frozen and one that nothing uses."""
    build = TransformerLM.__init__

    def patched(self, *arguments, **options) -> None:
        build(self, *arguments, **options)
        mlp = self.layers[0].mlp
        mlp.unused, described = Linear(8, 8, bias=False), mlp.layout
        mlp.layout = lambda: {**described(), **linear("unused", mlp.unused, Role.UP)}
        for name in FROZEN:
            self.get_parameter(name).requires_grad_(False)

    monkeypatch.setattr(TransformerLM, "__init__", patched)


@pytest.mark.parametrize(
    ("optim", "precision"), [("adamw", "fp32"), ("adamw", "fp16"), ("muon", "fp32"), ("muon", "bf16")]
)
def test_train_step_leaves_frozen_and_unused_parameters_alone(partly_trained, precision, optim):
    """They have no decay either, and no state."""
    run = composed_run(*SMOKE, f"optim={optim}", f"precision={precision}", "optim.weight_decay=1")
    state = TrainState.create(run, 100, CPU)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for _ in range(3):
        result = train_step(state, batches(4, 2), 1.0)
        assert result.grad_norm.isfinite() and result.grad_norm > 0
    still = {name for name, p in state.model.named_parameters() if torch.equal(p, before[name])}
    assert still == {*FROZEN, UNUSED}
    assert not any(state.optimizer.state.get(state.model.get_parameter(name)) for name in still)
    copies = dict(state.precision.model.named_parameters())
    assert all(copies[name].requires_grad == p.requires_grad for name, p in state.model.named_parameters())


@pytest.mark.parametrize("options", [("optim=adamw",), ("optim=muon", "precision=bf16", "clip_norm=0.1")], ids=" ".join)
def test_run_with_frozen_and_unused_parameters_resumed_is_bit_exact(
    partly_trained, workplace, monkeypatch, capsys, options
):
    short = [*QUICK, *options, "steps=6", "save_every=3", "eval_every=3"]
    assert call("train", [*short, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=3)
    capsys.readouterr()
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert f"holds nothing of {UNUSED}: they had no update" in capsys.readouterr().err
    assert_same_run(workplace / "whole", workplace / "killed", step=6)


class ScoreAverage:
    """Moves a buffer towards the largest attention scores of each layer, as the bias of an expert goes by its load."""

    collects = "max_logit"
    reduce = staticmethod(torch.maximum)

    def __init__(self, model: TransformerLM):
        self.buffer = model.average

    def __call__(self, collected: torch.Tensor, skipped: torch.Tensor) -> dict[str, torch.Tensor]:
        self.buffer.lerp_(collected.amax(1), torch.where(skipped, 0.0, 0.1))
        return {}


@pytest.fixture
def averaging(monkeypatch):
    """Models have a buffer, which their output depends on, and runs a hook that moves it."""
    build, forward = TransformerLM.__init__, TransformerLM.forward

    def patched(self, config, *arguments, **options) -> None:
        build(self, config, *arguments, **options)
        self.register_buffer("average", torch.zeros(config.n_layers))

    def shifted(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        return out._replace(x=out.x * (1 + 0.1 * self.average.mean()).to(out.x.dtype))

    def hooks(run: Run, model: TransformerLM, precision: Precision) -> list[ScoreAverage]:
        return [ScoreAverage(model)]

    monkeypatch.setattr(TransformerLM, "__init__", patched)
    monkeypatch.setattr(TransformerLM, "forward", shifted)
    monkeypatch.setattr("training.state.after_step_hooks", hooks)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_state_buffers_are_shared_with_the_low_precision_copy_in_float32(averaging, precision):
    state = TrainState.create(composed_run(*SMOKE, f"precision={precision}"), 100, CPU)
    train_step(state, batches(4, 2), 1.0)
    assert state.model.average.all() and state.model.average.dtype == torch.float32
    assert state.precision.model.average is state.model.average


def test_after_step_hooks_of_a_skipped_step_move_nothing(averaging):
    state = TrainState.create(composed_run(*SMOKE, "precision=fp32"), 100, CPU)
    with torch.no_grad():
        state.model.norm.weight.fill_(float("nan"))
    assert train_step(state, batches(4, 2), 1.0).skipped
    assert not state.model.average.any()


def test_after_step_hook_that_no_layer_reports_to_is_refused_before_anything_moves(
    averaging, workplace, monkeypatch, capsys
):
    monkeypatch.setattr(ScoreAverage, "collects", "expert_load")
    state = TrainState.create(composed_run(*SMOKE, "precision=fp32"), 100, CPU)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(UserError, match=r"ScoreAverage acts .* expert_load, which no layer returns: return it"):
        train_step(state, batches(4, 2), 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    assert state.step == 0 and all(p.grad is None for p in state.model.parameters())
    assert call("train", [*QUICK, "steps=2", "run_dir=run"], monkeypatch) == 2
    assert "expert_load, which no layer returns" in capsys.readouterr().err.splitlines()[-1]


def test_train_step_without_batches_as_a_dry_run_times_it_calls_no_hook(averaging):
    state = TrainState.create(composed_run(*SMOKE, "precision=fp32"), 100, CPU)
    train_step(state, [], 1.0)
    assert not state.model.average.any()


def test_run_with_a_buffer_resumed_is_bit_exact(averaging, workplace, monkeypatch):
    options = [*QUICK, "precision=bf16", "steps=6", "save_every=3", "eval_every=3"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=3)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=6)
    averages = [
        load_file(workplace / "whole/checkpoints" / step / "model.safetensors")["average"]
        for step in ("step_00000003", "step_00000006")
    ]
    assert averages[0].all() and not torch.equal(*averages)


def test_train_state_restored_draws_no_weights(workplace, monkeypatch):
    options = [*QUICK, "steps=2", "save_every=1"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=1)

    def refuse(*_) -> None:
        raise AssertionError("weights were drawn")

    monkeypatch.setattr("training.state.initialised", refuse)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert call("train", [*options, "init_from=whole", "run_dir=tuned"], monkeypatch) == 0
