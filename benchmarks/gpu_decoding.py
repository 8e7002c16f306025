"""How benchmarks.gpu measures decoding: rows, each with a function that measures it. Weights are in bfloat16, texts are
drawn greedily, in a vocabulary that stands for GPT-2's."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.decode_models import fill
from generation.compiled_step import CompiledStep
from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model import cost
from model.decode_layout import lay_out_for_decoding
from model.initialise import initialised
from model.transformer import ModelConfig, TransformerLM
from runtime.memory import allocated_peak
from runtime.precision import MixedPrecision
from training.run.config import compose

ATTENTIONS = ("mha", "gqa", "mla")
EXECUTIONS = {
    "mha": ("attention=mha",),
    "gqa": ("attention=gqa",),
    **{f"mla {name}": ("attention=mla", f"attention.execution={name}") for name in ("absorbed", "expanded", "naive")},
}
TEXTS = (1, 8)
ROUNDS = 3
Measured = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


class Extent(NamedTuple):
    """How much is asked of the machine."""

    device: torch.device
    sizes: tuple[str, ...]  # of conf/model
    vocab: int
    new: int  # tokens of a text after its prompt
    contexts: tuple[int, ...]  # tokens of long texts
    compiled: bool


def decoding(extent: Extent) -> Iterator[Measured]:
    """Time to the first token of prompts of half the context, and from token to token; eagerly, and as --compile has it
    (CUDA graphs on a GPU): of one text of the smaller size only, for compiling takes a minute."""
    for size, attention, texts in itertools.product(extent.sizes, ATTENTIONS, TEXTS):
        row = {"size": size, "attention": attention, "texts": texts}
        compiles = extent.compiled and size == extent.sizes[0] and texts == 1
        ways = ("eager", "compiled") if compiles else ("eager",)
        for way in ways:
            yield row | {"how": way}, lambda row=row, way=way: _texts(extent, row, way == "compiled")


def executions(extent: Extent) -> Iterator[Measured]:
    """From token to token after long contexts, whose KV cache is filled with made-up numbers: MLA absorbed, expanded,
    and with the keys and values of all heads cached, beside MHA and GQA."""
    size = extent.sizes[0]
    for context, texts, (name, choice) in itertools.product(extent.contexts, TEXTS, EXECUTIONS.items()):
        row = {"size": size, "attention": name, "texts": texts, "context": context}
        yield row, lambda choice=choice, row=row: _after_long_context(extent, choice, row)


def long_prompts(extent: Extent) -> Iterator[Measured]:
    """Seconds and peak memory of the pass over one prompt as long as the longest context, beyond the weights."""
    for attention in ATTENTIONS:
        row = {"size": extent.sizes[0], "attention": attention, "tokens": extent.contexts[-1] - 1}
        yield row, lambda attention=attention, row=row: _long_prompt(extent, attention, row["tokens"])


def _texts(extent: Extent, row: dict[str, Any], compiled: bool) -> dict[str, Any]:
    model = _model(extent, row["size"], f"attention={row['attention']}", texts=row["texts"])
    step = CompiledStep(extent.new, extent.device) if compiled else None
    prompt = model.config.context_length // 2

    def write() -> tuple[float, float]:
        state = GenerationState(model, _prompts(row["texts"], prompt), range(row["texts"]), compiled=step)
        return _timed(model, state, extent.new)

    begun = time.perf_counter()
    write()
    warm_up = time.perf_counter() - begun  # compiling is in it
    timings = [write() for _ in range(ROUNDS)]
    first = statistics.median(first for first, _ in timings)
    found = {"prompt": prompt, "warm_up_seconds": warm_up, "first_token_ms": 1e3 * first}
    return found | _steps(model, timings, row["texts"])


def _after_long_context(extent: Extent, choice: tuple[str, ...], row: dict[str, Any]) -> dict[str, Any]:
    texts, context = row["texts"], row["context"]
    model = _model(extent, row["size"], *choice, texts=texts, context=context)
    timings = []
    for _ in range(ROUNDS + 1):
        state = GenerationState(model, _prompts(texts, context - extent.new), range(texts))
        fill(state)
        timings.append(_timed(model, state, extent.new))
    return _steps(model, timings[1:], texts)


def _long_prompt(extent: Extent, attention: str, tokens: int) -> dict[str, Any]:
    model = _model(extent, extent.sizes[0], f"attention={attention}", context=tokens + 1)

    def first() -> None:
        state = GenerationState(model, _prompts(1, tokens), [0])
        next(generate(model, state, Sampler(temperature=0), max_new_tokens=1))

    first()
    begun = time.perf_counter()
    first()
    seconds = time.perf_counter() - begun
    cache = cost.cache_bytes(model, tokens + 1)
    peak = _peak(first, extent.device)
    return {"first_token_seconds": seconds, "peak_mb": peak / 1e6, "cache_mb": cache / 1e6}


def _peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes beyond what was allocated before."""
    if device.type != "cuda":
        return allocated_peak(run)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _model(extent: Extent, size: str, *choice: str, texts: int = 1, context: int | None = None) -> TransformerLM:
    """context: its length, if not that of the size."""
    config = _config(size, *choice)
    if context is not None:
        config = config.model_copy(update={"context_length": context})
    model = initialised(config, extent.vocab).to(extent.device)
    model = MixedPrecision(model, "bf16").model
    lay_out_for_decoding(model, texts)
    return model


@functools.cache
def _config(size: str, *choice: str) -> ModelConfig:
    return compose(f"model={size}", *choice).model


def _prompts(texts: int, tokens: int) -> list[list[int]]:
    return [[1 + i % 1000 for i in range(tokens)]] * texts


def _timed(model: TransformerLM, state: GenerationState, new: int) -> tuple[float, float]:
    """Seconds to the first token, and of each further one: until it is on the host."""
    steps = generate(model, state, Sampler(temperature=0), max_new_tokens=new)
    begun = time.perf_counter()
    next(steps)
    first = time.perf_counter() - begun
    further = sum(1 for _ in steps)
    return first, (time.perf_counter() - begun - first) / further


def _steps(model: TransformerLM, timings: Sequence[tuple[float, float]], texts: int) -> dict[str, Any]:
    step = statistics.median(step for _, step in timings)
    held = cost.cache_bytes_per_token(model)
    return {"ms": 1e3 * step, "tokens_per_second": texts / step, "cache_bytes_per_token": held}
