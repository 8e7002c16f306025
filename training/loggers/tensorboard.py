"""TensorBoard logger."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.invocation import check_package
from training.loggers.base import FaultTolerantSink, Logger, MetricSink, known
from training.metrics_file import UNSCORED


class TensorboardLogger(Logger):
    """Writes TensorBoard event files into the run's folder. Failures never stop training."""

    def check_installed(self) -> None:
        check_package("tensorboard", "logger=tensorboard", "tensorboard")

    def open(self, folder: Path, config: Mapping[str, Any]) -> MetricSink:
        return FaultTolerantSink("tensorboard", lambda: TensorboardSink(folder / "tensorboard", config))


class TensorboardSink(MetricSink):
    """Writes scalars in groups with readable names, and the run's settings as text."""

    TAGS: ClassVar = {
        "tokens": "train/tokens",
        "train_loss": "train/loss",
        "train_bpb": "train/bits_per_byte",
        "val_loss": "validation/loss",
        "val_bpb": "validation/bits_per_byte",
        "val_accuracy": "validation/accuracy",
        "val_tokens": "validation/tokens",
        **{key: f"optim/{key}" for key in ("lr", "muon_lr", "bias_lr", "grad_norm", "skipped")},
        **{key: f"optim/{key}" for key in ("max_logit", "clipped_heads")},
        **{key: f"speed/{key}" for key in ("tokens_per_second", "flops_per_second", "mfu", "data_seconds")},
        "memory_bytes": "memory/bytes",
    }  # others, such as attention/layer_0/entropy, are in a group already

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(exist_ok=True)
        self.config = config
        self.open_writer = functools.partial(SummaryWriter, str(folder))
        self.writer: SummaryWriter | None = None  # opened at the first row, whose step it needs to know

    def write(self, row: Mapping[str, Any]) -> None:
        if self.writer is None:  # rows of an earlier process from this step on are recomputed
            self.writer = self.open_writer(purge_step=row["step"])
            lines = yaml.safe_dump(dict(self.config), sort_keys=False).splitlines()
            self.writer.add_text("config", "\n".join(f"    {line}" for line in lines), row["step"])  # Markdown's code
        for key, value in known(row).items():
            if key not in ("step", UNSCORED):
                self.writer.add_scalar(self.TAGS.get(key, key), float(value), row["step"])

    def sync(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
