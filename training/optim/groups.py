"""Groups of parameters, by patterns of their names, with a learning rate or weight decay of their own, or frozen."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

from pydantic import Field, model_validator

from common.console import counted
from common.invocation import quoted
from common.overrides import as_text
from common.settings import FrozenSettings
from common.suggestions import hint, nearest
from model.layout import ParamLayout
from model.transformer import TransformerLM
from runtime.precision import Shard


class GroupConfig(FrozenSettings):
    """Settings of the parameters whose names match a pattern, in which * stands for anything, dots too."""

    # A list in conf/ has no place for defaults of its entries, so they are here.
    match: str = Field(min_length=1)
    lr: float | None = Field(None, gt=0)  # peak; unset: as without the group
    weight_decay: float | None = Field(None, ge=0)  # of vectors only where the pattern matches nothing else
    train: bool = True  # false: frozen

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        unknown = [key for key in given if key not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            meant = hint(nearest(str(unknown[0]), cls.model_fields)) or f"valid: {', '.join(cls.model_fields)}"
            raise ValueError(f"optim.groups: {unknown[0]}={given[unknown[0]]}: no such key of a group; {meant}")
        return given

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        given = [name for name in ("lr", "weight_decay") if getattr(self, name) is not None]
        if self.train and not given:
            raise ValueError(
                f"optim.groups: match={self.match} changes nothing: give lr, weight_decay or train: false beside it"
            )
        if given and not self.train:
            raise ValueError(
                f"optim.groups: match={self.match} with train=false has no use for {given[0]}="
                f"{getattr(self, given[0])}: leave one of the two out"
            )
        return self

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.match)


def group_of(name: str, groups: Sequence[GroupConfig]) -> GroupConfig | None:
    """The group of a parameter: the first that matches."""
    return next((group for group in groups if group.matches(name)), None)


def check_groups(groups: Sequence[GroupConfig], names: Sequence[str], frozen: Collection[str] = ()) -> None:
    """Raise ValueError where a group has no parameters, or all are frozen. frozen: names of what is so anyway, while an
    indexer is warmed up."""
    chosen = [group_of(name, groups) for name in names]
    for i, group in enumerate(groups):
        where = f"optim.groups: {_spelled(group)}"
        if not any(map(group.matches, names)):
            near = (group.model_copy(update={"match": match}) for match in _near(group.match, names))
            meant = (_typed([*groups[:i], one, *groups[i + 1 :]]) for one in near)
            way_out = _layers(group.match, names) or hint(*meant) or _examples(names)
            raise ValueError(f"{where} matches no parameter; {way_out}")
        if not any(one is group for one in chosen):
            raise ValueError(f"{where} matches only what groups before it match, and the first counts: put it ahead")
    learning = [group for name, group in zip(names, chosen, strict=True) if name not in frozen]
    if all(group is not None and not group.train for group in learning):
        of_indexer = " of the indexer, which attention.indexer.stage=warmup trains alone" if frozen else ""
        raise ValueError(f"optim.groups freeze all parameters{of_indexer}: leave some to train")


def described(groups: Sequence[GroupConfig], names: Sequence[str]) -> str:
    """What the groups do, and to how many parameters, as in `layers.0.*: 9 parameters frozen`."""
    words = []
    for group in groups:
        count = counted(sum(group_of(name, groups) is group for name in names), "parameter")
        given = _given(lr=group.lr, weight_decay=group.weight_decay)
        effect = ", ".join(f"{key} {value:g}" for key, value in given.items()) or "frozen"
        words.append(f"{group.match}: {count} {'with ' if given else ''}{effect}")
    return "; ".join(words)


def freeze(model: TransformerLM, groups: Sequence[GroupConfig]) -> None:
    """Set requires_grad to false in the parameters of groups that do not train."""
    for name, parameter in model.named_parameters():
        group = group_of(name, groups)
        if group is not None and not group.train:
            parameter.requires_grad_(False)


def parameter_groups(
    model: TransformerLM,
    groups: Sequence[GroupConfig],
    options_of: Callable[[ParamLayout], dict[str, Any]],
    shards: Mapping[str, Shard],
) -> list[dict[str, Any]]:
    """Parameter groups for torch.optim: what is trained, parameters of equal options together. options_of(layout): lr,
    weight_decay and others, which the parameter's group may change. shards: the parameters by their names."""
    table = model.layout()
    with_matrices = [group_of(name, groups) for name, layout in table.items() if layout.fan_in is not None]
    found: list[tuple[dict[str, Any], list]] = []
    for name, layout in table.items():
        parameter, group = shards[name].local, group_of(name, groups)
        if not parameter.requires_grad:
            continue
        options = options_of(layout)
        if group is not None:
            decays = layout.fan_in is not None or group not in with_matrices
            options |= _given(lr=group.lr, weight_decay=group.weight_decay if decays else None)
        members = next((members for others, members in found if others == options), None)
        if members is None:
            found.append((options, members := []))
        members.append(parameter)
    return [{"params": members, **options} for options, members in found]


def _given(**options: float | None) -> dict[str, float]:
    return {name: value for name, value in options.items() if value is not None}


def _typed(groups: Iterable[GroupConfig]) -> str:
    """Groups as they are typed on a command line."""
    return quoted(f"optim.groups=[{', '.join(map(_spelled, groups))}]")


def _spelled(group: GroupConfig) -> str:
    given = group.model_dump(exclude_defaults=True, exclude={"match"})
    rest = "".join(f", {name}: {json.dumps(value)}" for name, value in given.items())
    return f"{{match: {as_text(group.match, literal=True)}{rest}}}"


def _layers(pattern: str, names: Sequence[str]) -> str:
    """Say which layers there are, where the pattern would match if its number were another."""
    of_any = re.sub(r"\.\d+\.", ".*.", pattern)
    if of_any == pattern or not any(fnmatchcase(name, of_any) for name in names):
        return ""
    last = max(int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name)))
    return f"layers are 0 to {last}"


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """The pattern that it is most likely a slip of, if any: of names of parameters and of modules, of all layers."""
    ends = [re.sub(r"\.\d+\.", ".*.", name).split(".") for name in names]
    starts = {".".join([*parts[:i], "*"]) for parts in ends for i in range(1, len(parts))}
    known = [".".join(parts) for parts in ends] + sorted(starts)
    return get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), list(dict.fromkeys(known)), n=1, cutoff=0.7)


def _examples(names: Sequence[str]) -> str:
    return f"names are {names[0]}, {names[len(names) // 2]}, {names[-1]} and the like"
