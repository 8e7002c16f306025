"""Times attention kernels on one layer's shapes, in turns: what a window saves, and what each kernel costs.

python -m benchmarks.kernels                              # forward, and backward where there is one
python -m benchmarks.kernels --tokens 8192 --json benchmarks/results/kernels.json
python -m benchmarks.kernels --tokens 64 256 512 --batch 8 --heads 6 6 --causal --only sdpa matmul   # on a CPU
"""

import argparse
from typing import Any

import torch

from benchmarks.side_by_side import count, in_turns, marked, output, report
from common.cli import Parser, one_line_errors
from common.errors import Unsupported
from model.kernels.base import How, Kernel
from model.kernels.flex import Flex
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.mask import Mask, Pattern

KERNELS = {"sdpa": SDPA(), "matmul": Matmul(), "flex": Flex(), "naive": Naive()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAIVE_TOKENS = 4096  # beyond, its scores do not fit


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=count, nargs="+", default=[1024, 4096])
    parser.add_argument("--window", type=count, default=256)
    parser.add_argument("--heads", type=count, nargs=2, default=[8, 2], metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=count, default=64)
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--causal", action="store_true", help="no windows")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        patterns = {
            "causal": Pattern(),
            f"window {args.window}": Pattern(window=args.window),
            "window, 1/20 of all blocks": Pattern(window=args.window, random_blocks=0.05, block_size=128),
        }
        for name, pattern in list(patterns.items())[: 1 if args.causal else None]:
            for phase in ("forward", "both"):
                rows += _timed(args, device, tokens, name, pattern, phase)
    report(
        f"kernels, heads {args.heads} of {args.head_dim}, batch {args.batch}, {args.precision}, on {device.type}",
        rows,
        args.json,
    )


def _timed(
    args: argparse.Namespace, device: torch.device, tokens: int, name: str, pattern: Pattern, phase: str
) -> list[dict[str, Any]]:
    positions = torch.arange(tokens, device=device)[None]
    mask = Mask(positions, positions, contiguous=True, pattern=pattern)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(args.batch, tokens, heads, args.head_dim, generator=draw).to(device, DTYPES[args.precision])
        for heads in (args.heads[0], args.heads[1], args.heads[1])
    )
    candidates = {}
    for label, kernel in KERNELS.items():
        if label not in args.only or (label == "naive" and tokens > NAIVE_TOKENS):
            continue
        run = _runner(kernel, q, k, v, mask, phase)
        try:
            run()
        except Unsupported:
            continue
        candidates[label] = run
    timings = in_turns(candidates, args.rounds)
    fastest = min(timing.median for timing in timings.values())
    return [
        {
            "tokens": tokens,
            "mask": name,
            "passes": phase,
            "kernel": label,
            "ms": 1e3 * timing.median,
            "+-": 1e3 * timing.spread,
            "CPU ms": 1e3 * timing.own,
            "x fastest": timing.median / fastest,
            "others": marked(timing),
        }
        for label, timing in timings.items()
    ]


def _runner(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, phase: str):
    if phase == "forward":
        return lambda: _without_gradients(kernel, q, k, v, mask)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(kernel(*leaves, mask, How(0.125)).out.float().sum(), leaves)


@torch.no_grad()
def _without_gradients(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask):
    return kernel(q, k, v, mask, How(0.125)).out


if __name__ == "__main__":
    with one_line_errors():
        main()
