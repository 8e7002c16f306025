"""Times the product of a few rows with a matrix (out, in), stored by rows and by columns: what model/decode_layout.py
chooses by.

python -m benchmarks.one_row                             # in float32, on one thread
python -m benchmarks.one_row --precision bf16 --threads 2 --json one_row.json

The matrices of a shape take 30 MB together and come in turn, so that each is read from memory, as in decoding.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import count, in_turns, marked, output, report
from common.cli import Parser, one_line_errors

SHAPES = ((4096, 128), (384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072), (50304, 768))
ROWS = (1, 2, 8, 64)
BYTES = 30e6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def main() -> None:
    parser = Parser(
        prog="-m benchmarks.one_row", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for (out, width), n in itertools.product(SHAPES, ROWS):
        x = torch.randn(n, width).to(DTYPES[args.precision])
        by_rows = [torch.randn(out, width).to(x) for _ in range(max(1, int(BYTES / (out * width * x.itemsize))))]
        by_columns = [matrix.mT.contiguous().mT for matrix in by_rows]
        timings = in_turns({"rows": _products(x, by_rows), "columns": _products(x, by_columns)}, args.rounds)
        micros = {name: 1e6 * timing.own / len(by_rows) for name, timing in timings.items()}
        rows.append(
            {
                "matrix": f"{out} x {width}",
                "rows of x": n,
                "by rows, CPU us": micros["rows"],
                "by columns, CPU us": micros["columns"],
                "x faster": micros["rows"] / micros["columns"],
                "others": marked(timings["columns"]),
            }
        )
    report(f"one-row products, {args.precision}", rows, args.json)


def _products(x: Tensor, matrices: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for matrix in matrices:
            F.linear(x, matrix)

    return run


if __name__ == "__main__":
    with one_line_errors():
        main()
