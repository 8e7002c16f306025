"""Smoke test of the whole program on this machine: train, stop, resume, sample, compile, predict memory.

python -m benchmarks.gpu --smoke --out smoke.jsonl
python -m benchmarks.gpu --smoke --cpu                 # the same in small, to see that it runs

For each attention, the program itself trains 50 steps on made-up words, a copy of the run that lacks the second half is
resumed and compared, and its text is written with and without the cache. It needs hydra-core and pydantic besides what
benchmarks.gpu needs, no corpus and no network. On a GPU it is to end within four minutes.
"""

import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra

import train as program
from benchmarks.compare_runs import same_run
from common.conf_files import choices
from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from training.metrics_file import read_metrics
from training.run.config import Run
from training.run.folder import read_config
from training.run.load import load_run
from training.step_memory import memory

STEPS, SAVED = 50, 25
WRITTEN = 48  # tokens
COMPILED = ("mha", "mla")
Row = dict[str, Any]


def smoke(device: torch.device) -> Iterator[tuple[Row, Any]]:
    """(what is tried, a function that measures it) for each row."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for attention in choices("attention"):
            yield {"attention": attention, "what": "train, resume, sample"}, lambda a=attention: _whole_way(a, device)
        for attention in COMPILED:
            yield {"attention": attention, "what": "compile"}, lambda a=attention: _compiled(a, device)
        for attention in COMPILED:
            yield {"attention": attention, "what": "memory"}, lambda a=attention: _memory(a, device)


def _train(*overrides: str) -> float:
    """Runs train.py in this process, its output on stderr -> seconds. Raises RuntimeError where it fails."""
    GlobalHydra.instance().clear()
    arguments, sys.argv = sys.argv, ["train.py", *overrides]
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            program.main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"train.py {' '.join(overrides)} ended with exit code {stop.code}") from None
    finally:
        sys.argv = arguments
    return time.perf_counter() - start


def _options(attention: str, device: torch.device, steps: int = STEPS, size: str | None = None) -> list[str]:
    """size: of conf/model; unset, a small one."""
    cuda = device.type == "cuda"
    size = [f"model={size or ('tiny' if cuda else 'mini')}", f"batch_tokens={16384 if cuda else 1024}"]
    run = [f"steps={steps}", f"save_every={SAVED}", "eval_every=1000", "eval_tokens=1024", "data.size=100"]
    choice = [f"attention={attention}", f"device={device.type}", "tune_malloc=false"]
    return ["data=synthetic", "tokenizer=byte", *size, *run, *choice]


def _whole_way(attention: str, device: torch.device) -> Row:
    whole, half = Path(f"{attention}-whole"), Path(f"{attention}-half")
    seconds = _train(*_options(attention, device), "deterministic=true", f"run_dir={whole}")
    shutil.copytree(whole, half)
    shutil.rmtree(half / f"checkpoints/step_{STEPS:08d}")
    _train(f"resume={half}")
    losses = [row["train_loss"] for row in read_metrics(whole / "metrics.jsonl")]
    model, tokenizer = load_run(whole, device)
    texts = [_text(model, tokenizer, cached) for cached in (True, False)]
    return {
        "precision": read_config(whole)[0]["precision"],
        "seconds": round(seconds, 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "learns": losses[-1] < losses[0] - 1 and all(map(math.isfinite, losses)),
        "resumed_bit_for_bit": same_run(whole, half, STEPS),
        "cached_text_is_uncached": texts[0] == texts[1],
        "text": texts[0],
    }


def _text(model: Any, tokenizer: Any, cached: bool) -> str:
    state = GenerationState(model, [tokenizer.encode("The ").tolist()], [0], cached=cached)
    steps = generate(model, state, Sampler(temperature=0), max_new_tokens=WRITTEN)
    return tokenizer.decode([int(step) for step in steps])


def _compiled(attention: str, device: torch.device) -> Row:
    """The first losses of a compiled run beside those of an eager one."""
    found = {}
    for compiled in ("false", "true"):
        run = Path(f"{attention}-{compiled}")
        seconds = _train(*_options(attention, device, 8), f"compile={compiled}", f"run_dir={run}")
        found[compiled] = seconds, [row["train_loss"] for row in read_metrics(run / "metrics.jsonl")]
    error = max(abs(a - b) for a, b in zip(found["false"][1], found["true"][1], strict=True))
    return {"eager_seconds": found["false"][0], "compiled_seconds": found["true"][0], "largest_difference": error}


def _memory(attention: str, device: torch.device) -> Row:
    """Peak memory as a dry run predicts it, and on a GPU as the allocator measured it."""
    size, folder = "gpt2" if device.type == "cuda" else "mini", Path(f"{attention}-memory")
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    options = [
        option for option in _options(attention, device, 3) if not option.startswith(("model=", "batch_tokens="))
    ]
    _train(*options, f"model={size}", "batch_tokens=8192", "micro_batch_size=4", f"run_dir={folder}")
    measured = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    predicted = memory(Run.from_tree(read_config(folder)[0]), 257, device).peak
    row = {"size": size, "predicted_mb": predicted / 1e6}
    return row | ({"measured_mb": measured / 1e6, "ratio": predicted / measured} if measured else {})


def verdict(rows: list[Row]) -> Row:
    """Summarise the rows: passed, and what failed."""
    failed = [json.dumps(row) for row in rows if "failed" in row or "refused" in row]
    checks = ("learns", "resumed_bit_for_bit", "cached_text_is_uncached")
    failed += [f"{row['attention']}: not {check}" for row in rows for check in checks if row.get(check) is False]
    failed += [f"{row['attention']}: compiled" for row in rows if row.get("largest_difference", 0) > 0.1]
    failed += [f"{row['attention']}: memory" for row in rows if not 0.9 <= row.get("ratio", 1) <= 1.1]
    return {"passed": not failed, "failures": failed}
