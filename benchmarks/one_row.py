"""Times the ways to multiply a few rows with a matrix (out, in): what the rules in model/linear.py choose from.

python -m benchmarks.one_row                             # in float32, on one thread
python -m benchmarks.one_row --precision bf16 --json one_row.json
python -m benchmarks.one_row --threads 2                 # on a machine that nothing else uses

The matrix is stored by rows or by columns. `linear` is F.linear, `swapped` is (weight @ x.mT).mT.contiguous(), and of
one row: `mv` is torch.mv, `in parts` a batch of products, each with some of the columns, which run in a thread each.
`product` is model.linear.product on the matrix as model/decode_layout.py stores it for so many rows, `ready` the same
with its choice made before, as a step of decoding has it. `rule` says what was chosen, `x best` how long they take
relative to the best of all.

Microseconds are of CPU time on one thread, which other processes disturb little, and else by the clock, as threads that
wait take CPU time too. The matrices of a shape take 30 MB together and come in turn, so that each is read from memory,
as in decoding.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import count, in_turns, marked, output, report
from common.cli import Parser, one_line_errors
from model.linear import FEW_ROWS, multiplier, product, read_fast

SHAPES = ((4096, 128), (384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072), (50304, 768))
ROWS = (1, 2, 4, 8, 16, 64)
BYTES = 30e6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Form = Callable[[Tensor, Tensor], Tensor]  # (x (N, in), weight (out, in)) -> (N, out)


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
    rows = [_row(shape, n, args) for shape, n in itertools.product(SHAPES, ROWS)]
    unit = "CPU us" if args.threads == 1 else "us"
    report(f"products of few rows, {args.precision}, {unit}", rows, args.json)


def _row(shape: tuple[int, int], n: int, args: argparse.Namespace) -> dict[str, Any]:
    out, width = shape
    x = torch.randn(n, width).to(DTYPES[args.precision])
    by_rows = [torch.randn(shape).to(x) for _ in range(max(1, int(BYTES / (out * width * x.itemsize))))]
    by_columns = [matrix.mT.contiguous().mT for matrix in by_rows]
    by_rule = by_rows if read_fast(by_rows[0], n).stride(1) == 1 else by_columns
    forms: dict[str, tuple[Form, list[Tensor]]] = {
        "linear, rows": (F.linear, by_rows),
        "linear, columns": (F.linear, by_columns),
        "swapped, rows": (_swapped, by_rows),
        "mv, rows": (_mv, by_rows),
        "mv, columns": (_mv, by_columns),
        "in parts, columns": (_in_parts, by_columns),
        "product": (product, by_rule),
    }
    applying = {name: form for name, form in forms.items() if n == 1 or form[0] not in (_mv, _in_parts)}
    candidates = {name: _each(form, x, matrices) for name, (form, matrices) in applying.items()}
    candidates["ready"] = _ready(x, by_rule) if n <= FEW_ROWS else candidates["product"]
    timings = in_turns(candidates, args.rounds)
    micros = {
        name: 1e6 * (timing.own if args.threads == 1 else timing.median) / len(by_rows)
        for name, timing in timings.items()
    }
    return {
        "matrix": f"{out} x {width}",
        "rows of x": n,
        **{name: micros.get(name) for name in (*forms, "ready")},
        "rule": _rule(by_rule[0], n),
        "product x best": micros["product"] / min(micros.values()),
        "ready x best": micros["ready"] / min(micros.values()),
        "others": marked(max(timings.values(), key=lambda timing: timing.others)),
    }


def _each(form: Form, x: Tensor, matrices: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for matrix in matrices:
            form(x, matrix)

    return run


def _ready(x: Tensor, matrices: list[Tensor]) -> Callable[[], None]:
    multiply = [multiplier(matrix, None, len(x)) for matrix in matrices]

    def run() -> None:
        for one in multiply:
            one(x, None)

    return run


def _swapped(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.mT).mT.contiguous()


def _mv(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x[0])[None]


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    parts = math.gcd(torch.get_num_threads(), weight.shape[1])
    return torch.bmm(x.view(parts, 1, -1), weight.mT.view(parts, -1, len(weight))).sum(0)


def _rule(stored: Tensor, rows: int) -> str:
    """What `product` does of so many rows with a matrix stored so, and how that is stored."""
    form = multiplier(stored, None, rows).__name__.replace("_", " ") if rows <= FEW_ROWS else "F.linear"
    return f"{form}, {'rows' if stored.stride(1) == 1 else 'columns'}"


if __name__ == "__main__":
    with one_line_errors():
        main()
