"""Times what sparse masks save in training on a CPU: one layer's attention under each, forward and backward, by
kernel=tiles and by kernel=sdpa, beside plain causal attention of the same shape. In turns, by CPU time.

python -m benchmarks.sparse                                            # 4,096 tokens in float32, one thread
python -m benchmarks.sparse --tokens 512 1024 --only documents --json benchmarks/results/sparse_epyc_avx2.json
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.side_by_side import Meter, count, output, report, spread
from common.cli import Parser, one_line_errors
from model.kernels.base import How, Kernel
from model.kernels.sdpa import SDPA
from model.kernels.tiles import Tiles, plan
from model.mask import CAUSAL, Mask, Pattern

DOCUMENTS = "documents"
PATTERNS = {
    "window 256": Pattern(window=256),
    "window 64, 1/20 of all blocks": Pattern(window=64, random_blocks=0.05),
    "window 64, 4 global tokens": Pattern(window=64, global_tokens=4),
    "every 4th key": Pattern(dilation=4),
    "window 512, every 4th key": Pattern(window=512, dilation=4),
    DOCUMENTS: CAUSAL,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DOCUMENT = 500  # tokens


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.sparse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=count, nargs="+", default=[4096])
    parser.add_argument("--heads", type=count, nargs=2, default=[8, 2], metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=count, default=64)
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--forward", action="store_true", help="without gradients")
    parser.add_argument("--only", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_row(args, tokens, name) for tokens in args.tokens for name in args.only]
    phase = "forward" if args.forward else "forward and backward"
    report(f"{phase}, heads {args.heads} of {args.head_dim}, batch {args.batch}, {args.precision}", rows, args.json)


def _row(args: argparse.Namespace, tokens: int, name: str) -> dict[str, Any]:
    """Of each round the time of one kernel relative to another; the median, and half the distance of the quartiles."""
    positions = torch.arange(tokens)[None]
    causal, mask = (Mask(positions, positions, True, pattern) for pattern in (CAUSAL, PATTERNS[name]))
    if name == DOCUMENTS:
        docs, within = positions // DOCUMENT, positions % DOCUMENT
        mask = Mask(within, within, False, CAUSAL, docs, docs)
    candidates = {
        "causal": _runner(args, SDPA(), causal),
        "sdpa": _runner(args, SDPA(), mask),
        "tiles": _runner(args, Tiles(), mask),
    }
    own: dict[str, list[float]] = {label: [] for label in candidates}
    for run in candidates.values():
        run()
    for _ in range(args.rounds):
        for label, run in candidates.items():
            meter = Meter()
            run()
            own[label].append(meter.read().own)
    met = sum(tile.n_queries * sum(tile.lengths) for tile in plan(mask))
    return {
        "tokens": tokens,
        "mask": name,
        "causal ms": 1e3 * statistics.median(own["causal"]),
        "sdpa ms": 1e3 * statistics.median(own["sdpa"]),
        "tiles ms": 1e3 * statistics.median(own["tiles"]),
        "causal / tiles": _ratio(own["causal"], own["tiles"]),
        "+-": spread([a / b for a, b in zip(own["causal"], own["tiles"], strict=True)]),
        "sdpa / tiles": _ratio(own["sdpa"], own["tiles"]),
        "+- of it": spread([a / b for a, b in zip(own["sdpa"], own["tiles"], strict=True)]),
        "pairs met": met / (tokens * (tokens + 1) / 2),  # of those that causal attention has
    }


def _ratio(slower: list[float], faster: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def _runner(args: argparse.Namespace, kernel: Kernel, mask: Mask) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    tokens = mask.q_pos.shape[1]
    leaves = [
        torch.randn(args.batch, tokens, heads, args.head_dim, generator=draw)
        .to(DTYPES[args.precision])
        .requires_grad_(not args.forward)
        for heads in (args.heads[0], args.heads[1], args.heads[1])
    ]

    def run() -> Any:
        mask.made.clear()  # as in a step's first layer
        out = kernel(*leaves, mask, How(args.head_dim**-0.5)).out
        return out if args.forward else torch.autograd.grad(out.float().square().sum(), leaves)

    return run


if __name__ == "__main__":
    with one_line_errors():
        main()
