"""JSON objects in files that others wrote."""

from pathlib import Path
from typing import Any

from common.atomic_io import read_regular
from common.checksummed_json import parse_object
from common.errors import UserError, reason


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The object in a file of so many bytes at most. Raises FileNotFoundError, and UserError where it cannot be read or
    holds something else."""
    try:
        return parse_object(read_regular(path, limit).decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
