"""The command line's side of the border: one line for a user's mistake, whoever notices it. Imports nothing heavy."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from data.errors import UserError
from model.config import Unsupported


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError, a kernel that does not run here, or a complaint of Hydra's about what was typed, into one line
    on stderr and exit code 2. Anything else is a fault of the program and keeps its traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would otherwise print over several lines
    try:
        yield
    except (UserError, Unsupported) as error:
        fail(str(error))
    except Exception as error:
        line = _hydra_complaint(error)
        if line is None:
            raise
        fail(line)


def plain_tree(cfg: Any) -> dict[str, Any]:
    """A composed Hydra configuration as plain values. Raises UserError for one that is incomplete."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give it a value, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None


def fail(line: str) -> NoReturn:
    """One line on stderr, and exit code 2."""
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(2)


def _hydra_complaint(error: Exception) -> str | None:
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, and quote a value that holds spaces, commas or ="
    if isinstance(error, ConfigCompositionException):
        unknown = re.search(r"Could not (?:override|append|delete) '([^']+)'", str(error))
        return f"{unknown[1]}: no such setting; python train.py --help lists them" if unknown else str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error)
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return "a group was set to null: give it one of its choices; python train.py --help lists them"
    return None
