"""Times training with several processes on this machine, on the CPU with a thread each: a step of DDP and of FSDP, in
turns in the same processes, so that what slows one slows the other.

python -m benchmarks.scale                                        # 1 and 2 processes, the models mini and tiny
python -m benchmarks.scale --models tiny small --processes 2 --rounds 9 --json benchmarks/results/scale_cpu.json

A step is that of training, on made-up tokens: the micro-batches of a process's share of the usual batch, clipping and
the update. `waiting` is the share of it within torch.distributed's collectives, by the clock of the first process: what
is sent, and the wait for a slower one. `x ddp` is the time relative to DDP's of the same round, the median of the
rounds and half the distance between their quartiles. `MB` is the most that PyTorch's allocator gave out in a process
from its start through two steps, the least of eight times, of the process that holds the most; `predicted` is what a
dry run says.
"""

import argparse
import functools
import gc
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.side_by_side import NOISY, Meter, check_no_repeats, count, output, report
from common.cli import Parser, one_line_errors
from common.conf_files import choices
from common.errors import UserError
from common.streams import print_stderr
from data.batches import Batch, micro_batch_of
from runtime.allocator import keep_buffers
from runtime.memory import allocated_peak
from runtime.world import ProcessGroup
from training.run.config import Run, compose
from training.run.processes import with_processes
from training.state import TrainState
from training.step import train_step
from training.step_memory import memory

PLANS = ("ddp", "fsdp")
LOOKS = 8  # at the memory; busy cores let gloo's threads hold what was sent for a moment longer
CPU = torch.device("cpu")
COLLECTIVES = (  # of torch.distributed, by their names in any version of it
    *("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "_all_gather_base", "_reduce_scatter_base"),
)


class Turn(NamedTuple):
    """Some steps of one plan, in one process."""

    seconds: float  # of a step
    waiting: float  # seconds of a step, within collectives
    cpu: float  # seconds of CPU time of a step
    others: float  # as in side_by_side.Timing, with the other processes of the run counted among them


class Found(NamedTuple):
    """What one process saw of one plan."""

    turns: list[Turn]
    peak: int  # bytes


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=choices("model"), default=["mini", "tiny"])
    parser.add_argument("--processes", type=count, nargs="+", default=[1, 2])
    parser.add_argument("--vocab", type=count, default=4096)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as train.py takes them")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--steps", type=count, default=3, help="steps of a turn")
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    check_no_repeats(args.processes, "--processes")
    check_no_repeats(args.models, "--models")
    cases = [(name, n, runs_of(name, n, args)) for name in args.models for n in args.processes]
    found = [in_processes(n, functools.partial(measured, runs=runs, args=args, what=name)) for name, n, runs in cases]
    rows = [
        row for (name, _, runs), of in zip(cases, found, strict=True) for row in rows_of(name, runs, of, args.vocab)
    ]
    report(f"processes that train together, {args.precision}, one thread each", rows, args.json)


def runs_of(name: str, processes: int, args: argparse.Namespace) -> dict[str, Run]:
    """The run of each plan. Raises UserError where so many processes cannot share it."""
    settings = (f"model={name}", f"precision={args.precision}", *args.set)
    return {plan: with_processes(compose(*settings, f"parallel={plan}"), processes, ()) for plan in PLANS}


def measured(world: ProcessGroup, *, runs: dict[str, Run], args: argparse.Namespace, what: str) -> dict[str, Found]:
    """What each process finds of each plan."""
    keep_buffers()
    steps, peaks = {}, {}
    for plan, run in runs.items():
        made: list[Callable[[], None]] = []
        looks = []
        for _ in range(LOOKS):
            made.clear()
            gc.collect()
            looks.append(allocated_peak(lambda run=run, made=made: made.append(_begun(run, args.vocab, world))))
        steps[plan], peaks[plan] = made[0], min(looks)
    turns: dict[str, list[Turn]] = {plan: [] for plan in runs}
    with timed_collectives() as within:
        for number in range(args.rounds):
            if world.is_first:
                print_stderr(f"{what}, {world.size} processes: round {number + 1} of {args.rounds}")
            for plan in list(runs)[:: 1 if number % 2 else -1]:  # neither is always the first
                turns[plan].append(_turn(steps[plan], args.steps, within))
    return {plan: Found(turns[plan], peaks[plan]) for plan in runs}


def _begun(run: Run, vocab: int, world: ProcessGroup) -> Callable[[], None]:
    """A state in training, two steps old -> a function that takes a step."""
    state = TrainState.create(run, vocab, CPU, world)
    share = run.sequences // world.size
    draw = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(vocab, (share, run.model.context_length + 1), generator=draw)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    batches = batch.split(micro_batch_of(share, run.micro_batch_size))

    def step() -> None:
        train_step(state, batches, 0.1)

    step()
    step()
    return step


def _turn(step: Callable[[], None], steps: int, within: list[float]) -> Turn:
    dist.barrier()
    within[0] = 0.0
    meter = Meter()
    for _ in range(steps):
        step()
    reading = meter.read()
    return Turn(reading.seconds / steps, within[0] / steps, reading.own / steps, reading.others)


@contextmanager
def timed_collectives() -> Iterator[list[float]]:
    """A context in which the seconds within torch.distributed's collectives are added to the one number it gives."""
    spent, inside = [0.0], [False]

    def timed(collective: Callable) -> Callable:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # one that is made of another
                return collective(*args, **kwargs)
            inside[0], start = True, time.perf_counter()
            try:
                return collective(*args, **kwargs)
            finally:
                inside[0] = False
                spent[0] += time.perf_counter() - start

        return call

    own = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name, collective in own.items():
        setattr(dist, name, timed(collective))
    try:
        yield spent
    finally:
        for name, collective in own.items():
            setattr(dist, name, collective)


def rows_of(name: str, runs: dict[str, Run], found: Sequence[dict[str, Found]], vocab: int) -> Iterator[dict[str, Any]]:
    """found: of each process, by rank."""
    for plan, run in runs.items():
        turns = found[0][plan].turns
        ratios = [turn.seconds / beside.seconds for turn, beside in zip(turns, found[0]["ddp"].turns, strict=True)]
        seconds = [turn.seconds for turn in turns]
        # Of the machine's time, what none of these processes took.
        others = statistics.median(turn.others for turn in turns) - _of_the_rest(found, plan)
        yield {
            "model": name,
            "processes": len(found),
            "plan": plan,
            "ms": 1e3 * statistics.median(seconds),
            "+-": 1e3 * _spread(seconds),
            "tokens/s": round(run.batch_tokens / statistics.median(seconds)),
            "waiting": f"{100 * statistics.median(turn.waiting / turn.seconds for turn in turns):.0f} %",
            "CPU ms": 1e3 * statistics.median(turn.cpu for turn in turns),
            "x ddp": statistics.median(ratios),
            "x ddp +-": _spread(ratios),
            "MB": max(of_rank[plan].peak for of_rank in found) / 1e6,
            "predicted": memory(run, vocab, CPU).peak / 1e6,
            "others": f"{100 * max(0.0, others):.0f} %" + (" !" if others > NOISY else ""),
        }


def _of_the_rest(found: Sequence[dict[str, Found]], plan: str) -> float:
    """The share of the machine's CPU time that the other processes of the run took, beside the first."""
    cores = multiprocessing.cpu_count()
    return sum(statistics.median(turn.cpu / turn.seconds for turn in of[plan].turns) for of in found[1:]) / cores


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def in_processes(n: int, function: Callable[[ProcessGroup], Any]) -> list[Any]:
    """Call function(world) in so many processes, forked -> what each returns, by rank. Raises UserError where one of
    them fails, whose traceback goes to stderr."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        started = [
            context.Process(target=_in_process, args=(rank, n, store, function, pipes[rank][1])) for rank in range(n)
        ]
        for process in started:
            process.start()
        try:
            return _answers([receiving for receiving, _ in pipes], started)
        finally:
            for process in started:
                process.terminate()
                process.join()


def _answers(receiving: list[Connection], started: list[BaseProcess]) -> list[Any]:
    """As they come, for where one has failed the others wait for it."""
    answers: dict[int, Any] = {}
    while missing := [rank for rank in range(len(started)) if rank not in answers]:
        wait([receiving[rank] for rank in missing] + [started[rank].sentinel for rank in missing])
        for rank in missing:
            ended = not started[rank].is_alive()  # before its answer is looked for
            if receiving[rank].poll():
                answers[rank] = receiving[rank].recv()
            elif ended:
                raise UserError(f"rank {rank} ended before it had measured: was there enough memory?")
            if isinstance(answers.get(rank), str):
                raise UserError(f"rank {rank} failed: {answers[rank]}")
    return [answers[rank] for rank in range(len(started))]


def _in_process(rank: int, n: int, store: Path, function: Callable, result: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("cpu:gloo", store=dist.FileStore(str(store), n), rank=rank, world_size=n)
        result.send(function(ProcessGroup()))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        result.send(str(error).partition("\n")[0])


if __name__ == "__main__":
    with one_line_errors():
        main()
