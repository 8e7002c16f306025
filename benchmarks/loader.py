"""Times how training text comes from the disk: reading it on one thread, its order, and what a step waits for it.

python -m benchmarks.loader               # 2 GB of made-up shards in the temporary folder, removed afterwards
python -m benchmarks.loader --gigabytes 8 --folder /data --json loader.json
python -m benchmarks.loader model=mini    # the steps are those of another run

    reading   a step's tokens from shards, `announced` as TrainingBatches reads them, and `one by one`, each window when
              the one before it is there. Cold: of text that was never read, after the system dropped what it kept of
              the shards (MB says what came from the disk, whose own cache, or that of a virtual machine's host, is not
              known); warm: the same step again
    order     which windows a step reads, of so many: the first step of an epoch, and one in another section, beside
              all of the epoch sorted at once
    waiting   of the steps of a run, in turns of some steps each: batches read `when needed` and `a step ahead`, of the
              run's own text, and of made-up shards, cold

On a machine that others use a thread waits for a processor, too. How long, Linux tells (/proc/thread-self/schedstat),
and `alone` is the time without it: that of the processor and of the disk, which goes on meanwhile, so that of cold text
it is the least.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import Meter, count, marked, output, report
from common.cli import Parser, one_line_errors
from common.errors import UserError
from data import order
from data.batches import Batch, TrainingBatches, count_windows
from data.prefetch import Prefetch
from data.shards.prepare import prepare
from data.shards.token_files import Shard, ShardWriter, TokenStream, shard_paths
from runtime.memory import peak_memory
from runtime.precision import choose_precision
from training.run.config import Run, compose
from training.session import training_batches
from training.state import TrainState
from training.step import train_step

LENGTHS = (1024, 256)
STEP_TOKENS = 2**19
WINDOWS = 10**7  # of an epoch: ten billion tokens at 1,024
TURN = 20  # steps
BLOCK = 2**22  # tokens written at one time
CPU = torch.device("cpu")


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the run, as train.py takes them, as model=mini")
    parser.add_argument("--gigabytes", type=count, default=2, help="of made-up shards")
    parser.add_argument("--folder", type=Path, help="where to write them: the disk that is measured")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the tables there, the later ones beside it")
    args = parser.parse_args()
    if sys.platform != "linux":
        raise UserError("how much comes from the disk can be told and decided on Linux only")
    run = compose(*args.overrides)
    corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
    run = run.model_copy(update={"precision": choose_precision(run.precision, CPU)})
    state = TrainState.create(run, corpus.tokenizer.vocab_size, CPU)
    with made_up_shards(args.folder, args.gigabytes, corpus.tokenizer.vocab_size) as stream:
        rows = [row for length in LENGTHS for row in _reading(stream, length, args.rounds)]
        report("reading on one thread", rows, args.json)
        report("order", _ordering(), _beside(args.json, "order"))
        of_text = training_batches(run, corpus)
        texts = {"the run's": of_text, "made up, cold": replace(of_text, stream=stream)}
        rows = [row for name, batches in texts.items() for row in _waiting(name, batches, run, state, args.rounds)]
        report("waiting for batches", rows, _beside(args.json, "waiting"))


@contextmanager
def made_up_shards(folder: Path | None, gigabytes: int, vocab_size: int) -> Iterator[TokenStream]:
    """Shards of random tokens, of which the system keeps nothing in memory."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        writer = ShardWriter(Path(name), "train", np.uint16, "made up")
        for _ in range(gigabytes * 10**9 // (2 * BLOCK)):
            writer.write(draw.integers(0, min(vocab_size, 2**16), BLOCK, np.uint16))
        writer.close()
        stream = TokenStream([Shard(path) for path in shard_paths(Path(name), "train")])
        for shard in stream.shards:
            os.fsync(shard.file.fileno())  # what is not on the disk yet is not dropped
        _drop(stream)
        yield stream


def _reading(stream: TokenStream, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    batches = TrainingBatches(stream, length, 0, STEP_TOKENS // length, STEP_TOKENS // length)
    forms: dict[str, Callable[[int], Batch]] = {
        "one by one": lambda step: _one_by_one(batches, step),
        "announced": batches.read,
    }
    for step, read in enumerate(forms.values()):  # sorts the order, and warms up
        read(step)
    found: dict[tuple[str, str], list[tuple]] = {}
    for round_number in range(rounds):
        for form, read in forms.items():
            _drop(stream)
            for kept in ("cold", "warm"):
                before = _from_disk()
                meter, start = Meter(), _seconds_alone()
                read(2 + round_number)
                alone, (seconds, own, others) = _seconds_alone() - start, meter.read()
                found.setdefault((form, kept), []).append((seconds, alone, own, others, _from_disk() - before))
    for (form, kept), readings in found.items():
        seconds, alone, own, others, from_disk = map(statistics.median, zip(*readings, strict=True))
        yield {
            "context": length,
            "windows": form,
            "text": kept,
            "ms": 1e3 * seconds,
            "alone": 1e3 * alone,
            "CPU ms": 1e3 * own,
            "M tokens/s": STEP_TOKENS / seconds / 1e6,
            "alone M/s": STEP_TOKENS / alone / 1e6,
            "CPU M/s": STEP_TOKENS / own / 1e6,
            "MB": from_disk / 1e6,
            "others": f"{100 * others:.0f} %",
        }


def _one_by_one(batches: TrainingBatches, step: int) -> Batch:
    """What TrainingBatches reads, each window when the one before it is there."""
    n, length = count_windows(batches.stream, batches.length), batches.length
    chosen = order.windows_of(n, batches.seed, step * batches.sequences, batches.sequences)
    rows = np.stack([batches.stream.read(i * length, length + 1) for i in chosen]).astype(np.int64)
    return Batch.of(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]))


def _ordering() -> list[dict[str, Any]]:
    """In this order, since a process tells only the most memory that it ever took."""
    steps: dict[str, Callable[[], object]] = {
        "first step of an epoch": lambda: order.windows_of(WINDOWS, 1, 0, 512),
        "in another section": lambda: order.windows_of(WINDOWS, 1, WINDOWS // 2, 512),
        "the step after it": lambda: order.windows_of(WINDOWS, 1, WINDOWS // 2 + 512, 512),
        "all sorted at once": _sorted_at_once,
    }
    rows = []
    for name, work in steps.items():
        before = peak_memory(CPU)
        meter = Meter()
        work()
        reading = meter.read()
        more = (peak_memory(CPU) - before) / 1e6
        rows.append(
            {
                "what": name,
                "s": reading.seconds,
                "CPU s": reading.own,
                "MB more": more,
                "others": marked(reading),
            }
        )
    return rows


def _sorted_at_once() -> np.ndarray:
    key = order._mix(np.array([1], np.uint64))
    return order._mix(order._mix(key) ^ np.arange(WINDOWS, dtype=np.uint64)).argsort(kind="stable")


def _waiting(name: str, batches: TrainingBatches, run: Run, state: TrainState, rounds: int) -> Iterator[dict[str, Any]]:
    """Both forms go on with one state, each with steps that were not read before."""
    found: dict[str, list[tuple]] = {}
    first = 0
    for round_number in range(-1, rounds):  # the first one to warm up
        for form in ("when needed", "a step ahead"):
            with Prefetch(batches, CPU, first + TURN + 1) as prefetch:
                of_step = prefetch.of_step if form == "a step ahead" else lambda step: batches.of_step(step, CPU)
                train_step(state, of_step(first), run.lr_factor(0))  # which waits in both forms
                measured = _turn(of_step, first + 1, run, state)
            first += TURN + 1
            if round_number >= 0:
                found.setdefault(form, []).append(measured)
    for form, turns in found.items():
        waited, alone, seconds, own, others = map(statistics.median, zip(*turns, strict=True))
        yield {
            "text": name,
            "batches": form,
            "ms waiting": 1e3 * waited / TURN,
            "alone": 1e3 * alone / TURN,
            "ms a step": 1e3 * seconds / TURN,
            "CPU ms a step": 1e3 * own / TURN,
            "% waiting": statistics.median(100 * turn[0] / turn[2] for turn in turns),
            "others": f"{100 * others:.0f} %",
        }


def _turn(of_step: Callable[[int], list[Batch]], first: int, run: Run, state: TrainState) -> tuple[float, ...]:
    """Over TURN steps: seconds of waiting, those without waiting for a processor, of all, of CPU time; the share of
    others."""
    waited = 0.0
    alone = 0.0
    meter = Meter()
    for step in range(first, first + TURN):
        start_alone, start = _seconds_alone(), time.perf_counter()
        batches = of_step(step)
        waited += time.perf_counter() - start
        alone += _seconds_alone() - start_alone
        train_step(state, batches, run.lr_factor(0))
    return waited, alone, *meter.read()


def _drop(stream: TokenStream) -> None:
    """Have the system forget what it keeps of the shards."""
    for shard in stream.shards:
        os.posix_fadvise(shard.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds_alone() -> float:
    """A clock that stands still while this thread waits for a processor."""
    while True:
        queued, seconds = _queued(), time.perf_counter()
        if _queued() == queued:  # else the thread waited between the two
            return seconds - queued


def _queued() -> float:
    """Seconds that this thread has waited for a processor so far."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _from_disk() -> int:
    """Bytes that this process had the disk read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _beside(path: Path | None, what: str) -> Path | None:
    return path and path.with_stem(f"{path.stem}_{what}")


if __name__ == "__main__":
    with one_line_errors():
        main()
