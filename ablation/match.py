"""Matched budgets of a sweep's variants: equal parameters, FLOPs or KV cache, reached by moving one setting of each
variant that differs from the first, the reference.

    params   mlp.d_ff, in units of 8; of a mixture each expert's, in units of 4, 2 or 1 where 8 is too coarse
    flops    the same
    cache    attention.kv_lora_rank of MLA, in units of 8, or of 4, 2 or 1 where 8 is too coarse, up to the widest
             absorbed key of flash kernels; attention.n_kv_heads of GQA and MQA, among the divisors of n_heads

Parameters and FLOPs are affine in d_ff, the cache in the latent's width and in the KV heads. So two measurements give
the value that matches exactly, and of the values allowed the one beside it that comes nearest is taken.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from common.errors import UserError
from model import cost
from model.attention.base import divisors
from model.attention.gqa import GQAConfig
from model.attention.mla import MAX_FLASH_KEY, MLAConfig
from model.attention.stack import StackConfig
from model.dimensions import MAX_SIZE
from model.moe import MoEConfig
from model.transformer import ModelConfig
from training.run.config import Run
from training.run.start import compose_start

Budget = Literal["params", "flops", "cache"]

TOLERANCE = 0.005  # a matched budget is less than this off the reference's, relative to it
LIMIT = f"{100 * TOLERANCE:g} %"
UNIT = 8  # of widths: what tensor cores want
FINER_UNITS = (4, 2, 1)
COUNTED = ("attention", "mlp", "norms")  # parts of cost.parameters; the others depend on vocabulary and context
WORDS = {
    "params": "parameters without embedding, head and positions",
    "flops": "FLOPs per token of training",
    "cache": "bytes per token of the KV cache at a full context",
}
ORDER = ("cache", "params", "flops")  # the cache first: what it moves changes the other two, but not they the cache


class Matched(NamedTuple):
    overrides: dict[str, list[str]]  # by variant, in addition to its own; empty where nothing had to move
    table: list[str]  # lines for the terminal, of each variant what was moved and how far off it is


@dataclass(frozen=True)
class _Variant:
    name: str
    overrides: tuple[str, ...]  # as typed
    run: Run
    added: tuple[str, ...] = ()  # overrides that matching adds

    def moved(self, key: str, value: int) -> "_Variant":
        added = (*self.added, f"{key}={value}")
        return replace(self, run=compose_start(*self.overrides, *added), added=added)

    def override(self, key: str) -> str | None:
        """The override as typed that gives this setting, if there is one."""
        return next((one for one in self.overrides if one.lstrip("+").partition("=")[0].strip() == key), None)


def match(variants: Mapping[str, Sequence[str]], budgets: Sequence[Budget], vocab_size: int) -> Matched:
    """Overrides that bring each variant's budgets to those of the first, and a table of them.

    variants: name -> overrides for `compose_start`. Raises UserError where a budget cannot be matched.
    """
    budgets = _ordered(budgets, len(variants))
    found = [_Variant(name, tuple(typed), compose_start(*typed)) for name, typed in variants.items()]
    table = []
    for budget in budgets:
        before = tuple(found)
        for i in range(1, len(found)):
            found[i] = _matched(found[i], found[0], budget, vocab_size)
            if found[i] is not before[i]:
                _check_distinct(budget, found[i], (*found[:i], *found[i + 1 :]))
        table += _table(budget, before, found, vocab_size)
    return Matched({one.name: list(one.added) for one in found}, table)


def measure(budget: Budget, config: ModelConfig, vocab_size: int) -> float:
    """The budget of a model: WORDS says of what.

    Parameters are those of attention, MLP and all norms, the final one included: of experts all, whether or not a token
    meets them. FLOPs are those of the experts that it meets. They include the LM head's, and take
    a window for one document. The cache is that of one text as long as the context, in float32, divided by its tokens:
    a window stores no more rows than it is wide, and so has fewer bytes per token than a row has.
    """
    if budget == "flops":
        return cost.flops(config, vocab_size).training()
    model = cost.on_meta(config, vocab_size)
    if budget == "params":
        counts = cost.parameters(model)
        return sum(counts[part] for part in COUNTED)
    return cost.cache_bytes(model, config.context_length) / config.context_length


def _ordered(budgets: Sequence[Budget], n_variants: int) -> list[Budget]:
    unknown = [budget for budget in budgets if budget not in get_args(Budget)]
    if unknown:
        raise UserError(f"match={unknown[0]}: choose params, flops or cache")
    ordered = [budget for budget in ORDER if budget in budgets]
    text = ordered[0] if len(ordered) == 1 else f"[{','.join(ordered)}]"
    if ordered and n_variants < 2:
        raise UserError(f"match={text} compares variants: sweep over several, as in attention=mha,gqa")
    if {"params", "flops"} <= set(ordered):
        raise UserError(f"match={text}: params and flops both move mlp.d_ff: choose one of them")
    return ordered


def _matched(variant: _Variant, reference: _Variant, budget: Budget, vocab_size: int) -> _Variant:
    """The variant, with the one setting moved that brings its budget to the reference's, if it is not there yet."""
    target = measure(budget, reference.run.model, vocab_size)
    measured = measure(budget, variant.run.model, vocab_size)
    if _is_near(measured, target):
        return variant
    _check_movable(budget, variant, f"has {_number(measured)}, {_percent(measured, target)} off {reference.name}")
    key = _setting(budget, variant.run.model)
    value = _value(variant.run.model, key)
    slope = measure(budget, _with_value(variant.run.model, key, value + 1), vocab_size) - measured
    exact = value + (target - measured) / slope
    nearest: dict[int, float] = {}  # value -> budget
    for allowed in _allowed(key, variant.run.model):
        nearest = {one: measured + slope * (one - value) for one in _neighbours(allowed, exact)}
        best = min(nearest, key=lambda one: abs(nearest[one] - target))
        if _is_near(nearest[best], target):
            return variant.moved(key, best)
    reached = " and ".join(f"{_number(n)} ({_percent(n, target)}) with {key}={one}" for one, n in nearest.items())
    raise UserError(
        f"match={budget}: {variant.name} reaches {reached}, not within {LIMIT} of the {_number(target)} of "
        f"{reference.name}: {_way_out(key, exact, nearest)}, or choose match=none"
    )


def _way_out(key: str, exact: float, nearest: Mapping[int, float]) -> str:
    """What to do where the value that matches exactly has no neighbour that is near enough."""
    if key == "mlp.d_ff" and min(nearest) < exact < max(nearest):
        return "choose a larger model, whose steps are finer"
    if key == "attention.kv_lora_rank" and exact > max(nearest):
        return (
            f"make it the first variant, or set {key}={round(exact)} yourself, whose absorbed key is wider than the "
            f"{MAX_FLASH_KEY} of flash kernels"
        )
    return "make it the first variant"


def _is_near(number: float, target: float) -> bool:
    return abs(number - target) < TOLERANCE * target


def _setting(budget: Budget, config: ModelConfig) -> str:
    """The setting that is moved."""
    if budget != "cache":
        return "mlp.d_ff"
    return "attention.kv_lora_rank" if isinstance(config.attention, MLAConfig) else "attention.n_kv_heads"


def _allowed(key: str, config: ModelConfig) -> list[Sequence[int]]:
    """Ascending values that a setting may take: lists from the one to be preferred to the finest."""
    if key == "mlp.d_ff":
        units = (UNIT, *FINER_UNITS) if isinstance(config.mlp, MoEConfig) else (UNIT,)
        return [range(unit, 4 * MAX_SIZE + 1, unit) for unit in units]
    attention = config.attention
    if isinstance(attention, MLAConfig):
        widest = max(1, MAX_FLASH_KEY - attention.qk_rope_head_dim - attention.bias_columns)
        units = [unit for unit in (UNIT, *FINER_UNITS) if unit <= widest]
        return [range(unit, widest + 1, unit) for unit in units]
    return [divisors(config.n_heads)]


def _neighbours(allowed: Sequence[int], exact: float) -> Sequence[int]:
    """The two values on both sides of the exact one, or the last two on its side; one, if there is but one."""
    start = max(0, min(bisect(allowed, exact) - 1, len(allowed) - 2))
    return allowed[start : start + 2]


def _check_movable(budget: Budget, variant: _Variant, off: str) -> None:
    """Raise UserError where the setting that the budget moves does not exist or is not to be moved."""
    config = variant.run.model
    reason = _cache_obstacle(config) if budget == "cache" else None
    if reason:
        raise UserError(
            f"match={budget}: {variant.name} {off}, and {reason}: make it the first variant, leave it out, or "
            "choose match=none"
        )
    typed = variant.override(_setting(budget, config))
    if typed:
        raise UserError(
            f"match={budget}: {variant.name} {off}, and what would have to move is set by {typed}: leave that out, "
            "or choose match=none"
        )


def _cache_obstacle(config: ModelConfig) -> str | None:
    """Why no setting changes this model's cache and leaves it what it is."""
    attention = config.attention
    if isinstance(attention, StackConfig):
        return "a stack has no one latent or number of KV heads to move"
    if isinstance(attention, GQAConfig):
        all_heads = attention.n_kv_heads == config.n_heads
        return "MHA is never moved: with fewer KV heads it would be none" if all_heads else None
    if isinstance(attention, MLAConfig) and attention.execution == "naive":
        return "attention.execution=naive caches keys and values of all heads, however wide the latent is"
    return None


def _check_distinct(budget: Budget, moved: _Variant, others: Sequence[_Variant]) -> None:
    """Raise UserError where moving a setting made two variants the same run, as GQA with all KV heads is MHA."""
    same = next((other for other in others if other.run == moved.run), None)
    if same:
        raise UserError(
            f"match={budget} needs {moved.added[-1]} in {moved.name}, which makes it the same as {same.name}: leave "
            "one of them out, or choose match=none"
        )


def _table(budget: Budget, before: Sequence[_Variant], after: Sequence[_Variant], vocab_size: int) -> list[str]:
    """A heading, and a line per variant but the reference: the setting and the budget before and after, and how far off
    the reference, measured on the runs as composed."""
    target = measure(budget, after[0].run.model, vocab_size)
    rows = []
    for old, new in zip(before[1:], after[1:], strict=True):
        measured = measure(budget, new.run.model, vocab_size)
        assert _is_near(measured, target), f"{new.name}: {measured} is not {target}"
        moved = "unchanged"
        old_budget = ""
        if new is not old:
            key = _setting(budget, old.run.model)
            moved = f"{key} {_value(old.run.model, key)} -> {_value(new.run.model, key)}"
            old_budget = f"{_number(measure(budget, old.run.model, vocab_size))} -> "
        rows.append((new.name, moved, old_budget, _number(measured), _percent(measured, target)))
    name, moved, old_budget, new_budget, off = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = f"  {{:<{name}}}  {{:<{moved}}}  {{:>{old_budget}}}{{:>{new_budget}}}  {{:>{off}}}"
    nothing = "" if old_budget else f", within {LIMIT} as they are"
    heading = f"matched      {WORDS[budget]}, to the {_number(target)} of {after[0].name}{nothing}"
    return [heading, *(form.format(*row) for row in rows)]


def _value(config: ModelConfig, key: str) -> int:
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def _with_value(config: ModelConfig, key: str, value: int) -> ModelConfig:
    group, _, name = key.partition(".")
    return config.model_copy(update={group: getattr(config, group).model_copy(update={name: value})})


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _percent(value: float, target: float) -> str:
    return f"{100 * (value / target - 1):+z.2f} %"
