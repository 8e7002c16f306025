"""Compares runs: how much better, how sure that is, and at what cost. A table here, a report in files.

python compare.py                                  # the newest sweep of train.py -m
python compare.py sweeps/NAME --baseline attention=gqa
python compare.py runs/A runs/B --x seconds        # any two runs, or more
"""

if __name__ == "__main__":
    from common import process

    process.start("scipy", "matplotlib", "pydantic", "rich")

import argparse
import os
import shutil
from pathlib import Path

from common.cli import Parser, one_line_errors
from common.errors import UserError
from common.invocation import command, shortest
from common.streams import print_line, print_stderr

# What takes seconds to import is imported within functions: --help answers before it would have loaded.
PROGRAM = "compare.py"
REPORT = Path("report")  # the folder, where runs are compared that are no sweep
MAX_WIDTH = 120  # columns of the table


def main() -> None:
    with one_line_errors():
        compare(parse_arguments())


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="sweeps, or runs; without: the newest sweep")
    parser.add_argument("-o", "--output", type=Path, help="the report's folder; unset: one sweep's own, else ./report")
    parser.add_argument("--baseline", metavar="VARIANT", help="what the others are compared with; unset: the first")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds", "flops"), default="tokens", help="of the curves")
    parser.add_argument("--y", choices=("bpb", "loss"), default="bpb", help="bits per byte, or nats per token")
    parser.add_argument("--log", action="store_true", help="logarithmic axes of the curves")
    parser.add_argument("--force", action="store_true", help="compare runs of different corpora or tokenizers, by bpb")
    parser.add_argument("--no-decode", action="store_true", help="do not measure how fast the models decode here")
    args = parser.parse_args()
    if args.output is not None and not args.output.name:
        parser.error("-o names no folder")
    return args


def compare(args: argparse.Namespace) -> None:
    from ablation.pages.files import write
    from ablation.pages.terminal import terminal
    from ablation.report import report_on
    from common import process
    from common.console import to_stderr

    process.end_by_unwinding()
    to_stderr()
    folders = args.folders or [newest()]
    output = args.output or (folders[0] if len(folders) == 1 and is_sweep(folders[0]) else REPORT)
    check_output(output)
    found = report_on(folders, baseline=args.baseline, force=args.force, decode=not args.no_decode)
    width = min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns)
    for line in terminal(found, width).splitlines():
        print_line(line)
    files = write(found, output, args.x, args.y, args.log)
    print_stderr(f"report       {shortest(str(files[0].resolve()))}, and {', '.join(file.name for file in files[1:])}")


def newest() -> Path:
    from ablation.sweep.stored import newest_sweep

    found = newest_sweep()
    if found is None:
        sweep = command("train.py", "-m", "attention=mha,mla", "seed=1,2,3")
        raise UserError(
            f"there is no sweep in {Path('sweeps').resolve()}: {sweep} makes one; or name runs, as in "
            f"{command(PROGRAM, 'runs/A', 'runs/B')}"
        )
    print_stderr(f"sweep        {found}")
    return found


def check_output(folder: Path) -> None:
    """Raise UserError where no report can be written, before anything is computed."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        fault = "nothing may be written there" if there.is_dir() else f"{there} is no folder"
        raise UserError(f"no report can be written to {folder}: {fault}: choose another folder by -o")


def is_sweep(folder: Path) -> bool:
    from ablation.sweep.stored import SWEEP_FILE

    return os.path.isfile(folder / SWEEP_FILE)


if __name__ == "__main__":
    main()
