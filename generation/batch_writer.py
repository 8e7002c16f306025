"""Samples generated as one batch: their texts, why each ended, how fast they came, and how they are printed."""

import itertools
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from common.errors import NotFinite
from common.signals import DeferredInterrupt
from common.streams import json_line, print_stderr, show
from data.tokenizers.base import Tokenizer
from generation.decode import ENDED, generate
from generation.sampler import Sampler
from generation.state import GenerationState
from generation.text_stream import TextStream
from model.cost import weight_bytes_read
from model.transformer import TransformerLM
from runtime.bandwidth import seconds_per_byte


class Sample:
    """The text generated in one row of a batch."""

    def __init__(self, seed: int, num_prompt_tokens: int, tokenizer: Tokenizer, stops: Sequence[str]):
        self.seed = seed
        self.num_prompt_tokens = num_prompt_tokens
        self.end_token = tokenizer.end_of_text
        self.stream = TextStream(tokenizer, stops)
        # or stop: a stop string; end: of the document; context: it is full; interrupted; not_finite: the model's output
        self.finish = "length"
        self.times = [time.perf_counter()]  # when generation started, and when each token came

    @property
    def text(self) -> str:
        return self.stream.text

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens, with those of a stop string and the end of text, which are not shown."""
        return len(self.times) - 1

    def feed(self, token: int, now: float) -> str:
        """Add a sampled token -> the text that no stop string can change any more."""
        self.times.append(now)
        piece = self.stream.feed(token)
        if self.stream.stopped:
            self.finish = "stop"
        elif token == self.end_token:
            self.finish = "end"
        return piece

    def as_json(self) -> dict[str, Any]:
        """The sample as JSON values."""
        return {
            "text": self.text,
            "seed": self.seed,
            "tokens": self.num_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "finish": self.finish,
            **speeds([self]),
        }


def write(
    model: TransformerLM,
    tokenizer: Tokenizer,
    sampler: Sampler,
    state: GenerationState,
    samples: Sequence[Sample],
    max_new_tokens: int,
) -> Generator[str, None, None]:
    """Generate each row's text into its sample, and stream the first one's. The first Ctrl-C ends all after the current
    token, a second one raises KeyboardInterrupt at once. A row whose output is not finite ends; the others go on."""
    steps = generate(model, state, sampler, max_new_tokens=max_new_tokens, end_token=tokenizer.end_of_text)
    with DeferredInterrupt() as interrupt:
        with suppress(NotFinite):
            for step in steps:
                yield _feed_step(step, state, samples)
                if interrupt.requested:
                    break
        _note_ends(state, samples, max_new_tokens, interrupt.requested)
        rest = [sample.stream.close() for sample in samples]
        yield rest[0]


def _feed_step(step: Tensor, state: GenerationState, samples: Sequence[Sample]) -> str:
    """Hand each row's tokens (B, k) to its sample, and end rows at a stop string -> the first row's piece of text."""
    now = time.perf_counter()
    pieces = [""] * len(samples)
    for row, (tokens, sample) in enumerate(zip(step.tolist(), samples, strict=True)):
        for token in tokens:
            if token != ENDED and not sample.stream.stopped:
                pieces[row] += sample.feed(token, now)
                if sample.stream.stopped:
                    state.end(row)
    return pieces[0]


def _note_ends(state: GenerationState, samples: Sequence[Sample], max_new_tokens: int, interrupted: bool) -> None:
    """Write into each sample why it ended, where its last token does not say so."""
    for row, sample in enumerate(samples):
        if state.rows.not_finite[row]:
            sample.finish = "not_finite"
        elif sample.finish == "length" and not state.rows.alive[row]:
            sample.finish = "context"
        elif interrupted and sample.finish == "length" and sample.num_tokens < max_new_tokens:
            sample.finish = "interrupted"


def show_samples(prompt: str, pieces: Generator[str, None, None], samples: Sequence[Sample], limit: int) -> None:
    """Print the first sample as it comes, then the others: the texts to stdout, notes on them to stderr. limit: tokens
    of the context."""
    notes = {"end": "[end of document]", "context": f"[the context of {limit} tokens is full: --context slide goes on]"}
    for i, sample in enumerate(samples):
        if len(samples) > 1:
            print_stderr(f"[sample {i + 1} of {len(samples)}, seed {sample.seed}]")
        show(prompt)
        try:
            for piece in pieces if i == 0 else [sample.text]:
                show(piece)
        finally:
            show("\n")
        if sample.finish in notes:
            print_stderr(notes[sample.finish])


def print_json_samples(prompt: str, pieces: Generator[str, None, None], samples: Sequence[Sample]) -> None:
    """Generate all samples, then print a JSON object for each."""
    for _ in pieces:
        pass
    for sample in samples:
        print(json_line({"prompt": prompt, **sample.as_json()}), flush=True)


def print_stats(model: TransformerLM, samples: Sequence[Sample], state: GenerationState) -> None:
    """Print the wait for the first token, throughput, the KV cache's size, and how near decoding came to the time that
    reading memory takes, to stderr."""
    stats = {
        "first_token_seconds": first_token_seconds(samples),
        **speeds(samples),
        "cache_bytes_per_token": sum(cache.bytes_per_token for cache in state.caches or []),
        "cache_bytes": cached_bytes(state),
        "share_of_bandwidth_floor": share_of_floor(model, state, samples),
        **({} if state.speculation is None else state.speculation.stats()),
        **({} if state.compiled is None else {"compile_seconds": round(state.compiled.seconds, 1)}),
    }
    for name, value in stats.items():
        print_stderr(f"{name}={'n/a' if value is None else value}")


def first_token_seconds(samples: Sequence[Sample]) -> float | None:
    """Seconds from the start of generation to the first token; None without one."""
    first = min((sample.times[1] for sample in samples if sample.num_tokens), default=None)
    return None if first is None else round(first - samples[0].times[0], 6)


def cached_bytes(state: GenerationState) -> int:
    """Bytes that the KV caches of all rows hold."""
    caches = [*(state.caches or []), *(state.speculation.caches if state.speculation else [])]
    return sum(cache.bytes_per_sequence for cache in caches) * len(state.tokens)


def share_of_floor(model: TransformerLM, state: GenerationState, samples: Sequence[Sample]) -> float | None:
    """Time to read the weights and the KV caches once, at the bandwidth measured now, as a share of the median step's
    from one token to the next; with speculation, of the mean pass after the prompt's. 1: decoding is limited by nothing
    else. None where there was no such step."""
    moments = sorted({moment for sample in samples for moment in sample.times[1:]})
    if len(moments) < 2:
        return None
    step = statistics.median(after - before for before, after in itertools.pairwise(moments))
    if state.speculation is not None:
        step = decode_seconds(samples) / max(1, state.speculation.passes - 1)
    drafts = state.speculation is not None and state.speculation.reads_hidden
    read = cached_bytes(state) + weight_bytes_read(model, len(state.tokens), drafts)
    return round(read * seconds_per_byte(next(model.parameters()).device) / step, 4)


def speeds(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Prefill and decode throughput, tokens per second of all samples together. The first token of each belongs to the
    prefill; None where there is no token, or no second one."""
    written = [sample for sample in samples if sample.num_tokens]
    if not written:
        return {"prefill_tokens_per_second": None, "decode_tokens_per_second": None}
    begin = samples[0].times[0]
    first = min(sample.times[1] for sample in written)
    decoded = sum(sample.num_tokens - 1 for sample in written)
    return {
        "prefill_tokens_per_second": round(sum(sample.num_prompt_tokens for sample in samples) / (first - begin), 1),
        "decode_tokens_per_second": round(decoded / decode_seconds(samples), 1) if decoded else None,
    }


def decode_seconds(samples: Sequence[Sample]) -> float:
    """Seconds from the first token of all samples to the last; 0 where there is none."""
    moments = [moment for sample in samples for moment in sample.times[1:]]
    return max(moments, default=0.0) - min(moments, default=0.0)


def check_finished(samples: Sequence[Sample]) -> None:
    """Raise KeyboardInterrupt where Ctrl-C ended a sample, and NotFinite where the model's output did."""
    if any(sample.finish == "interrupted" for sample in samples):
        raise KeyboardInterrupt
    broken = [sample for sample in samples if sample.finish == "not_finite"]
    if broken:
        where = ", ".join(
            f"{sample.num_prompt_tokens + sample.num_tokens} tokens (seed {sample.seed})" for sample in broken
        )
        raise NotFinite(f"the model's output is not finite after {where}")
