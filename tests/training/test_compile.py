"""torch.compile: its options, its fallback to eager execution, and the warnings."""

import logging

import pytest
import torch

from model.kernels.base import forget_logged
from tests.support import batches, small_model
from training.compile import maybe_compiled
from training.losses import mean_loss


@pytest.mark.parametrize(("autotune", "mode"), [(False, None), (True, "max-autotune-no-cudagraphs")])
def test_maybe_compiled_autotune_is_asked_of_the_compiler_and_logged(monkeypatch, caplog, autotune, mode):
    forget_logged()
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    model, (batch,) = small_model(), batches(2, 2)
    with caplog.at_level(logging.INFO, logger="headroom"):
        loss, _ = maybe_compiled(mean_loss, True, autotune)(model, batch)
    assert torch.equal(loss, mean_loss(model, batch)[0])
    assert [how["mode"] for how in asked] == [mode]
    assert ("may differ in its bits" in caplog.text) == autotune


def test_maybe_compiled_not_enabled_is_the_function_itself():
    assert maybe_compiled(mean_loss, False) is mean_loss
