"""Weights & Biases logger."""

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from common.atomic_io import exists, read_regular, write_atomic
from common.errors import UserError
from common.invocation import check_package, installed
from training.loggers.base import FaultTolerantSink, Logger, MetricSink, known

log = logging.getLogger("headroom")
MAX_WAIT_SECONDS = 30.0  # for a server that does not answer
MAX_ID_LENGTH = 200  # characters


class WandbLogger(Logger):
    """Logs to Weights & Biases, offline by default. The mode is always passed and a login looked for before, so that it
    never prompts. Failures never stop training."""

    project: str = "headroom"
    mode: Literal["online", "offline", "disabled"] = "offline"

    def check_installed(self) -> None:
        if self.mode != "disabled":
            check_package("wandb", "logger=wandb")
        if self.mode == "online" and not _wandb_login():
            raise UserError(
                "logger.mode=online needs a login, and there is no WANDB_API_KEY and no netrc entry: "
                f"{installed('wandb', 'login')} makes one, logger.mode=offline needs none"
            )

    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        return FaultTolerantSink("wandb", lambda: self._start(folder, config))

    def _start(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        import wandb

        id_file = folder / "wandb-id.txt"
        if not exists(id_file):
            write_atomic(id_file, secrets.token_hex(4).encode())
        remote = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=folder,
            name=folder.name,
            # A resumed run continues the one it has there.
            id=read_regular(id_file, MAX_ID_LENGTH).decode().strip(),
            resume="allow",
            config=dict(config),
            reinit="create_new",  # one process may train several runs, which must not merge
            settings=wandb.Settings(silent=True, init_timeout=MAX_WAIT_SECONDS),
        )
        if self.mode == "offline":
            root = Path(remote.dir).parent.parent  # a folder for each process that trained the run, of one id
            parts = len(list(root.glob("offline-run-*")))
            several = f"; its {parts} parts become one run there, in the order of their times" if parts > 1 else ""
            log.info(f"logger=wandb is offline; to upload the run: {installed('wandb', 'sync', str(root))}{several}")
        return WandbSink(remote)


def _wandb_login() -> bool:
    """Whether there are credentials where wandb looks for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    servers = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, RuntimeError, netrc.NetrcParseError):
            found = netrc.netrc(path.expanduser())
            if any(found.authenticators(urlsplit(server).netloc) for server in servers):
                return True
    return False


class WandbSink(MetricSink):
    """Logs the rows to a run of Weights & Biases."""

    def __init__(self, remote: Any):
        self.remote = remote

    def write(self, row: Mapping[str, Any]) -> None:
        self.remote.log(known(row), step=row["step"])

    def close(self) -> None:
        self.remote.finish()
