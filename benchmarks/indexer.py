"""Times one layer of MLA whose keys an indexer chooses against the same layer without, while it decodes and prefills;
and compares the memory of a training step.

python -m benchmarks.indexer                             # model=gpt2's widths, a query latent of 384, top_k 512
python -m benchmarks.indexer --keys 4096 16384 65536 --json indexer.json

`ratio` is the chosen layer's time over the dense one's, both measured in turns. Milliseconds are of CPU time on one
thread. A prefill goes through the tokens a chunk of 512 at a time, as generation does with long texts. Bytes of a step
are those of tensors, predicted as dry_run=true does, at a window of 4,096 tokens.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.side_by_side import count, in_turns, output, report
from common.cli import Parser, one_line_errors
from model.cache import Cache
from model.context import Context
from model.initialise import initialised
from model.placement import Placement
from model.transformer import TransformerLM
from training.run.config import compose
from training.step_memory import memory

DENSE = ("model=gpt2", "attention=mla", "attention.q_lora_rank=384", "precision=fp32")
CHUNK = 512


@torch.no_grad()
def main() -> None:
    parser = Parser(
        prog="-m benchmarks.indexer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=count, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--top-k", type=count, default=512)
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = (*DENSE, f"attention.indexer.top_k={args.top_k}")
    models = {"dense": _model(*DENSE), "chosen": _model(*chosen)}
    rows = [_row(models, keys, queries, args.rounds) for queries in (1, CHUNK) for keys in args.keys]
    report(f"MLA and MLA with top_k {args.top_k}, one layer, CPU ms", rows, args.json)
    window = ("model.context_length=4096", "model.n_layers=4", "batch_tokens=4096", "micro_batch_size=1")
    with torch.enable_grad():
        dense, indexed = (memory(compose(*one, *window), 4096, torch.device("cpu")).peak for one in (DENSE, chosen))
    print(f"\na step of 4,096 tokens, four layers: {indexed / dense:.2f} times the bytes of tensors")


def _model(*options: str) -> TransformerLM:
    return initialised(compose(*options, "model.n_layers=1").model, 64)


def _row(models: dict[str, TransformerLM], keys: int, queries: int, rounds: int) -> dict[str, Any]:
    timings = in_turns({name: _step(model, keys, queries) for name, model in models.items()}, rounds)
    dense, chosen = (1e3 * timing.own for timing in timings.values())
    return {"queries": queries, "keys": keys, "dense": dense, "chosen": chosen, "ratio": chosen / dense}


def _step(model: TransformerLM, keys: int, queries: int) -> Callable[[], Any]:
    """The last `queries` of so many tokens, the others of which are cached."""
    attention = model.layers[0].attention
    caches: list[Cache] = model.make_caches(1, keys)
    for column in caches[0].columns.values():
        column.normal_()
    positions = torch.arange(keys - queries, keys)[None]
    at = Placement.decode(positions, caches, kv_len=keys)
    ctx = Context(at, {rope: rope.table(positions) for rope in model.ropes})
    x = torch.randn(1, queries, model.config.d_model)
    return lambda: attention(x, ctx, caches[0])


if __name__ == "__main__":
    with one_line_errors():
        main()
