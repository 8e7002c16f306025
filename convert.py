"""Converts runs to the formats of other tools.

python convert.py export runs/NAME --to hf DIR             # a folder that transformers opens, without this program
python convert.py export runs/NAME --to hf DIR --dtype bf16

Back again: train.py init_from=hf:DIR, sample.py --run hf:DIR.
"""

if __name__ == "__main__":
    from common import process

    process.start()

import argparse
from pathlib import Path

from common.cli import Parser, number, one_line_errors
from common.hf_names import folder_of, is_published
from common.streams import print_stderr

FORMATS = ("hf",)


def main() -> None:
    with one_line_errors():
        convert(parse_arguments())


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("export",))
    parser.add_argument("run", type=Path, help="the folder of a run; or hf:DIR, a published model")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "DIR"), required=True, help="hf, and a folder to make")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="best: of validation loss")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights in the files")
    parser.add_argument("--family", help="as which family of transformers, as qwen3; unset: the first that fits")
    size = number(int, 1)
    parser.add_argument("--file-bytes", type=size, default=5_000_000_000, help="of weights in one file, at most")
    args = parser.parse_args()
    if args.to[0] not in FORMATS:
        parser.error(f"--to {args.to[0]}: there is no such format: {', '.join(FORMATS)}")
    if args.checkpoint == "best" and is_published(args.run):
        parser.error(f"--checkpoint best is of a run, and {args.run} has one set of weights: leave it out")
    return args


def convert(args: argparse.Namespace) -> None:
    from common import process
    from common.console import to_stderr
    from generation.options import check_is_folder
    from interchange.hf_folder import check_family, export

    process.end_by_unwinding()
    to_stderr()
    check_family(args.family)
    check_is_folder(folder_of(args.run))
    output = Path(args.to[1])
    options = {"dtype": args.dtype, "family": args.family, "which": args.checkpoint}
    found = export(args.run, output, **options, file_bytes=args.file_bytes)
    print_stderr(f"{found.family.architecture}, {found.numbers:,} numbers in {args.dtype}: {output}")


if __name__ == "__main__":
    main()
