"""How fast trained models decode on this machine: one text, through the cache of each attention."""

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import out_of_memory
from common.console import level_of_log
from common.errors import NotFinite, Unsupported, UserError
from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model.decode_layout import lay_out_for_decoding
from model.transformer import TransformerLM
from runtime.device import choose_device
from training.run.load import load_run

TOKENS = 64  # of a text, at most: half of a short context
ROUNDS = 3  # in which the models take turns, so that what disturbs the machine disturbs all
MAX_SECONDS = 10.0  # of one text


def decode_speeds(folders: Sequence[Path]) -> list[float | None]:
    """New tokens per second of each run's newest model, in float32, the prompt not counted: the median of several
    rounds. None where the run has no whole checkpoint, or its output is not finite."""
    with level_of_log(logging.WARNING):  # which kernel runs is a matter of speed
        return _measured([_model(folder) for folder in folders])


def _measured(models: Sequence[TransformerLM | None]) -> list[float | None]:
    speeds: list[list[float]] = [[] for _ in models]
    for turn in range(ROUNDS + 1):
        for model, found in zip(models, speeds, strict=True):
            speed = None if model is None else _speed(model)
            if speed is not None and turn:  # the first round warms up
                found.append(speed)
    return [statistics.median(found) if found else None for found in speeds]


def _model(folder: Path) -> TransformerLM | None:
    try:
        model = load_run(folder, choose_device("auto"))[0]
    except UserError:
        return None
    lay_out_for_decoding(model)  # as sample.py does
    return model


def _speed(model: TransformerLM) -> float | None:
    """Greedy, so that all do the same besides their model; the first token, with the prompt's pass, is not counted."""
    length = min(TOKENS, model.config.context_length // 2)
    state = GenerationState(model, [[0] * length], seeds=[0])
    steps = generate(model, state, Sampler(temperature=0.0), max_new_tokens=length)
    try:
        next(steps)
        begun = time.perf_counter()
        count = 0
        for _ in steps:  # which wait for the device
            count += 1
            if time.perf_counter() - begun > MAX_SECONDS:
                break
    except (NotFinite, Unsupported, UserError, StopIteration):
        return None
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error) is None:
            raise
        return None
    return count / (time.perf_counter() - begun) if count else None
