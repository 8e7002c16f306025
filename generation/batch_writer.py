"""Samples written side by side: their texts, how each ended, how fast they came."""

import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

from common.errors import NotFinite
from common.signals import Interruptible
from common.streams import print_stderr, show
from data.tokenizers.base import Tokenizer
from generation.decode import ENDED, generate
from generation.sampler import Sampler
from generation.state import GenerationState
from generation.text_stream import TextStream
from model.transformer import TransformerLM


class Sample:
    """What was written in one row of a batch."""

    def __init__(self, seed: int, prompt_tokens: int, tokenizer: Tokenizer, stops: Sequence[str]):
        self.seed, self.prompt_tokens, self.stream = seed, prompt_tokens, TextStream(tokenizer, stops)
        # or stop: a stop string; end: of the document; context: it is full; interrupted; not_finite: the model's output
        self.finish = "length"
        self.times = [time.perf_counter()]  # of the beginning, and of each token

    @property
    def text(self) -> str:
        return self.stream.text

    @property
    def tokens(self) -> int:
        """How many were drawn: those of a stop string and an end of text too, which do not show."""
        return len(self.times) - 1

    def described(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "text": self.text,
            "seed": self.seed,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish": self.finish,
            **speeds([self]),
        }


def write(
    model: TransformerLM,
    tokenizer: Tokenizer,
    sampler: Sampler,
    texts: GenerationState,
    samples: Sequence[Sample],
    max_new_tokens: int,
) -> Generator[str, None, None]:
    """Continues each text into its sample, and yields the first one's piece by piece, as it becomes certain.
    Ctrl-C ends them after the token, a second one is a KeyboardInterrupt at once. An output that is not finite ends the
    texts that it is of."""
    end = tokenizer.end_of_text
    with Interruptible() as interruption:
        with suppress(NotFinite):
            for step in generate(model, texts, sampler, max_new_tokens=max_new_tokens, end_token=end):
                now = time.perf_counter()
                for row, (token, sample) in enumerate(zip(step.tolist(), samples, strict=True)):
                    if token == ENDED:
                        continue
                    sample.times.append(now)
                    piece = sample.stream.feed(token)
                    if sample.stream.stopped:
                        sample.finish, texts.alive[row] = "stop", False
                    elif token == end:
                        sample.finish = "end"
                    elif not texts.alive[row]:
                        sample.finish = "context"
                    if row == 0:
                        yield piece
                if interruption.asked:
                    for alive, sample in zip(texts.alive, samples, strict=True):
                        if alive and sample.tokens < max_new_tokens:
                            sample.finish = "interrupted"
                    break
        for broken, sample in zip(texts.not_finite, samples, strict=True):
            if broken:
                sample.finish = "not_finite"
        rest = [sample.stream.close() for sample in samples]
        yield rest[0]


def show_samples(prompt: str, pieces: Generator[str, None, None], samples: Sequence[Sample], limit: int) -> None:
    """The first sample as it comes, then the others: the texts to stdout, what is said of them to stderr."""
    notes = {"end": "[end of document]", "context": f"[the context of {limit} tokens is full]"}
    for i, one in enumerate(samples):
        if len(samples) > 1:
            print_stderr(f"[sample {i + 1} of {len(samples)}, seed {one.seed}]")
        show(prompt)
        try:
            for piece in pieces if i == 0 else [one.text]:
                show(piece)
        finally:
            show("\n")
        if one.finish in notes:
            print_stderr(notes[one.finish])


def speeds(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Of all samples together. The first token of each comes with its prompt; None where there is none, or no second
    one."""
    written = [sample for sample in samples if sample.tokens]
    if not written:
        return {"prefill_tokens_per_second": None, "decode_tokens_per_second": None}
    begin = samples[0].times[0]
    first, last = min(sample.times[1] for sample in written), max(sample.times[-1] for sample in written)
    decoded = sum(sample.tokens - 1 for sample in written)
    return {
        "prefill_tokens_per_second": round(sum(sample.prompt_tokens for sample in samples) / (first - begin), 1),
        "decode_tokens_per_second": round(decoded / (last - first), 1) if decoded else None,
    }
