"""Constructing settings classes: what pydantic finds wrong becomes one line that names the value and the way out."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from types import NoneType
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError

from common.errors import UserError, in_part
from common.suggestions import RENAMED, aliased, hint, nearest, renamed, where_all_are

LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
KINDS = {  # what a value is asked to be, by how pydantic's name for the error begins
    "int": "a whole number, written in digits",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "dict": "a dict, as {name: value}",
    "model": "a dict, as {name: value}",
    "list": "a list, as [value, value]",
    "string": """text; what looks like something else goes in two pairs of quotes: '"7"'""",
}


def validated(cls: type, key: str, settings: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> Any:
    """Construct a settings class. parts: its fields that are typed already. key: where the settings are, as
    attention.parts.local; empty at the top. Raises UserError."""
    parts = parts or {}
    check_known(cls, key, settings, parts)
    try:
        return cls.model_validate({**settings, **parts})
    except ValidationError as error:
        raise UserError(_one_line(cls, key, error)) from None


def check_known(
    cls: type, key: str, settings: Mapping[str, Any], parts: Collection[str] = (), besides: Collection[str] = ()
) -> None:
    """Raise UserError for a setting that the class does not have. parts: its fields that are no settings; besides:
    settings of the same place that are not the class's."""
    name = next((name for name in settings if name not in cls.model_fields and name not in besides), None)
    if name is None:
        return
    where = dotted(key, name)
    if where in RENAMED:
        raise UserError(renamed(where))
    valid = [*besides, *(field for field in cls.model_fields if field not in parts)]
    meant = aliased(where) or [nearest(str(name), valid)]
    listed = f"valid: {', '.join(valid) or 'none'}" if key else where_all_are()
    raise UserError(f"{where}={settings[name]!r}: no such key; {hint(*meant) or listed}")


def _one_line(cls: type[BaseModel], key: str, error: ValidationError) -> str:
    first, *rest = error.errors()
    if first["type"] == "value_error":  # ours: it names the value itself
        message = str(first["ctx"]["error"])
        message = in_part(key, message) if ".parts." in key else message
    else:
        place = _without_member(first["loc"])
        message = _complaint(dotted(key, *place), first, _limits(cls, *place))
        others = [other for other in rest if _without_member(other["loc"]) == place]  # that a union allows as well
        words = [_expected(other) for other in others if other["type"] == "literal_error"]
        words += ["null"] if words and _may_be_null(cls, *place) else []
        message, rest = ", or ".join([message, *words]), [other for other in rest if other not in others]
    return message + (f" (and {len(rest)} more)" if rest else "")


def _without_member(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The place of an error, without pydantic's name for the member of a union that was tried."""
    return tuple(name for name in place if not str(name).startswith(("constrained-", "literal[")))


def _may_be_null(cls: type[BaseModel], field: Any, *_: Any) -> bool:
    return field in cls.model_fields and NoneType in get_args(cls.model_fields[field].annotation)


def _expected(error: Mapping[str, Any]) -> str:
    """The values of which one is expected."""
    return error["ctx"]["expected"].replace("'", "")


def _limits(cls: type[BaseModel], field: Any, *_: Any) -> dict[str, Any]:
    """What a field's numbers are held to, by pydantic's names for it."""
    known = cls.model_fields[field].metadata if field in cls.model_fields else ()
    return {name: limit for one in known if isinstance(one, Ge | Gt | Le | Lt) for name, limit in asdict(one).items()}


def _complaint(where: str, error: Mapping[str, Any], field_limits: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words that know nothing of schemas. field_limits: of both sides, where there are
    two; the error tells only the one that was passed."""
    kind, limits, given = error["type"], error.get("ctx", {}), f"{where}={spelled(error['input'])}"
    if kind == "missing":
        if any(isinstance(step, int) for step in error["loc"]):  # within a list, which is given as a whole
            return f"{where} is not set: give that entry its {error['loc'][-1]}, as {{{error['loc'][-1]}: ...}}"
        return f"{where} is not set: give {where}=..."
    if kind in ("string_too_short", "too_short"):
        return f"{given} is empty: give it a value"
    if kind == "literal_error":
        return f"{given}: choose {_expected(error)}"
    if limits.keys() & LIMITS.keys():
        both = {name: limit for name, limit in {**field_limits, **limits}.items() if name in LIMITS}
        words = (f"{LIMITS[name]} {_in_digits(limit)}" for name, limit in both.items())
        return f"{given}: give {' and '.join(words)}"
    wanted = next((words for name, words in KINDS.items() if kind.startswith(name)), None)
    return f"{given}: give {wanted}" if wanted else f"{given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _in_digits(limit: float) -> str:
    """Write a whole number without a decimal point, and any other as short as it is exact."""
    return str(int(limit)) if limit == int(limit) and abs(limit) < 2**64 else str(limit)


def spelled(value: Any) -> str:
    """As it is typed: YAML has its own words for None, True and False."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def dotted(*path: Any) -> str:
    return ".".join(str(part) for part in path if part != "")
