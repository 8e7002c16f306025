"""Shortcuts around slow imports: that they import nothing slow, and do what they stand for."""

import subprocess
import sys

import torch
from torch import nn

from runtime.fast_startup import UncompiledOptimizer, allocate_empty, use_deterministic_algorithms
from tests.support import ROOT
from training.optim.adamw import AdamW

CODE = """
import sys, torch
from torch import nn
from runtime.device import set_determinism
from runtime.fast_startup import allocate_empty
from training.optim.adamw import AdamW

set_determinism(False)
with torch.device("meta"):
    model = nn.Linear(4, 4)
model = allocate_empty(model)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
import training.step_memory, training.step_time
print(*sorted({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()))
"""


def test_fast_startup_loads_neither_the_compiler_nor_sympy():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "\n", (result.stdout, result.stderr)


def test_allocate_empty_gives_every_parameter_memory_of_its_shape():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(torch.bfloat16)
    shapes = [parameter.shape for parameter in model.parameters()]
    model = allocate_empty(model)
    assert [parameter.shape for parameter in model.parameters()] == shapes
    assert all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_use_deterministic_algorithms_sets_what_pytorch_does():
    try:
        for wanted in (True, True, False, False):
            use_deterministic_algorithms(wanted)
            assert torch.are_deterministic_algorithms_enabled() == wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_uncompiled_optimizer_equals_that_of_pytorch():
    weight = torch.ones(3, 3)
    mine, its = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizers = AdamW([mine], lr=0.1, fused=True), torch.optim.AdamW([its], lr=0.1, fused=True)
    assert isinstance(optimizers[0], UncompiledOptimizer)
    for optimizer, parameter in zip(optimizers, (mine, its), strict=True):
        for _ in range(2):
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(mine, its)
