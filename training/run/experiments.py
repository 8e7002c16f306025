"""What an experiment of conf/ sets, which nobody typed, in the words of an error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.conf_files import NO_SETTINGS, choices, content, is_group
from common.errors import UserError
from common.overrides import key_of


@contextmanager
def experiment_named(typed: Sequence[str]) -> Iterator[None]:
    """A context in which an error of a setting that comes from the experiment on the command line names that one, too.
    typed: the overrides there."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}{_origin(str(error).partition('=')[0], typed)}") from None


def _origin(key: str, typed: Sequence[str]) -> str:
    given = {key_of(word): word for word in typed}
    experiment = given.get("experiment", "")
    names = (key, f"model.{key}", f"attention.{key}")  # errors name these settings without their group
    set_there = _set_by(experiment.partition("=")[2])
    name = next((name for name in names if name in set_there), None)
    return "" if name is None or not given.keys().isdisjoint(names) else f" ({experiment} sets {name})"


def _set_by(experiment: str) -> set[str]:
    """The dotted names of the settings that it sets."""
    if experiment not in choices("experiment"):
        return set()
    own = content("experiment", experiment)
    parts = {group: part for group, part in own.items() if is_group(group)}
    return {*own.keys() - parts.keys() - {*NO_SETTINGS}, *(f"{group}.{key}" for group in parts for key in parts[group])}
