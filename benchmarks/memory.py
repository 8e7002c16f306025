"""Measures the peak memory of training one layer as the text grows, forward and backward, and what a chunked loss and
activation checkpointing save at GPT-2's vocabulary. On a CPU, whose allocator is asked for every block.

python -m benchmarks.memory                               # 1k to 32k tokens; ten minutes on one thread
python -m benchmarks.memory --tokens 1024 2048 4096 --precision bf16 --json benchmarks/results/memory.json
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import count, output, report
from common.cli import Parser, one_line_errors
from data.batches import Batch
from model.loss import token_losses
from model.placement import Placement
from runtime.memory import allocated_peak
from training.losses import mean_loss
from training.run.config import compose
from training.state import TrainState

VOCAB, GPT2_VOCAB = 256, 50_257
DOCUMENT = 500  # tokens from one separator to the next
PATHS = {  # what is trained, and with which settings: attention, its settings, documents kept apart
    "mha": ("mha", {}, False),
    "gqa": ("gqa", {}, False),
    "mla": ("mla", {}, False),
    "window 256": ("mha", {"window": 256}, False),
    "documents, mha": ("mha", {}, True),
    "documents, gqa": ("gqa", {}, True),
    "documents, mla": ("mla", {}, True),
}


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=count, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--only", nargs="+", choices=(*PATHS, "savings"), default=[*PATHS, "savings"])
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--d-model", type=count, default=64)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for precision in args.precision:
        for name in args.only:
            if name != "savings":
                rows += _growth(args, name, precision)
    if rows:
        report(f"peak of one layer, {args.heads} heads, width {args.d_model}", rows, args.json)
    if "savings" in args.only:
        path = args.json and args.json.with_stem(f"{args.json.stem}_savings")
        report("peak of a step at GPT-2's vocabulary", [row for p in args.precision for row in _savings(p)], path)


def _growth(args: argparse.Namespace, name: str, precision: str) -> list[dict[str, Any]]:
    """One sequence. The exponent is that of the step from half as many tokens: 1 is linear, 2 quadratic."""
    attention, settings, documents = PATHS[name]
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        shape = {"n_layers": 1, "d_model": args.d_model, "n_heads": args.heads, "context_length": tokens}
        given = (f"attention={attention}", *(f"attention.{key}={value}" for key, value in settings.items()))
        state = _state(VOCAB, shape, f"precision={precision}", *given)
        peak, seconds = _measured(state, _batch(_text(tokens, VOCAB), VOCAB if documents else None), mean_loss)
        last = rows[-1] if rows else None
        grown = math.log(peak / last["bytes"], tokens / last["tokens"]) if last else math.nan
        rows.append(
            {
                "path": name,
                "precision": precision,
                "tokens": tokens,
                "bytes": peak,
                "MB": peak / 1e6,
                "bytes per token": peak // tokens,
                "exponent": grown,
                "seconds": seconds,
            }
        )
    return rows


def _savings(precision: str) -> list[dict[str, Any]]:
    """12 layers of width 256 on 2048 tokens, where logits and activations are of a size."""
    batch, rows = _batch(_text(2048, GPT2_VOCAB).view(2, 1024)), []
    shape = {"n_layers": 12, "d_model": 256, "n_heads": 4, "context_length": 1024}
    for activation_checkpointing in (False, True):
        given = f"precision={precision}", f"activation_checkpointing={activation_checkpointing}"
        state = _state(GPT2_VOCAB, shape, "attention=mha", *given)
        for loss_name, loss in (("at once", _at_once), ("chunked", mean_loss)):
            peak, seconds = _measured(state, batch, loss)
            rows.append(
                {
                    "precision": precision,
                    "loss": loss_name,
                    "checkpointed": activation_checkpointing,
                    "MB": peak / 1e6,
                    "seconds": seconds,
                }
            )
    return rows


def _at_once(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """mean_loss from the logits of the whole batch."""
    out = model(batch.inputs, Placement.of_batch(batch), training=True)
    return token_losses(model.logits(out.x), batch.targets).mean(), out.aux


def _measured(state: TrainState, batch: Batch, loss: Callable) -> tuple[int, float]:
    """Bytes at the peak, the weights not counted but their gradients; seconds of CPU time, the measuring included."""

    def step() -> None:
        state.precision.backward(loss(state.precision.model, batch)[0])

    for parameter in state.precision.parameters:
        parameter.grad = None
    start = time.process_time()
    return allocated_peak(step), time.process_time() - start


def _state(vocab_size: int, shape: dict[str, int], *overrides: str) -> TrainState:
    length = shape["context_length"]
    given = (*(f"model.{name}={value}" for name, value in shape.items()), *overrides)
    run = compose(*given, f"batch_tokens={length}", f"eval_tokens={length}")
    return TrainState.create(run, vocab_size, torch.device("cpu"))


def _batch(text: Tensor, vocab_size: int | None = None) -> Batch:
    """A text as its own targets. vocab_size: of a text whose documents do not see each other."""
    return Batch.of(text, text, None if vocab_size is None else vocab_size - 1)


def _text(tokens: int, vocab_size: int) -> Tensor:
    """Made up, (1, tokens); the last of the vocabulary begins a document."""
    text = torch.randint(vocab_size - 1, (1, tokens), generator=torch.Generator().manual_seed(0))
    text[:, ::DOCUMENT] = vocab_size - 1
    return text


if __name__ == "__main__":
    with one_line_errors():
        main()
