"""Fast start-up: ways around PyTorch functions whose first call imports its compiler or SymPy, for a second or more.

A run comes to its first step, and a prompt to its first token, in a few seconds; these imports would be half of them.
Each shortcut rests on something internal to PyTorch and says on what. Two more cannot live here, since model/ imports
nothing of this room: what model/kernels marks as constant for the compiler by the attribute that
torch.compiler.assume_constant_result sets.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn


def without_compiler_marks(method: Callable) -> Callable:
    """A method without the marks that keep torch.compile out of it, each of which imports the compiler. They wrap it as
    functools.wraps does; where a release of PyTorch marks none, the result is the method itself."""
    return inspect.unwrap(method)


class UncompiledOptimizer:
    """Methods of torch.optim.Optimizer without the compiler's marks, for a class that inherits from both. Nothing here
    compiles an optimizer."""

    add_param_group = without_compiler_marks(torch.optim.Optimizer.add_param_group)
    state_dict = without_compiler_marks(torch.optim.Optimizer.state_dict)
    load_state_dict = without_compiler_marks(torch.optim.Optimizer.load_state_dict)


def use_deterministic_algorithms(wanted: bool) -> None:
    """torch.use_deterministic_algorithms, called only where it changes something: the call imports the compiler."""
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)


def allocate_empty(model: nn.Module) -> nn.Module:
    """A model of the meta device with memory on the CPU, its numbers undefined: nn.Module.to_empty, which imports
    SymPy, by the method of nn.Module that replaces every parameter."""
    return model._apply(lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype))
