"""Validation loss over training time: recipes of ours, and nanoGPT's as its users run it, on the characters of a text.

python -m benchmarks.quality --text input.txt --nanogpt ../nanoGPT --seconds 600 --seeds 0 1 2 --target 1.4697
python -m benchmarks.quality --text input.txt --ours "" "experiment=fast optim.lr=3e-3" --size i --seconds 75

The text is cut as nanoGPT cuts it: the first nine tenths to train on, in a vocabulary of its characters. Both sides are
scored alike: on the validation part, or the first --val-tokens of it, in windows that do not overlap, in the precision
they train in. Evaluation is not on the clock, on either side; nor is making a model, nor a few steps of another one, by
which the number of steps is chosen that fills the seconds, so that a schedule ends with them. A run ends after so many
steps, whenever that is: `s` says when. What disturbs a run makes it late, not worse; with --clock cpu the clock shows
the CPU time of this process, which on a busy machine is fairer. Recipes take turns, a seed each.

nanoGPT trains as its train.py does: lr 1e-3, --warmup steps of warmup, a cosine to a tenth of it, AdamW with betas 0.9
and 0.99, decay 0.1, gradients clipped to 1, no dropout, bfloat16 by autocast, windows drawn at random places. The
allocator that training tunes for ours is tuned for it too, unless --untuned.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.nanogpt import autocast_step, nanogpt_of
from benchmarks.side_by_side import Meter, Reading, check_no_repeats, checkout, count, marked, output, report, settle
from benchmarks.train import SIZES, Size, check_not_shared, run_of
from common.cli import Parser, number, one_line_errors
from common.console import to_stderr
from common.errors import UserError, reason
from common.figures import check_writable, legend, new_figure, save
from data.batches import TrainingBatches, check_split_lengths, count_windows, evaluation_batches, read_windows
from runtime.allocator import keep_buffers
from runtime.device import choose_device
from training.evaluate import evaluate
from training.state import TrainState
from training.step import train_step

NANOGPT = "nanoGPT"
WARM, TIMED = 3, 9  # steps before the clock starts: to warm up, and to estimate a step by
BRIEFEST = 0.01  # seconds
UNKNOWN = 10**6  # steps, of a schedule before there is an estimate
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Characters(NamedTuple):
    """A text as numbers of its characters; read as the streams are that training reads."""

    tokens: np.ndarray  # (n,) int64
    counted: None = None  # all are

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def read_each(self, starts: Iterable[int], count: int) -> Iterator[np.ndarray]:
        return (self.read(start, count) for start in starts)


class Text(NamedTuple):
    train: Characters
    val: Characters
    vocab: int


class Candidate(NamedTuple):
    """One run, about to begin."""

    step: Callable[[int], None]  # trains on the batch of that number
    score: Callable[[], float]  # nats per token of the validation text


class Mark(NamedTuple):
    due: float  # seconds
    seconds: float  # on the clock when it was
    step: int
    loss: float


class Curve(NamedTuple):
    marks: list[Mark]
    reading: Reading  # of all that it took, evaluation too


Recipe = Callable[[int, int], Candidate]  # seed and steps ->


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a file of text")
    parser.add_argument("--size", choices=SIZES, default="ii")
    parser.add_argument("--ours", nargs="*", default=[""], help="each the overrides of a recipe; '' is the default one")
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of nanoGPT: its model.py is imported")
    parser.add_argument("--lr", type=number(float, 1e-12), default=1e-3, help="nanoGPT's")
    parser.add_argument("--warmup", type=number(int, 0), default=100, help="nanoGPT's, in steps")
    parser.add_argument("--seconds", type=number(float, BRIEFEST), default=60.0, help="of training, for each run")
    parser.add_argument(
        "--marks", type=number(float, BRIEFEST), nargs="+", help="seconds at which to score; unset: ten, evenly"
    )
    parser.add_argument("--val-tokens", type=count, help="of the validation text; unset: all")
    parser.add_argument("--target", type=number(float, 0), help="a loss: when was it reached?")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--untuned", action="store_true", help="leave the allocator as it comes")
    parser.add_argument("--json", type=output, help="write the table there")
    parser.add_argument("--picture", type=Path, help="draw the curves there (.png, .svg or .pdf)")
    with one_line_errors():
        compare(parser.parse_args())


def compare(args: argparse.Namespace) -> None:
    if args.picture:
        check_writable(args.picture, "--picture")
    check_no_repeats(args.seeds, "--seeds")
    check_no_repeats([" ".join(overrides.split()) for overrides in args.ours], "--ours")
    check_not_shared(" ".join(args.ours).split(), "--ours")
    text, size = read(args.text), SIZES[args.size]
    runs = [run_of(size, *overrides.split()) for overrides in args.ours]  # which refuses what is wrong with one
    for length in ([size.tokens] if args.nanogpt else []) + [run.model.context_length for run in runs]:
        check_split_lengths(text, length)
        if args.val_tokens is not None and args.val_tokens < length:
            raise UserError(
                f"--val-tokens {args.val_tokens} holds no window of {length} tokens: give at least {length}"
            )
    to_stderr()
    if not args.untuned:
        keep_buffers()
    curves = measured(args, text, sorted(args.marks or [args.seconds * tenth / 10 for tenth in range(1, 11)]))
    title = f"validation loss over seconds on the {args.clock} clock, {args.precision}, size {SIZES[args.size]}"
    report(title, rows_of(curves, args.target), args.json)
    if args.picture:
        draw(curves, args.picture, args.target)
        print(args.picture)


def measured(args: argparse.Namespace, text: Text, marks: Sequence[float]) -> dict[str, list[Curve]]:
    """By recipe, a curve for each seed."""
    device = choose_device(args.device)
    size = SIZES[args.size]._replace(vocab=text.vocab)
    recipes: dict[str, Recipe] = {
        f"ours {overrides}".strip(): _ours(args, size, overrides.split(), text, device) for overrides in args.ours
    }
    if args.nanogpt:
        recipes[NANOGPT] = _nanogpt(args, size, text, device)
    clock, curves = CLOCKS[args.clock], {name: [] for name in recipes}
    for seed in args.seeds:
        for name, recipe in recipes.items():
            steps = max(1, round(args.seconds / _seconds_per_step(recipe(seed, UNKNOWN), clock)))
            candidate, meter = recipe(seed, steps), Meter()
            found = list(_trained(candidate, steps, args.seconds, marks, clock))
            curves[name].append(Curve(found, meter.read()))
            last = found[-1]
            print(f"{name}, seed {seed}: {last.loss:.4f} after {last.step} steps, {last.seconds:.0f} s", flush=True)
    return curves


def read(path: Path) -> Text:
    """Raises UserError for what is no file of text."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = np.array([number[character] for character in text])
    split = int(0.9 * len(tokens))
    return Text(Characters(tokens[:split]), Characters(tokens[split:]), len(characters))


def rows_of(curves: dict[str, list[Curve]], target: float | None) -> list[dict[str, Any]]:
    """A row for each recipe and mark: means over the seeds, and the standard deviation of the losses. When the target
    was reached is given for each seed, as the first mark at which the loss was no higher."""
    rows = []
    for name, of in curves.items():
        for marks in _by_mark(of):
            losses = [mark.loss for mark in marks]
            row = {
                "recipe": name,
                "due": marks[0].due,
                "s": statistics.fmean(mark.seconds for mark in marks),
                "step": round(statistics.fmean(mark.step for mark in marks)),
                "loss": round(statistics.fmean(losses), 4),
                "+-": round(statistics.stdev(losses), 4) if len(losses) > 1 else 0.0,
                "seeds": len(losses),
            }
            if target:
                row[f"s to {target}"] = " ".join(_reached(curve, target) for curve in of)
            rows.append(row | {"others": marked(max((curve.reading for curve in of), key=lambda each: each.others))})
    return rows


def draw(curves: dict[str, list[Curve]], path: Path, target: float | None) -> None:
    """A line for each recipe, the mean over its seeds, in a band from the best to the worst of them."""
    figure, axes = new_figure(7, 4)
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats per character)")
    lines = {}
    for i, (name, of) in enumerate(curves.items()):
        columns = _by_mark(of)
        seconds = [statistics.fmean(mark.seconds for mark in marks) for marks in columns]
        losses = [[mark.loss for mark in marks] for marks in columns]
        means = [statistics.fmean(each) for each in losses]
        (lines[name],) = axes.plot(seconds, means, "o-", color=f"C{i}", markersize=3)
        axes.fill_between(seconds, [*map(min, losses)], [*map(max, losses)], color=f"C{i}", alpha=0.2, linewidth=0)
    if target:
        lines[f"{target}"] = axes.axhline(target, color="gray", linewidth=0.8, linestyle="--")
    legend(axes, lines)
    save(figure, path)


def _trained(
    candidate: Candidate, steps: int, seconds: float, marks: Sequence[float], clock: Callable[[], float]
) -> Iterator[Mark]:
    """Scores after the first step that ends at each of `marks` or later, and after the last one."""
    ahead, spent = [mark for mark in marks if mark < seconds], 0.0
    for step in range(steps):
        start = _settled(clock)
        candidate.step(step)
        spent += _settled(clock) - start
        passed = [seconds] if step + 1 == steps else [mark for mark in ahead if mark <= spent]
        ahead = ahead[len(passed) :]
        loss = candidate.score() if passed else math.nan
        yield from (Mark(due, spent, step + 1, loss) for due in passed)


def _seconds_per_step(candidate: Candidate, clock: Callable[[], float]) -> float:
    seconds = []
    for step in range(WARM + TIMED):
        start = _settled(clock)
        candidate.step(step)
        seconds.append(_settled(clock) - start)
    return statistics.median(seconds[WARM:])


def _settled(clock: Callable[[], float]) -> float:
    settle()
    return clock()


def _ours(args: argparse.Namespace, size: Size, overrides: list[str], text: Text, device: torch.device) -> Recipe:
    def begin(seed: int, steps: int) -> Candidate:
        run = run_of(size, *overrides, f"steps={steps}", f"seed={seed}", f"precision={args.precision}")
        length, micro = run.model.context_length, run.micro_batch_size
        state = TrainState.create(run, size.vocab, device)
        by_step = TrainingBatches(text.train, length, seed, run.sequences, micro)

        def step(number: int) -> None:
            batches = by_step.of_step(number, device)
            train_step(state, batches, run.lr_factor(number))

        def score() -> float:
            state.precision.copy_master_weights()
            some = evaluation_batches(text.val, length, micro, slice(args.val_tokens))
            return evaluate(state.precision.model, some, torch.ones(size.vocab), losses=state.losses.token_losses).loss

        return Candidate(step, score)

    return begin


def _nanogpt(args: argparse.Namespace, size: Size, text: Text, device: torch.device) -> Recipe:
    def begin(seed: int, steps: int) -> Candidate:
        torch.manual_seed(seed)
        model, optimizer = nanogpt_of(args.nanogpt, device, size.shape, lr=args.lr)
        update = autocast_step(model, optimizer, lambda *batch: model(*batch)[1], device, args.precision)
        length = size.tokens
        chosen = count_windows(text.val, length) if args.val_tokens is None else args.val_tokens // length

        def step(number: int) -> None:
            starts = torch.randint(len(text.train) - length, (size.batch,)).tolist()
            rows = torch.from_numpy(np.stack([text.train.read(start, length + 1) for start in starts])).to(device)
            for group in optimizer.param_groups:
                group["lr"] = nanogpt_lr(number, args.lr, args.warmup, steps)
            update(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

        @torch.no_grad()
        def score() -> float:
            nats = 0.0
            for first in range(0, chosen, size.batch):
                some = list(range(first, min(first + size.batch, chosen)))
                inputs, targets = read_windows(text.val, length, some)[:2]
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    mean = model(inputs.to(device).contiguous(), targets.to(device).contiguous())[1]
                nats += mean.item() * len(inputs)
            return nats / chosen

        return Candidate(step, score)

    return begin


def nanogpt_lr(step: int, peak: float, warmup: int, steps: int) -> float:
    """Of its train.py: linear to the peak, then a cosine to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def _by_mark(of: Sequence[Curve]) -> list[list[Mark]]:
    """The marks of all seeds by when they were due; a run that was over before has none."""
    due = sorted({mark.due for curve in of for mark in curve.marks})
    return [[mark for curve in of for mark in curve.marks if mark.due == each] for each in due]


def _reached(curve: Curve, target: float) -> str:
    return next((f"{mark.seconds:.0f}" for mark in curve.marks if mark.loss <= target), "never")


if __name__ == "__main__":
    main()
