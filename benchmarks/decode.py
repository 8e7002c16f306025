"""Times decoding: ours beside transformers, in turns in one process, with one sampler, on freshly initialised models.

python -m benchmarks.decode                                   # (ii) in float32, batch 1 and 8, eager
python -m benchmarks.decode --sizes ii iii --precision fp32 bf16 --contexts 256 --json decode.json --plot decode.png
python -m benchmarks.decode --only "ours mha" "ours mla" --compiled

A text is a prompt and NEW tokens more, drawn from the 50 likeliest at temperature 1. `ms` is the time of a step from
the second new token on, `first ms` that of the first, the prompt's pass. The floor is what it takes to read the weights
and the cache once, at the speed at which this run reads 256 MB. Ours are laid out as by sample.py
(model/decode_layout.py); of the peers, their forward pass and cache are called in a plain loop, without what their
`generate` does besides. A peer that cannot be imported is skipped. The last line is the table as one JSON object.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import Meter, count, environment, output, report
from benchmarks.train import OURS, SIZES, Size, built, hugging_model, run_of
from common.cli import Parser, one_line_errors
from common.errors import UserError
from generation.compiled_step import CompiledStep
from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.initialise import initialised
from runtime.bandwidth import seconds_per_byte
from runtime.precision import MixedPrecision

NEW = 32  # tokens
TOP_K = 50


class Text(NamedTuple):
    """How long one text took."""

    first: float  # seconds to the first token
    step: float  # seconds of each further one
    own: float  # seconds of CPU time of each further one
    cache: int  # bytes held at the end


Writer = Callable[[int, int], Text]  # (rows, tokens of the prompt)


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["ii"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=count, nargs="+", default=[128], help="tokens of a text, the new ones too")
    parser.add_argument("--compiled", action="store_true", help="ours compiled too: a minute more for each")
    parser.add_argument("--only", nargs="+", help="names of models: those alone")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--json", type=output, help="write the table there")
    parser.add_argument("--plot", type=output, help="draw milliseconds and cache bytes against the context there")
    args = parser.parse_args()
    if min(args.contexts) <= NEW:
        raise UserError(f"--contexts {min(args.contexts)}: give more than {NEW}, the tokens that are written")
    rows: list[dict[str, Any]] = []
    for name, precision in itertools.product(args.sizes, args.precision):
        rows += _measured(args, SIZES[name]._replace(tokens=max(args.contexts)), precision)
    report("decoding, sizes as layers/heads/width/tokens/batch", rows, args.json)
    if args.plot:
        draw(rows, args.plot)
    print(json.dumps({"environment": environment(), "rows": rows}))


def _measured(args: argparse.Namespace, size: Size, precision: str) -> Iterator[dict[str, Any]]:
    writers = dict(_writers(args, size, precision))
    per_byte = seconds_per_byte(torch.device("cpu"))
    for context, rows in itertools.product(args.contexts, args.batch):
        texts: dict[str, list[Text]] = {name: [] for name in writers}
        for turn in range(args.rounds + 1):
            for name, (_, write) in writers.items():
                text = write(rows, context - NEW)
                if turn:  # the first warms up
                    texts[name].append(text)
        for name, (weights, _) in writers.items():
            step = statistics.median(text.step for text in texts[name])
            cache = texts[name][0].cache
            yield {
                "size": str(size),
                "precision": precision,
                "model": name,
                "batch": rows,
                "context": context,
                "tokens/s": rows / step,
                "ms": 1e3 * step,
                "CPU ms": 1e3 * statistics.median(text.own for text in texts[name]),
                "first ms": 1e3 * statistics.median(text.first for text in texts[name]),
                "cache bytes": cache,
                "of the floor": (weights + cache) * per_byte / step,
            }


def _writers(args: argparse.Namespace, size: Size, precision: str) -> Iterator[tuple[str, tuple[int, Writer]]]:
    """(name, (bytes of the weights, a function that writes a text)) of each model."""
    makers = {f"ours {attention}": lambda attention=attention: _ours(size, precision, attention) for attention in OURS}
    if args.compiled:
        for attention in OURS:
            makers[f"ours {attention}, compiled"] = lambda attention=attention: _ours(size, precision, attention, True)
    for kind in ("Llama", "DeepseekV3"):
        makers[f"transformers {kind}"] = lambda kind=kind: _hugging(size, precision, kind)
    for name, model, write in built(makers, args.only):
        yield name, (sum(parameter.nbytes for parameter in model.parameters()), write)


def _ours(size: Size, precision: str, attention: str, compiled: bool = False) -> tuple[nn.Module, Writer]:
    model = initialised(run_of(size, f"attention={attention}").model, size.vocab)
    model = MixedPrecision(model, precision).model
    step = CompiledStep(size.tokens, torch.device("cpu")) if compiled else None

    def write(rows: int, prompt: int) -> Text:
        lay_out_for_decoding(model, rows)
        state = GenerationState(model, [_prompt(prompt, size)] * rows, seeds=range(rows), compiled=step)
        steps = generate(model, state, Sampler(temperature=1.0, top_k=TOP_K), max_new_tokens=NEW)
        return _timed(steps, lambda: sum(cache.bytes_per_sequence for cache in state.caches) * rows)

    return model, write


def _hugging(size: Size, precision: str, kind: str) -> tuple[nn.Module, Writer]:
    model = hugging_model(kind, size).eval()
    model = model.bfloat16() if precision == "bf16" else model

    def write(rows: int, prompt: int) -> Text:
        held: dict[str, Any] = {"past_key_values": None}
        tokens = torch.tensor([_prompt(prompt, size)] * rows)
        return _timed(_drawn(model, tokens, held), lambda: _bytes(held["past_key_values"]))

    return model, write


def _drawn(model: nn.Module, tokens: Tensor, held: dict[str, Any]) -> Iterator[Tensor]:
    """Draw NEW tokens from a model of transformers, through its own cache, which is left in `held`."""
    with torch.no_grad():
        for _ in range(NEW):
            found = model(tokens, use_cache=True, logits_to_keep=1, **held)
            held["past_key_values"] = found.past_key_values
            likeliest = found.logits[:, -1].float().topk(TOP_K)
            drawn = likeliest.values.softmax(-1).multinomial(1)
            tokens = likeliest.indices.gather(-1, drawn)
            yield tokens


def _timed(steps: Iterator[Tensor], cache: Callable[[], int]) -> Text:
    meter = Meter()
    next(steps)
    first = meter.read().seconds
    meter = Meter()
    further = sum(1 for _ in steps)
    reading = meter.read()
    return Text(first, reading.seconds / further, reading.own / further, cache())


def _bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache of transformers holds."""
    layers = (vars(layer).values() for layer in cache.layers)
    return sum(value.nbytes for values in layers for value in values if isinstance(value, Tensor))


def _prompt(tokens: int, size: Size) -> list[int]:
    return [i % size.vocab for i in range(tokens)]


def draw(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of a step, and bytes of the cache, of each model against the context."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, key, title in zip(
        panels, ("ms", "cache bytes"), ("milliseconds per step", "bytes of the KV cache"), strict=True
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            label = f"{row['model']}, batch {row['batch']}, {row['precision']}, {row['size'].rpartition('/')[0]}"
            lines.setdefault(label, []).append((row["context"], row[key]))
        for label, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        panel.set(title=title, xlabel="tokens of context", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    print(f"{path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
