"""Hydra's and OmegaConf's errors over what was typed, as one line each. Imports nothing heavy."""

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common import conf_files
from common.errors import UserError
from common.suggestions import known_settings, misfit, no_such_choice, no_such_setting


@contextmanager
def one_line_hydra_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn an error that Hydra raises over these overrides into a UserError. Any other is a fault of the program, and
    passes."""
    try:
        yield
    except Exception as error:
        line = _complaint(error, overrides)
        if line is None:
            raise
        raise UserError(line) from None


def plain_tree(cfg: Any) -> dict[str, Any]:
    """Convert a composed Hydra configuration to plain values. Raises UserError for one that is incomplete."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give it a value, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {(error.msg or str(error)).splitlines()[0]}") from None


def _complaint(error: Exception, overrides: Sequence[str]) -> str | None:
    """Return one line for an error of Hydra's; None for any other."""
    if "hydra" not in sys.modules or not _raised_by_hydra(error):
        return None
    missing = re.search(r"Could not (?:override|append|delete)[^']* '([^']+)'", str(error))
    if missing and not conf_files.is_group(missing[1]):
        within_a_dict = rf"full_key: ({re.escape(missing[1])}\.\S+)"
        within = re.search(within_a_dict, str(error.__cause__))
        return no_such_setting((within or missing)[1], overrides)
    return _unknown_choice(overrides) or _misfit(overrides) or " ".join(str(error).split())


def _raised_by_hydra(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError) and frame.f_globals["__name__"].partition(".")[0] in (
        "hydra",
        "omegaconf",
    )


def _misfit(overrides: Sequence[str]) -> str | None:
    known = known_settings(overrides)
    return next((line for line in (misfit(override, known) for override in overrides) if line), None)


def _unknown_choice(overrides: Sequence[str]) -> str | None:
    for override in overrides:
        group, _, value = override.partition("=")
        choices = conf_files.choices(group) if conf_files.is_group(group) else []
        if choices and "=" in override and not set(value.split(",")) <= set(choices):
            return no_such_choice(group, value)
    return None
