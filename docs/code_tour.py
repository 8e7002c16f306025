"""A tour of the code while it runs: the frames between a command and a training loss, and the life of a cached column.
docs/code_tour.md holds what this prints.

python -m docs.code_tour
"""

import functools
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [
    "train.py",
    "experiment=smoke",
    "steps=1",
    "eval_every=0",
    "logger=none",
    "tune_malloc=false",
    "model.context_length=128",
]
SECTIONS: dict[str, Callable[[], None]] = {}


def section(function: Callable[[], None]) -> Callable[[], None]:
    SECTIONS[function.__name__] = function
    return function


def frames() -> list[str]:
    """The project's own frames on the stack, the outermost first, such as `train.py: train`."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        ours = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] not in ("docs", "tests", ".venv")
        if ours and not frame.f_code.co_name.startswith("<"):
            found.append(f"{file.relative_to(ROOT)}: {frame.f_code.co_qualname.replace('.<locals>', '')}")
        frame = frame.f_back
    return found[::-1]


@contextmanager
def watched(owner: Any, name: str, look: Callable[..., None]) -> Iterator[None]:
    """Within the context, look(result, *args) is called after each call of owner.name."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        look(result, *args)
        return result

    with patch.object(owner, name, call):
        yield


def train_one_step() -> Path:
    """Train a tiny model by the command -> the folder of its run."""
    import train

    folder = Path(tempfile.mkdtemp()) / "run"
    arguments = [*TRAIN, f"run_dir={folder}", f"cache_dir={folder.parent}"]
    with patch.object(sys, "argv", arguments), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train.main()
    return folder


def frames_of_training() -> dict[str, list[str]]:
    """Frames above the forward pass of a training step, and above its loss."""
    from model import loss
    from model.transformer import TransformerLM

    seen: dict[str, list[str]] = {}
    with (
        watched(TransformerLM, "forward", lambda *_: seen.setdefault("forward", frames())),
        watched(loss, "_losses", lambda *_: seen.setdefault("loss", frames())),
    ):
        train_one_step()
    return seen


@section
def loss() -> None:
    """The frames of the forward pass and of the loss."""
    for name, found in frames_of_training().items():
        print(f"{name}: {len(found)} frames")
        print("\n".join(f"  {each}" for each in found))


class CacheWatch:
    """Prints the first call of each kind that changes one layer's cache, and the frames of it."""

    def __init__(self, cache: Any):
        self.cache = cache
        self.seen: set[str] = set()

    def update(self, view: Any, cache: Any, at: Any) -> None:
        first, last = int(at.positions.min()), int(at.positions.max())
        if at.is_contiguous:
            what = f"writes rows {first} to {last} of {self.cache.rows}; attention reads the fresh keys themselves"
            self._print(cache, "prefill", what)
        else:
            what = f"writes row {last}; attention reads the first {view.positions.shape[1]} rows, a view"
            self._print(cache, "decode", what)

    def grow(self, _: None, cache: Any, capacity: int) -> None:
        self._print(cache, "grow", f"room for {capacity} positions; those cached stay")

    def _print(self, cache: Any, event: str, what: str) -> None:
        if cache is self.cache and event not in self.seen:
            self.seen.add(event)
            print(f"{event}: {what}")
            print("\n".join(f"  {each}" for each in frames()))


@section
def column() -> None:
    """The life of one cached column: the keys of the first layer, while a text is generated."""
    from generation.decode import generate
    from generation.sampler import Sampler
    from generation.state import GenerationState
    from model.cache import FullCache
    from training.run.load import load_run

    model, _ = load_run(train_one_step())
    state = GenerationState(model, [list(range(60))], seeds=[0])
    cache = state.caches[0]
    watch = CacheWatch(cache)
    with watched(FullCache, "update", watch.update), watched(FullCache, "grow", watch.grow):
        list(generate(model, state, Sampler(temperature=0.0), max_new_tokens=8))
    length = int(state.rows.lengths[0])
    cache.rewind(torch.tensor([length - 4]))
    readable = int((cache.read(torch.tensor([length - 4])).positions >= 0).sum())
    print(f"rewind: of {length} positions the last 4 are taken back; {readable} can be read")


def main() -> None:
    for name in SECTIONS:
        print(f"# {name}")
        SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
