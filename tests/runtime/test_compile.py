"""torch.compile with its fallback, against a fake compiler: what falls back, for which calls, and what it says."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from runtime.compile import CompiledOrEager
from tests.support import batches, small_model
from training.compile import maybe_compiled
from training.losses import mean_loss


class FakeCompiler:
    """Stands for torch.compile: "compiled" functions note each call, and fail where they are told to."""

    def __init__(self):
        self.calls = []  # shapes of the inputs
        self.fails = {}  # shape -> the error

    def __call__(self, function, **_):
        def compiled(*inputs):
            shape = tuple(inputs[0].shape)
            self.calls.append(shape)
            if shape in self.fails:
                raise self.fails[shape]
            return function(*inputs)

        return compiled


@pytest.fixture
def compiler(monkeypatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(torch, "compile", fake)
    return fake


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def run_once(function, *inputs) -> None:
    function(*inputs)


def test_compiled_shape_that_fails_runs_eagerly_whenever_it_comes(compiler, caplog):
    """The other shapes stay compiled; one that failed is not compiled again, nor warned of."""
    call = CompiledOrEager(doubled, "compile=true", run_once)
    compiler.fails = {(2,): RuntimeError("no such layout\nin a kernel\nof many"), (3,): RuntimeError("too large")}
    for size in (1, 2, 1, 2, 3, 3):
        assert torch.equal(call(torch.ones(size)), torch.full((size,), 2.0))
    assert compiler.calls == [(1,), (1,), (2,), (1,), (3,)]  # with a trial of each
    assert caplog.messages == [
        "compile=true failed, running eagerly: no such layout in a kernel",
        "compile=true failed, running eagerly: too large",
    ]


def test_compiled_shapes_that_fail_for_one_reason_are_one_warning(compiler, caplog):
    call = CompiledOrEager(doubled, "compile=true", run_once)
    compiler.fails = {(size,): RuntimeError("no compiler here") for size in (1, 2, 3)}
    for size in (1, 2, 3):
        call(torch.ones(size))
    assert caplog.messages == ["compile=true failed, running eagerly: no compiler here"]


def test_compiled_call_that_fails_later_runs_eagerly_from_then_on(compiler, caplog):
    """As where a KV cache has grown, which no input shows."""
    call = CompiledOrEager(doubled, "--compile", run_once)
    call(torch.ones(1))
    compiler.fails = {(1,): TorchDynamoException("no such size")}
    for _ in range(2):
        assert call(torch.ones(1)) == 2
    assert len(compiler.calls) == 3 and caplog.messages == ["--compile failed, running eagerly: no such size"]


def test_compiled_function_that_raises_by_itself_still_raises(compiler, caplog):
    call = CompiledOrEager(doubled, "compile=true", run_once)
    call(torch.ones(1))
    compiler.fails = {(1,): torch.OutOfMemoryError("no memory")}
    with pytest.raises(torch.OutOfMemoryError):
        call(torch.ones(1))
    assert not caplog.messages


def test_compiled_trial_without_memory_raises_and_compiles_later(compiler, caplog):
    call = CompiledOrEager(doubled, "compile=true", run_once)
    compiler.fails = {(1,): torch.OutOfMemoryError("no memory")}
    with pytest.raises(torch.OutOfMemoryError):
        call(torch.ones(1))
    compiler.fails = {}
    assert call(torch.ones(1)) == 2
    assert compiler.calls == [(1,), (1,), (1,)] and not caplog.messages


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward program")


def test_compiled_backward_that_fails_at_a_later_shape_runs_eagerly(monkeypatch, caplog):
    """As that of a smaller batch: it would fail in the midst of a step."""

    def compile_but_small(function, **_):
        def compiled(model, batch):
            loss, aux = function(model, batch)
            return loss if len(batch.inputs) > 1 else FailsBackward.apply(loss), aux

        return compiled

    monkeypatch.setattr(torch, "compile", compile_but_small)
    model, loss = small_model("attention=mha"), maybe_compiled(mean_loss, True)
    for count in (2, 1):
        (batch,) = batches(count, count)
        found, expected = loss(model, batch)[0], mean_loss(model, batch)[0]
        assert torch.equal(found, expected)
        found.backward()
    assert caplog.messages == ["compile=true failed, running eagerly: no backward program"]
