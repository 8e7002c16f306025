"""The losses of a run over its training, thinned for pictures."""

import math
import statistics
from collections.abc import Sequence

from ablation.records import Record
from ablation.results import Curve
from training.metrics_file import MetricRow

MAX_POINTS = 250


def curve_of(record: Record, seed: int) -> Curve:
    """Training losses are means over equally long stretches of steps, each at its last step: a mean that lags behind
    would favour whoever fell early."""
    seconds = record.seconds
    places = [i for i, row in enumerate(record.rows) if row["step"]]
    size = max(1, math.ceil(len(places) / MAX_POINTS))
    stretches = [places[i : i + size] for i in range(0, len(places), size)]
    ends = [stretch[-1] for stretch in stretches]
    scored = [i for i, row in enumerate(record.rows) if row.get("val_loss") is not None]
    rows, flops = record.rows, record.flops_per_token

    def tokens(i: int) -> int:
        return rows[i].get("tokens") or rows[i]["step"] * record.run.batch_tokens

    return Curve(
        seed=seed,
        run=str(record.folder),
        step=[rows[i]["step"] for i in ends],
        tokens=[tokens(i) for i in ends],
        seconds=[seconds[i] for i in ends],
        flops=[tokens(i) * flops for i in ends],
        train_loss=[_mean([rows[i] for i in stretch], "train_loss") for stretch in stretches],
        train_bpb=[_mean([rows[i] for i in stretch], "train_bpb") for stretch in stretches],
        val_step=[rows[i]["step"] for i in scored],
        val_tokens=[tokens(i) for i in scored],
        val_seconds=[seconds[i] for i in scored],
        val_flops=[tokens(i) * flops for i in scored],
        val_loss=[rows[i]["val_loss"] for i in scored],
        val_bpb=[rows[i].get("val_bpb") for i in scored],
    )


def _mean(rows: Sequence[MetricRow], key: str) -> float | None:
    known = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(known) if known else None
