"""Leaves one part out of a recipe at a time, and measures what validation loss it costs, over several seeds.

python -m benchmarks.recipe                                   # experiment=fast at size (i), three seeds
python -m benchmarks.recipe --base experiment=fast optim.lr=0.02 --seeds 0 1 --json recipe.json
python -m benchmarks.recipe --base experiment=fast --rows '' 'optim=adamw' 'optim.muon_lr=0.01'

All rows train on the same tokens of the default corpus for the same number of steps; what a step of each costs is in
the table, as CPU time, so that a part can be judged by both. A row is what is added to the base on the command line. It
takes half an hour.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import check_no_repeats, count, output, report
from benchmarks.train import check_not_shared
from common.cli import Parser, number, one_line_errors
from data.batches import evaluation_batches
from data.shards.prepare import Prepared, prepare
from runtime.allocator import keep_buffers
from training.evaluate import evaluate
from training.run.composer import merged
from training.run.config import Run, compose
from training.session import training_batches
from training.state import TrainState
from training.step import train_step

SIZE_I = ("model.n_layers=4", "model.n_heads=4", "model.d_model=128", "model.context_length=64", "batch_tokens=768")
LEFT_OUT = (
    "",
    "optim=adamw",
    "optim.per_head=false",
    "optim.lr=0.0039",
    "optim.momentum_warmup=0",
    "optim.weight_decay=0",
    "mlp=swiglu",
    "mlp=gelu",
    "model.zero_init=false",
    "model.logit_softcap=15",
    "model.tie_embeddings=false",
    "attention.qk_norm=false",
    "attention.qk_bias=false",
    "position=learned",
    "schedule=linear schedule.final_fraction=0",
    "schedule=wsd",
)


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=["experiment=fast"], help="overrides of every row")
    parser.add_argument("--rows", nargs="+", default=LEFT_OUT, help="overrides that one row adds, in one word each")
    parser.add_argument("--size", nargs="+", default=SIZE_I, help="overrides that set the size")
    parser.add_argument("--steps", type=count, default=500)
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--val-tokens", type=count, default=65536, help="of the validation set, scored at the end")
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    keep_buffers()
    base = [*args.size, *args.base, f"steps={args.steps}"]
    check_no_repeats(args.seeds, "--seeds")
    check_no_repeats([" ".join(added.split()) for added in args.rows], "--rows")
    for added in args.rows:
        check_not_shared(f"{' '.join(args.base)} {added}".split(), "recipe")
        compose(*merged(*base, *added.split()))  # whatever is wrong with one is said before any of them trains
    rows: list[dict[str, Any]] = []
    for added in args.rows:
        rows.append(_row(base, added, args.seeds, args.val_tokens, rows[0]["nats"] if rows else None))
        print(_line(rows[-1]), flush=True)
    report(f"{' '.join(base)}, nats per token on {args.val_tokens} tokens", rows, args.json)


def _row(base: list[str], added: str, seeds: list[int], val_tokens: int, first: float | None) -> dict[str, Any]:
    losses, own = [], []
    for seed in seeds:
        run = compose(*merged(*base, *added.split()), f"seed={seed}", "precision=bf16")
        corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
        loss, seconds = _trained(run, corpus, val_tokens)
        losses.append(loss)
        own.append(seconds)
    mean = statistics.mean(losses)
    return {
        "added": added or "(the recipe)",
        "nats": round(mean, 4),
        "+-": round(statistics.stdev(losses), 4) if len(losses) > 1 else "",
        "than first": round(mean - (mean if first is None else first), 4),
        "seeds": " ".join(f"{loss:.4f}" for loss in losses),
        "CPU ms a step": round(1e3 * statistics.median(own), 1),
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['added']}: {row['nats']:.4f} nats, {row['than first']:+.4f} than the first (by seed {row['seeds']}), "
        f"{row['CPU ms a step']} ms of CPU time a step"
    )


def _trained(run: Run, corpus: Prepared, val_tokens: int) -> tuple[float, float]:
    """The validation loss after the run's steps, and the median CPU seconds of a step."""
    cpu = torch.device("cpu")
    state = TrainState.create(run, corpus.tokenizer.vocab_size, cpu)
    by_step = training_batches(run, corpus)
    seconds = []
    for step in range(run.steps):
        batches = by_step.of_step(step, cpu)
        before = time.process_time()
        train_step(state, batches, run.lr_factor(step))
        seconds.append(time.process_time() - before)
    state.precision.copy_master_weights()
    byte_lengths = torch.from_numpy(corpus.tokenizer.byte_lengths)
    start = run.document_start(corpus.tokenizer)
    batches = evaluation_batches(corpus.val, run.model.context_length, 64, slice(0, val_tokens), start)
    score = evaluate(state.precision.model, batches, byte_lengths, losses=state.losses.token_losses)
    return score.loss, statistics.median(seconds)


if __name__ == "__main__":
    with one_line_errors():
        main()
