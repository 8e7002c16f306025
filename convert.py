"""Converts runs to the formats of other tools.

python convert.py export runs/NAME --to hf DIR             # a folder that transformers opens, without this program
python convert.py export latest --to hf DIR --dtype bf16   # of the newest run, in half the size
python convert.py export runs/NAME --to hf-code DIR        # the same with a file of code, for what no family expresses

Back again, from hf: train.py init_from=hf:DIR, sample.py --run hf:DIR.
"""

if __name__ == "__main__":
    from common import process

    process.start()

import argparse
from functools import partial
from pathlib import Path

from common.cli import Parser, byte_count, one_line_errors
from common.hf_names import is_published
from common.streams import print_stderr

FORMATS = ("hf", "hf-code")


def main() -> None:
    with one_line_errors():
        convert(parse_arguments())


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("export",))
    parser.add_argument("run", type=Path, help="the folder of a run, or latest; or hf:DIR, a published model")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "DIR"), required=True, help="hf or hf-code, and a folder")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="best: of validation loss")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights in the files")
    parser.add_argument("--family", help="of hf: which, as qwen3; unset: the first that fits")
    parser.add_argument(
        "--file-bytes",
        type=byte_count,
        metavar="SIZE",
        help="of weights in one file, at most, as 500MB or 2GiB; a larger tensor has a file of its own; unset: 5 GB",
    )
    args = parser.parse_args()
    if args.to[0] not in FORMATS:
        parser.error(f"--to {args.to[0]}: there is no such format: {', '.join(FORMATS)}")
    if not args.to[1]:
        parser.error(f"--to {args.to[0]} names no folder: give one that is not there yet")
    if args.family is not None and args.to[0] != "hf":
        parser.error(f"--family {args.family} is of --to hf: leave it out")
    if args.checkpoint == "best" and is_published(args.run):
        parser.error(f"--checkpoint best is of a run, and {args.run} has one set of weights: leave it out")
    return args


def convert(args: argparse.Namespace) -> None:
    from common import process
    from common.console import to_stderr
    from generation.options import check_is_folder
    from interchange.hf_code import with_code
    from interchange.hf_family import check_family, in_family
    from interchange.hf_folder import export
    from training.run.folder import newest

    process.end_by_unwinding()
    to_stderr()
    check_family(args.family)
    if args.run == Path("latest"):  # as sample.py's --run latest
        args.run = newest(with_checkpoint=True)
    check_is_folder(args.run)
    form_of = with_code if args.to[0] == "hf-code" else partial(in_family, name=args.family)
    options = {"dtype": args.dtype, "which": args.checkpoint}
    options |= {} if args.file_bytes is None else {"file_bytes": args.file_bytes}
    found = export(args.run, Path(args.to[1]), form_of, **options)
    print_stderr(f"{args.run} as {found.form.architecture}, {found.numbers:,} numbers in {args.dtype}: {args.to[1]}")


if __name__ == "__main__":
    main()
