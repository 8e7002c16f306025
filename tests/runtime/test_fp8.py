"""Products in float8: refused where they cannot be, the same training within their rounding where they can."""

import importlib.util
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.errors import UserError
from model.initialise import initialised
from runtime import precision
from runtime.precision import MixedPrecision, choose_precision
from tests.support import (
    QUICK,
    SMOKE,
    assert_one_line,
    batches,
    call,
    configured,
    relative_error,
    small_config,
    training_state,
)
from tests.training.runs import assert_same_run, rewind
from training.optim.adamw import AdamWConfig
from training.step import accumulate_gradients, train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("installed", "device", "capability", "complaint"),
    [
        (False, CUDA, (9, 0), "precision=fp8 needs the package torchao, which is not here: "),
        (True, CPU, None, "this cpu has no float8 products: choose precision=auto"),
        (True, CUDA, (8, 0), "this GPU's compute capability is 8.0, float8 products need 8.9: choose precision=auto"),
    ],
)
def test_fp8_without_float8_products_is_refused(monkeypatch, installed, device, capability, complaint):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(UserError, match="precision=fp8") as refusal:
        choose_precision("fp8", device)
    assert complaint in str(refusal.value)
    assert_one_line(refusal.value)


def test_fp8_on_a_gpu_that_multiplies_it_is_chosen(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision("fp8", CUDA) == "fp8"


def test_fp8_run_on_a_cpu_is_refused_before_it_leaves_anything(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "precision=fp8"], monkeypatch) == 2
    assert "error: precision=fp8" in capsys.readouterr().err.splitlines()[-1]
    assert not list(workplace.iterdir())


class Rounded(nn.Linear):
    """Stands for torchao's layer: the same parameters, other arithmetic."""


def stand_in(monkeypatch) -> list[SimpleNamespace]:
    """torchao.float8 in its place -> the configurations that are asked for."""
    asked = []

    def convert(model, *, module_filter_fn, config):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module_filter_fn(module, name):
                module.__class__ = Rounded
        asked.append(config)

    fake = SimpleNamespace(Float8LinearConfig=SimpleNamespace, convert_to_float8_training=convert)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(float8=fake))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    return asked


def test_multiply_in_fp8_names_the_layers_that_stay_in_bfloat16(monkeypatch, caplog):
    asked = stand_in(monkeypatch)
    config = small_config("attention=mla")  # whose kv_down has a side of 20
    with caplog.at_level(logging.INFO, logger="headroom"):
        mixed = MixedPrecision(initialised(config, 100), "fp8")
    rounded = {name for name, module in mixed.model.named_modules() if isinstance(module, Rounded)}
    left = {name for name, module in mixed.model.named_modules() if isinstance(module, nn.Linear)} - rounded
    assert left == {"layers.0.attention.kv_down", "layers.1.attention.kv_down"} and rounded
    assert f"{len(rounded)} of {len(rounded) + 2} linear layers multiply in float8" in caplog.text
    assert "2 linear layers stay in bfloat16" in caplog.text and "layers.0.attention.kv_down" in caplog.text
    assert [config.emulate for config in asked] == [True]


def test_multiply_in_fp8_without_torchao_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        MixedPrecision(initialised(small_config(), 100), "fp8")


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
@pytest.mark.parametrize("attention", ["mha", "gqa", "mla"])
def test_fp8_gradients_equal_those_of_float32_within_the_rounding(attention):
    """Its naive twin is the same model in float32; torchao imitates the products on a CPU."""
    found = {}
    for name in ("fp32", "fp8"):
        model = initialised(small_config(f"attention={attention}", "model.zero_init=false"), 100)
        loss, _ = accumulate_gradients(training_state(model, precision=name), batches(8, 4))
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        found[name] = loss, gradients
    assert relative_error(found["fp8"][0], found["fp32"][0]) < 0.01
    apart = torch.cat([(found["fp8"][1][key] - expected).flatten() for key, expected in found["fp32"][1].items()])
    whole = torch.cat([expected.flatten() for expected in found["fp32"][1].values()])
    assert 0.05 < apart.norm() / whole.norm() < 0.25  # less, and nothing was rounded to three bits
    for key, expected in found["fp32"][1].items():
        assert torch.cosine_similarity(found["fp8"][1][key].flatten(), expected.flatten(), dim=0) > 0.9, key


@needs_torchao
def test_fp8_training_lowers_the_loss_as_float32_does():
    losses = {}
    for name in ("fp32", "fp8"):
        model = initialised(small_config(), 100)
        state = training_state(model, configured(AdamWConfig, lr=3e-3).build(model), name, clip_norm=1.0)
        losses[name] = [train_step(state, batches(8, 4), 1.0).loss.item() for _ in range(20)]
    assert losses["fp8"][-1] < 0.75 * losses["fp8"][0]
    assert losses["fp8"][-1] == pytest.approx(losses["fp32"][-1], abs=0.05)


@needs_torchao
def test_fp8_run_resumed_is_bit_exact(workplace, monkeypatch):
    monkeypatch.setattr(precision, "check_fp8", lambda device: None)  # a CPU imitates it
    options = [*QUICK, "precision=fp8", "steps=6", "save_every=3", "eval_every=3"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "again", 3)
    assert call("train", ["resume=again"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "again", 6)
