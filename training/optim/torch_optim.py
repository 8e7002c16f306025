"""Optimizers of torch.optim, by name, with their settings passed through and checked."""

import functools
import inspect
import json
import math
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from common.suggestions import aliased, hint, nearest
from model.layout import ParamLayout
from model.transformer import TransformerLM
from runtime.fast_startup import UncompiledOptimizer, without_compiler_marks
from runtime.precision import Precision
from training.optim.base import OptimConfig, StateTensor, shards_of
from training.optim.groups import parameter_groups

# Arguments that are no settings: the groups', and those that say how PyTorch executes a step.
NO_SETTINGS = {
    *("params", "lr", "weight_decay"),
    *("foreach", "fused", "maximize", "differentiable", "capturable"),
}
SIZES = (3, 5, 7, 11)  # of small parameters, distinct, so that the dimensions of their state can be told


class TorchOptimConfig(OptimConfig):
    """One of PyTorch's optimizers, for all parameters. Weight decay is of matrices, embeddings included, and not of
    vectors; how it decays is the optimizer's own. Unset, lr is 0.5 / d_model, as AdamW's."""

    lr_times_width: ClassVar[float] = 0.5  # of an lr that is unset

    weight_decay: float = Field(ge=0)
    name: str  # of a class in torch.optim
    settings: dict[str, Any] | None  # its other arguments; what is not given is as in PyTorch

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in available():
            near = {one.lower(): one for one in available()}.get(name.lower()) or nearest(name, available())
            raise ValueError(
                f"optim.name={name}: torch {torch.__version__} has no such optimizer, or none that can train a whole "
                f"model: {hint(near) or 'choose one of ' + ', '.join(available())}"
            )
        return name

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None:  # which was refused already
            return {}
        checked = {key: _checked(name, key, value) for key, value in (settings or {}).items()}
        try:
            _small_states(name, json.dumps(checked), 2)
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"optim.settings={checked}: {name} refuses that: {str(error).splitlines()[0]}") from None
        return checked

    def derive(self, d_model: int) -> Self:
        return self.model_copy(update={"lr": self.lr or self.lr_times_width / d_model})

    def build(self, model: TransformerLM, precision: Precision | None = None) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.groups, self._options, shards_of(model, precision)[0])
        optimizer = _uncompiled(available()[self.name])(groups, **self.settings)
        optimizer.state_layout = lambda parameter: self._states(parameter.shape)
        return optimizer

    def state_layout(self, layout: ParamLayout, shape: torch.Size) -> dict[str, StateTensor]:
        return self._states(shape)

    @property
    def acts_on_rows(self) -> bool:
        """Whether all state of a matrix is as large as it, or a count: then each number is updated by itself."""
        states = self._states(torch.Size(SIZES[:2])).values()
        return all(state.counts or state.shape == torch.Size(SIZES[:2]) for state in states)

    def _options(self, layout: ParamLayout) -> dict[str, Any]:
        return {"lr": self.lr, "weight_decay": 0.0 if layout.fan_in is None else self.weight_decay}

    def _states(self, shape: torch.Size) -> dict[str, StateTensor]:
        small = _small_states(self.name, json.dumps(self.settings), len(shape))
        return {key: state.of(shape) for key, state in small.items()}


class _SmallState(NamedTuple):
    """A state tensor of a small parameter, whose sizes are SIZES."""

    shape: torch.Size
    dtype: torch.dtype
    counts: bool

    def of(self, shape: torch.Size) -> StateTensor:
        """The same state of a parameter of another shape."""
        sizes = dict(zip(SIZES, shape, strict=False))
        return StateTensor(torch.Size(sizes.get(n, n) for n in self.shape), dtype=self.dtype, counts=self.counts)


@functools.cache
def available() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers of the installed torch that update parameters of any shape from dense gradients, with weight
    decay, each parameter by itself."""
    return {name: found for name, found in sorted(vars(torch.optim).items()) if _is_usable(found)}


def _is_usable(found: Any) -> bool:
    if not inspect.isclass(found) or not issubclass(found, torch.optim.Optimizer):
        return False
    if "weight_decay" not in inspect.signature(found).parameters:
        return False
    try:
        return all(_step_small(found, {}, ndim) is not None for ndim in (1, 2))
    except (ValueError, TypeError, RuntimeError):
        return False


def _step_small(optimizer: type[torch.optim.Optimizer], settings: dict[str, Any], ndim: int) -> dict[str, Any]:
    """The state of a small parameter of so many dimensions after a step."""
    parameter = nn.Parameter(torch.ones(SIZES[:ndim], device="cpu"))
    parameter.grad = torch.ones_like(parameter)
    stepped = _uncompiled(optimizer)([parameter], lr=1e-3, **settings)
    stepped.step()
    return stepped.state[parameter]


@functools.cache
def _small_states(name: str, settings: str, ndim: int) -> dict[str, _SmallState]:
    """settings: as JSON, which can be cached."""
    state = _step_small(available()[name], json.loads(settings), ndim)
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"its state {key} is no tensor, and cannot be saved")
    return {key: _SmallState(value.shape, value.dtype, key == "step") for key, value in state.items()}


@functools.cache
def _uncompiled(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer without the compiler's marks, whose first use imports the compiler."""
    step = torch.no_grad()(without_compiler_marks(optimizer.step))
    return type(optimizer.__name__, (UncompiledOptimizer, optimizer), {"step": step})


def _checked(optimizer: str, key: str, value: Any) -> Any:
    """A setting in the type of its default. Raises ValueError where there is none, or the value is of another type."""
    parameters = inspect.signature(available()[optimizer]).parameters
    known = {name: one.default for name, one in parameters.items() if name not in NO_SETTINGS}
    given = f"optim.settings.{key}={json.dumps(value, default=str)}"
    if key in known:
        return _typed(given, value, known[key])
    beside = [one for one in (f"optim.{key}", *aliased(key)) if one in ("optim.lr", "optim.weight_decay")]
    if beside:
        raise ValueError(f"{given}: that is a setting beside these: write {beside[0]}={json.dumps(value, default=str)}")
    if key in NO_SETTINGS:
        raise ValueError(f"{given}: that is training's own to set: leave it out")
    listed = f"it has {', '.join(known) or 'none'}"
    raise ValueError(f"{given}: {optimizer} has no such setting; {hint(nearest(key, known)) or listed}")


def _typed(given: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ValueError(f"{given}: give a list of {len(default)}, as {json.dumps(default)}")
        return [_typed(given, one, usual) for one, usual in zip(value, default, strict=True)]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{given}: give true or false")
        return value
    if value is None and default is None:
        return value
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{given}: give a finite number")
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
