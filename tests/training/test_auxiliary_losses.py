"""Losses that layers return beside their output: part of what training minimises, and of no score."""

import pytest
import torch

from data.batches import Batch
from model.loss import chunked_mean
from model.mlp import PlainMLP
from model.score import token_losses
from runtime.activation_checkpointing import checkpoint_activations
from tests.support import batches, relative_error, small_model, training_state
from training.losses import CROSS_ENTROPY, mean_loss
from training.step import accumulate_gradients, train_step

WEIGHT = 0.5


class Measured(PlainMLP):
    """Its loss is the mean square of its output."""

    def forward(self, x, ctx):
        y, aux = super().forward(x, ctx)
        return y, aux | ({"size": y.square().mean()} if "size" in ctx.collect else {})


def measured_model(weight=WEIGHT):
    model = small_model("attention=gqa", "mlp=relu")
    for block in model.layers:
        block.mlp.__class__ = Measured
        block.mlp.auxiliary_losses = {"size": weight}
    return model


def own_sizes(model, batch):
    """The mean squares of each layer's MLP, (layers,)."""
    sizes = []
    hooks = [b.mlp.register_forward_hook(lambda m, i, out: sizes.append(out[0].square().mean())) for b in model.layers]
    hidden = model(batch.inputs).x
    for hook in hooks:
        hook.remove()
    return torch.stack(sizes), chunked_mean(hidden, model.lm_head, batch.targets)


def uneven():
    """Micro-batches of which one has fewer counted targets."""
    first, second = batches(4, 2)
    targets = second.targets.clone()
    targets[:, 5:] = -1
    return [first, Batch(second.inputs, targets)]


def test_mean_loss_adds_auxiliary_losses_by_their_weights():
    model, (batch,) = measured_model(), batches(4, 4)
    objective, aux = mean_loss(model, batch)
    sizes, plain = own_sizes(model, batch)
    assert relative_error(objective, plain + WEIGHT * sizes.sum()) <= 1e-6
    assert aux[CROSS_ENTROPY] == plain and not aux[CROSS_ENTROPY].requires_grad
    assert model.auxiliary_losses == {"layers.0.size": WEIGHT, "layers.1.size": WEIGHT}


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_of_auxiliary_losses_are_accumulated_as_those_of_the_loss(recomputed):
    model, parts = measured_model(), uneven()
    counts = torch.tensor([float(batch.counted) for batch in parts])
    own = [own_sizes(model, batch) for batch in parts]
    shares = counts / counts.sum()
    sizes, plain = sum(s * share for (s, _), share in zip(own, shares, strict=True)), [p for _, p in own]
    expected = torch.autograd.grad((torch.stack(plain) * shares).sum() + WEIGHT * sizes.sum(), list(model.parameters()))
    if recomputed:
        checkpoint_activations(model)
    total, aux = accumulate_gradients(training_state(model), parts)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, gradient) <= 1e-5
    assert relative_error(total, (torch.stack(plain) * shares).sum()) <= 1e-6
    assert relative_error(torch.stack([aux["layers.0.size"], aux["layers.1.size"]]), sizes) <= 1e-6


def test_step_reports_the_layers_mean_and_the_cross_entropy_alone():
    model, (batch,) = measured_model(), batches(4, 4)
    sizes, plain = own_sizes(model, batch)
    result = train_step(training_state(model), [batch], 1.0)
    assert relative_error(result.loss, plain) <= 1e-6
    assert set(result.reported) == {"size"} and relative_error(result.reported["size"], sizes.mean()) <= 1e-6


def test_score_has_no_auxiliary_losses():
    (batch,) = batches(4, 4)
    assert torch.equal(token_losses(measured_model(), batch), token_losses(measured_model(weight=0.0), batch))


def test_step_whose_auxiliary_loss_is_not_finite_is_skipped():
    model, (batch,) = measured_model(weight=float("nan")), batches(4, 4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert train_step(training_state(model, clip_norm=1.0), [batch], 1.0).skipped
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
