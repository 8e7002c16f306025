"""Times what a user waits for after a command, in processes of their own, in turns with a bare `import torch`.

python -m benchmarks.startup                       # of the default run, in a folder of its own
python -m benchmarks.startup --rounds 9 --json startup.json

    help          of train.py and sample.py, until the process has ended
    first step    until the first row of metrics.jsonl is on the disk. The corpus is cached; `save_every=1` has the row
                  written with the step it is of, where rows are else gathered for half a second
    first token   until the first character after the prompt is on stdout. An unfinished character would be held back,
                  so this is no earlier than the token

A process is killed when that has happened, and waited for: what that takes is counted. So the import too ends its
process at once. The first round of all is not counted: it warms the file cache.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.side_by_side import count, in_turns, marked, output, report
from common.cli import Parser, one_line_errors
from common.errors import UserError
from common.invocation import ROOT

BARS = {"train.py --help": 1.0, "sample.py --help": 1.0, "first step": 4.0, "first token": 4.0}
PROMPT = "def "
OWN = ("run_dir", "save_every", "resume", "dry_run")  # what the runs that are timed say themselves
PATIENCE = 120  # seconds
TWIN, IMPORT = "import torch", "import os, torch; os._exit(0)"


def main() -> None:
    parser = Parser(
        prog="-m benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the run, as train.py takes them, as model=gpt2")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--json", type=output, help="write the table there")
    args = parser.parse_args()
    for override in args.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in OWN:
            raise UserError(f"{override}: what is timed are runs of their own, that are removed: leave {key} out")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _first_step(place, args.overrides)  # fills cache/
        trained = _first_step(place, args.overrides, until="checkpoints/step_*/manifest.json")
        runs: dict[str, Callable[[], object]] = {
            TWIN: lambda: _finished(["-c", IMPORT], place),
            "train.py --help": lambda: _finished([ROOT / "train.py", "--help"], place),
            "sample.py --help": lambda: _finished([ROOT / "sample.py", "--help"], place),
            "first step": lambda: _first_step(place, args.overrides),
            "first token": lambda: _first_token(place, trained),
        }
        timings = in_turns(runs, args.rounds)
    twin = timings[TWIN]
    rows = [
        {
            "what": name,
            "s": timing.median,
            "+-": timing.spread,
            "CPU s": timing.own,
            "x import torch": timing.own / twin.own,
            "bar": BARS.get(name, ""),
            "met": "" if name not in BARS else "yes" if timing.median <= BARS[name] else "no",
            "others": marked(timing),
        }
        for name, timing in timings.items()
    ]
    report("start-up", rows, args.json)


def _finished(command: list, place: Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=place, stdout=subprocess.DEVNULL, check=True)


def _first_step(place: Path, overrides: list[str], until: str = "metrics.jsonl") -> Path:
    """Trains until a file of the run is there and not empty -> the run's folder."""
    folder = Path(tempfile.mkdtemp(dir=place)) / "run"
    command = [sys.executable, ROOT / "train.py", *overrides, "save_every=1", f"run_dir={folder}"]
    with (place / "stderr.txt").open("w+") as err:
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=err)
        try:
            deadline = time.monotonic() + PATIENCE
            while not any(path.stat().st_size for path in folder.glob(until)):
                if process.poll() is not None or time.monotonic() > deadline:
                    err.seek(0)
                    raise SystemExit(f"train.py came to no first step:\n{err.read()}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
    return folder


def _first_token(place: Path, run: Path) -> None:
    command = [sys.executable, ROOT / "sample.py", PROMPT, "--run", run]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        output = process.stdout.read(len(PROMPT) + 1)
        process.kill()
    if len(output) <= len(PROMPT):
        raise SystemExit(f"sample.py wrote nothing after the prompt: {output!r}")


if __name__ == "__main__":
    with one_line_errors():
        main()
