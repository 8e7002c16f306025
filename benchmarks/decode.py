"""Times decoding: ours beside peers, in turns in one process, at top-k 50 and temperature 1, on freshly initialised
models.

python -m benchmarks.decode                                   # (ii) in float32, batch 1 and 8, eager
python -m benchmarks.decode --compiled --executions absorbed expanded --litgpt ../litgpt --nanogpt ../nanoGPT
python -m benchmarks.decode --contexts 256 1024 4096 16384 32768 --batch 1 8 32 --new 4 --json all.json --plot all.png
python -m benchmarks.decode --sizes iii --precision fp32 bf16 --only "ours mha" "ours mla" "transformers Llama"

A text is a prompt and `--new` tokens more, a context together. `ms` is the time of a step from the second new token on,
`first ms` that of the first, the prompt's pass. Where the prompts of a batch together are longer than --prefill-up-to,
they are not computed: the KV cache is filled with made-up numbers, for all alike, since a step takes as long whatever
they are, and there is no `first ms`. `warm-up s` is the whole of a first text, which is not counted; compiling is in
it. The floor is what it takes to read the weights and the cache once, at the speed at which this run reads 256 MB.

Ours are laid out as by sample.py (model/decode_layout.py), and draw as it does. Of peers, the forward pass and the
cache are called in a plain loop, without what their `generate` does besides. They draw by topk and multinomial, which
costs less than our sampler in large vocabularies; with --our-sampler, by that. nanoGPT has no cache, and recomputes
texts of up to 1,024 tokens. A peer that cannot be imported is skipped, as is a KV cache of more than a quarter of the
memory that is free. The last line is the table as one JSON object.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.decode_models import Peers, Texts, Writer, Written, drawn_as_ours, drawn_plainly, ours, peers
from benchmarks.side_by_side import checkout, count, environment, litgpt_checkout, marked, output, report
from benchmarks.train import SIZES, Size, built
from common.cli import Parser, one_line_errors
from common.errors import UserError
from runtime.bandwidth import seconds_per_byte
from runtime.memory import free_memory

SHARE = 4  # of the free memory, a KV cache may take one in so many


class Named(NamedTuple):
    name: str
    weights: int  # bytes
    writer: Writer


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["ii"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=count, nargs="+", default=[256], help="tokens of a text, the new ones too")
    parser.add_argument("--new", type=count, default=32, help="tokens that are written of a text, from 2 on")
    parser.add_argument("--prefill-up-to", type=count, default=8192, help="tokens of a batch's prompts together")
    parser.add_argument("--executions", nargs="+", choices=["absorbed", "expanded", "naive"], default=[])
    parser.add_argument("--compiled", action="store_true", help="ours compiled too: a minute more for each")
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of nanoGPT: its model.py is imported")
    parser.add_argument("--litgpt", type=litgpt_checkout, help="a checkout of litgpt; unset: it is installed")
    parser.add_argument("--our-sampler", action="store_true", help="peers draw with ours; unset: topk and multinomial")
    parser.add_argument("--only", nargs="+", help="names of models: those alone")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--json", type=output, help="write the table there")
    parser.add_argument("--plot", type=output, help="draw milliseconds and cache bytes against the context there")
    args = parser.parse_args()
    if args.new < 2:
        raise UserError(f"--new {args.new}: give 2 or more: the first token is the prompt's")
    if min(args.contexts) <= args.new:
        raise UserError(
            f"--contexts {min(args.contexts)}: give more than --new {args.new}, the tokens that are written"
        )
    rows: list[dict[str, Any]] = []
    for name, precision in itertools.product(args.sizes, args.precision):
        rows += _measured(args, SIZES[name]._replace(tokens=max(args.contexts)), precision)
    if not rows:
        raise UserError("nothing was measured: choose smaller --contexts or --batch, or other models with --only")
    report("decoding, sizes as layers/heads/width/tokens/batch", rows, args.json)
    if args.plot:
        draw(rows, args.plot)
    print(json.dumps({"environment": environment(), "rows": rows}))


def _measured(args: argparse.Namespace, size: Size, precision: str) -> Iterator[dict[str, Any]]:
    models = list(_models(args, size, precision))
    per_byte = seconds_per_byte(torch.device("cpu"))
    free = free_memory(torch.device("cpu"))
    for context, rows in itertools.product(args.contexts, args.batch):
        prompt = context - args.new
        texts = Texts(rows, prompt, args.new, made_up=rows * prompt > args.prefill_up_to)
        written: dict[str, list[Written]] = {}
        fitting = [model for model in models if _fits(model, texts, free)]
        for _, model in itertools.product(range(args.rounds + 1), fitting):
            written.setdefault(model.name, []).append(model.writer.write(texts))
        print(f"{size}, {precision}, batch {rows}, context {context}: measured", flush=True)
        for model in fitting:
            warm_up, *timed = written[model.name]
            step = statistics.median(one.step for one in timed)
            first = 1e3 * statistics.median(one.first for one in timed)
            yield {
                "size": str(size),
                "precision": precision,
                "model": model.name,
                "batch": rows,
                "context": context,
                "tokens/s": rows / step,
                "ms": 1e3 * step,
                "CPU ms": 1e3 * statistics.median(one.own for one in timed),
                "first ms": None if texts.made_up else first,
                "warm-up s": warm_up.first + warm_up.reading.seconds,
                "cache bytes": warm_up.cache,
                "of the floor": (model.weights + warm_up.cache) * per_byte / step,
                "others": marked(max((one.reading for one in timed), key=lambda each: each.others)),
            }


def _models(args: argparse.Namespace, size: Size, precision: str) -> Iterator[Named]:
    makers = ours(size, precision, args.executions, None)
    if args.compiled:
        makers |= ours(size, precision, args.executions, args.new)
    draw = drawn_as_ours if args.our_sampler else drawn_plainly
    makers |= peers(size, precision, Peers(args.nanogpt, args.litgpt, draw))
    for name, model, writer in built(makers, args.only):
        yield Named(name, sum(parameter.nbytes for parameter in model.parameters()), writer)


def _fits(model: Named, texts: Texts, free: int | None) -> bool:
    """Whether the model can write these texts here. If not, it says why."""
    context, writer = texts.prompt + texts.new, model.writer
    cache = texts.rows * context * writer.cache_per_token
    reason = None
    if free is not None and cache > free / SHARE:
        reason = f"a KV cache of {cache / 1e9:.1f} GB is more than a quarter of the {free / 1e9:.1f} GB that are free"
    elif writer.recomputes_up_to is not None and (texts.made_up or context > writer.recomputes_up_to):
        reason = "it would recompute all of it for each token"
    if reason is not None:
        print(f"{model.name}, batch {texts.rows}, context {context}: skipped, {reason}")
    return reason is None


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of a step, and the KV cache, of each model against the context: a row of panels for each size,
    precision and batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    groups = list(dict.fromkeys(_group(row) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    figure, panels = pyplot.subplots(
        len(groups), 2, figsize=(12, 4 * len(groups)), layout="constrained", squeeze=False, sharex=True
    )
    for group, pair in zip(groups, panels, strict=True):
        for panel, key, unit, what in zip(
            pair, ("ms", "cache bytes"), (1, 1e6), ("ms per step", "KV cache, MB"), strict=True
        ):
            panel.set(title=f"{what}: {group}", xlabel="tokens of context", xscale="log", yscale="log")
            for index, model in enumerate(models):
                mine = [row for row in rows if row["model"] == model and _group(row) == group and row[key] > 0]
                points = sorted((row["context"], row[key] / unit) for row in mine)
                panel.plot([x for x, _ in points], [y for _, y in points], **_look(index, model), label=model)
            panel.set_xticks(contexts, contexts)
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
    print(f"{path}")


def _group(row: Mapping[str, Any]) -> str:
    return f"{row['size'].rpartition('/')[0]}, {row['precision']}, batch {row['batch']}"


def _look(index: int, model: str) -> dict[str, Any]:
    """Colours and markers that tell many lines apart: ours through, compiled dashed, peers dotted."""
    style = "--" if "compiled" in model else "-" if model.startswith("ours") else ":"
    return {"color": f"C{index % 10}", "marker": "osD^vP*X<>"[(index + index // 10) % 10], "linestyle": style}


if __name__ == "__main__":
    with one_line_errors():
        main()
