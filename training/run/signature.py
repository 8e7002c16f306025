"""Signed configurations: the stored settings of a run that reach out of its folder, and whether they are this user's.

A run that is resumed reads and writes what its config.yaml names. Where the folder is somebody else's, that is somebody
else's choice. So config.yaml carries a signature of those settings, made with a key that every user has outside of all
runs: it is there after a run was moved or copied, and nobody else can make it.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.atomic_io import make_folder, read_regular
from common.errors import UserError
from common.invocation import quoted
from common.overrides import format_override
from training.run.changes import is_place
from training.run.config import Run, dump, flatten_config

KEY_BYTES = 32
WRITTEN_TO = ("checkpoints", "failures", "tensorboard", "wandb")  # folders within a run's
log = logging.getLogger("headroom")


def external_settings(run: Run) -> dict[str, Any]:
    """The settings that decide what is read, written or sent outside of the run's folder."""
    settings = flatten_config(dump(run))
    settings.pop("tokenizer.path", None)  # is read from the run's own folder
    online = settings.get("logger.mode") == "online"
    return {
        key: value
        for key, value in settings.items()
        if is_place(key) or key in ("cache_dir", "init_from") or (online and key in ("logger.project", "logger.mode"))
    }


def signature(run: Run) -> str | None:
    """Sign `external_settings` with this user's key; None where there is no key, and none can be made."""
    key = _key()
    content = json.dumps(external_settings(run), sort_keys=True).encode()
    return hmac.new(key, content, hashlib.sha256).hexdigest() if key else None


def check_foreign(
    folder: Path, stored: Run, run: Run, signed: Any, agreed: Collection[str], usual: Mapping[str, Any]
) -> None:
    """Raise UserError where settings of a run to resume reach out of its folder and are not this user's: neither
    `signed`, nor agreed to, nor what a new run would have too.

    stored: as its config.yaml says. run: with what was typed. agreed: keys that need no signature, such as those of the
    command line. usual: the composed settings. Links in place of the folders that
    it writes to reach out, too.
    """
    settings = external_settings(run)
    usual_places = {"cache_dir": usual["cache_dir"], "tokenizer.folder": f"{usual['cache_dir']}/tokenizers"}
    foreign = {
        key: value
        for key, value in settings.items()
        if value is not None and value != usual_places.get(key) and not any(_covers(given, key) for given in agreed)
    }
    places = [folder / name for name in WRITTEN_TO]
    links = [path for place in places for path in (place, *place.glob("*")) if os.path.islink(path)]
    if not foreign and not links:
        return
    mine = signature(stored)
    if mine is not None and _is_signature(signed) and hmac.compare_digest(mine, signed):
        return
    if links:
        raise UserError(
            f"{folder}/config.yaml is not signed by this user, and {links[0]} is a link, where the run would "
            "write and remove: put a folder in its place"
        )
    if "init_from" in foreign:
        raise UserError(
            f"{folder}/config.yaml is not signed by this user, has no checkpoint, and begins with the weights of "
            f"{foreign['init_from']}: begin a run of your own with init_from="
        )
    lasting = " (there is no key: set XDG_STATE_HOME to a folder that lasts, to be asked once)" if mine is None else ""
    raise UserError(
        f"{folder}/config.yaml is not signed by this user{lasting} and reaches out of the run's folder: repeat what "
        f"you agree to: {' '.join(_shell_word(key, value) for key, value in foreign.items())}"
    )


def _is_signature(signed: Any) -> bool:
    return isinstance(signed, str) and re.fullmatch("[0-9a-f]{64}", signed) is not None


def _covers(given: str, key: str) -> bool:
    """Whether an override of `given` decides `key`. Of the logger, one setting that is typed decides all."""
    return key == given or key.startswith(f"{given}.") or given.split(".")[0] == key.split(".")[0] == "logger"


def _shell_word(key: str, value: Any) -> str:
    """Format an override for a shell."""
    group = "logger=wandb " if key == "logger.mode" else ""
    return group + quoted(format_override(key, str(value)))


def _key() -> bytes | None:
    """Read this user's key, made where there is none yet; None where it can neither be read nor made."""
    with suppress(OSError, ValueError, RuntimeError):  # no home, or one that cannot be written
        path = _key_file()
        try:
            found = read_regular(path, 2 * KEY_BYTES)
        except FileNotFoundError:
            _write_key(path)
            found = read_regular(path, 2 * KEY_BYTES)
        key = bytes.fromhex(found.decode())
        return key if len(key) == KEY_BYTES else None
    return None


def _key_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "headroom" / "key"


def _write_key(path: Path) -> None:
    """Write a new key, whole or not at all, and never over one that another process has made meanwhile."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_hex(KEY_BYTES).encode())
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
