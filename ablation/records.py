"""What a run recorded of itself: its settings, its metrics, its machine, what became of it. Only costs in closed form
are computed besides."""

import os
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ablation.outcome import METRICS, Outcome, final_row, outcome_of_rows
from common import plain_yaml
from common.atomic_io import exists, read_regular
from common.errors import UserError, reason
from common.paths import entering
from data.tokenizers.base import Tokenizer
from model import cost
from model.transformer import TransformerLM
from training.metrics_file import MetricRow, read_metrics
from training.run import checkpoint
from training.run.config import Run, dump, flatten_config
from training.run.folder import MAX_CONFIG_BYTES, check_is_run, read_config, read_tokenizer

# Settings that make no other experiment: where files are, what is written, how often, and what is only looked at.
NOT_COMPARED = ("run_dir", "cache_dir", "logger", "save_every", "keep_last", "sample_every", "sample_prompt")
NOT_COMPARED += ("eval_every", "eval_before", "eval_tokens", "log_attention", "profile_steps", "dry_run", "peak_flops")
NOT_COMPARED += ("parallel",)
PLACES = ("data.path", "tokenizer.path", "tokenizer.folder")
MIN_INTERVALS = 10  # of training, that tell how evenly a run went


@dataclass(frozen=True)
class Record:
    """One run, as it is in its folder."""

    folder: Path
    run: Run
    rows: list[MetricRow]
    damaged_rows: int  # lines of metrics.jsonl that are no rows
    outcome: Outcome
    environment: dict[str, Any]
    tokenizer: Tokenizer
    corpus: str | None  # its fingerprint; None where no checkpoint is left that says it

    @property
    def final(self) -> MetricRow | None:
        return final_row(self.run, self.rows)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What makes this run another than the ones it is compared with, as group.key; the seed is left out."""
        flat = flatten_config(dump(self.run))
        return {key: value for key, value in flat.items() if _is_compared(key)}

    @cached_property
    def model(self) -> TransformerLM:
        """On the meta device."""
        return cost.on_meta(self.run.model, self.tokenizer.vocab_size)

    @property
    def parameters(self) -> dict[str, int]:
        return cost.parameters(self.model)

    @property
    def seconds(self) -> list[float]:
        """Of training, up to each row: from the tokens per second that the rows hold."""
        total, before, found = 0.0, 0, []
        for row in self.rows:
            speed, tokens = row.get("tokens_per_second"), row.get("tokens") or 0
            total += (tokens - before) / speed if speed else 0.0
            before = tokens
            found.append(total)
        return found

    @property
    def slowdown(self) -> float | None:
        """The 90th percentile of the seconds of a step, by their median: near 1 on a machine that does nothing else.
        None where too few intervals were timed to tell."""
        speeds = [row["tokens_per_second"] for row in self.rows if row.get("tokens_per_second")]
        if len(set(speeds)) < MIN_INTERVALS:  # the steps of an interval share its speed
            return None
        return statistics.median(speeds) / statistics.quantiles(speeds, n=10)[0]

    @property
    def flops_per_token(self) -> float:
        """Of training, as the run counted them."""
        last = next((row for row in reversed(self.rows) if row.get("tokens_per_second")), None)
        if last is None or not last.get("flops_per_second"):
            return cost.flops(self.run.model, self.tokenizer.vocab_size).training()
        return last["flops_per_second"] / last["tokens_per_second"]

    @property
    def memory_bytes(self) -> float | None:
        return max((row["memory_bytes"] for row in self.rows if row.get("memory_bytes")), default=None)


def _is_compared(key: str) -> bool:
    return key != "seed" and key.partition(".")[0] not in NOT_COMPARED and key not in PLACES


def read_record(folder: Path, recorded: str | None = None) -> Record:
    """recorded: how the process of a sweep's cell ended that did not finish. Raises UserError for what is no run, or
    whose files cannot be read."""
    check_is_run(folder)
    tree, _ = read_config(folder)
    run = Run.from_tree(tree)
    rows = read_metrics(folder / METRICS)
    return Record(
        folder=folder,
        run=run,
        rows=rows,
        damaged_rows=max(0, _lines(folder / METRICS) - len(rows)),
        outcome=outcome_of_rows(run, rows, recorded),
        environment=_environment(folder / "environment.yaml"),
        tokenizer=read_tokenizer(folder),
        corpus=_corpus(folder),
    )


def _lines(path: Path) -> int:
    try:
        with entering(path.parent):
            if not exists(path):
                return 0
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def _environment(path: Path) -> dict[str, Any]:
    """Versions and machine; {} where that file is lost: nothing is computed from it."""
    try:
        found = plain_yaml.parse(read_regular(path, MAX_CONFIG_BYTES).decode())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _corpus(folder: Path) -> str | None:
    """The fingerprint of the corpus, by the newest checkpoint."""
    try:
        found = checkpoint.newest(folder, ())
    except UserError:  # a damaged checkpoint is the business of who resumes the run
        return None
    return None if found is None else found.manifest.corpus


def short_name(folder: Path) -> str:
    return folder.resolve().name or os.fspath(folder)
