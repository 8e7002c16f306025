"""What benchmarks.decode times: ours and peers, freshly initialised, each with a function that writes texts."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.litgpt import litgpt_of
from benchmarks.nanogpt import nanogpt_of
from benchmarks.side_by_side import Meter, Reading
from benchmarks.train import OURS, Size, hugging_model, run_of
from generation.compiled_step import CompiledStep
from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model import cost
from model.cache import ColumnCache
from model.decode_layout import lay_out_for_decoding
from model.initialise import initialised
from runtime.precision import MixedPrecision

TOP_K = 50
SAMPLER = Sampler(temperature=1.0, top_k=TOP_K)
RECOMPUTED = 1024  # tokens of the longest text that is recomputed for each token
MADE_UP = 0.1  # in a KV cache that was not computed: a step takes as long, whatever the numbers


class Texts(NamedTuple):
    """What is to be written."""

    rows: int
    prompt: int  # tokens
    new: int  # tokens after it
    made_up: bool  # whether the KV cache of the prompt is filled with made-up numbers instead of being computed


class Written(NamedTuple):
    """How long that took."""

    first: float  # seconds to the first token
    further: int  # tokens after it
    reading: Reading  # of these
    cache: int  # bytes held at the end

    @property
    def step(self) -> float:
        """Seconds of each further token."""
        return self.reading.seconds / self.further

    @property
    def own(self) -> float:
        """Seconds of CPU time of each further token."""
        return self.reading.own / self.further


class Writer(NamedTuple):
    """A model."""

    cache_per_token: int  # bytes of one text
    write: Callable[[Texts], Written]
    recomputes_up_to: int | None = None  # tokens of a text, where there is no cache


Maker = Callable[[], tuple[nn.Module, Writer]]


class Peers(NamedTuple):
    """Where peers are found that are not installed, and how they draw."""

    nanogpt: Path | None
    litgpt: Path | None
    draw: Callable[[Tensor], Tensor]  # logits (B, V) -> tokens (B, 1)


def ours(size: Size, precision: str, executions: list[str], compiled_for: int | None) -> dict[str, Maker]:
    """executions: of MLA, besides its own choice. compiled_for: as many new tokens; None: eager."""
    choices = {f"ours {attention}": (f"attention={attention}",) for attention in OURS}
    for execution in executions:
        choices[f"ours mla {execution}"] = ("attention=mla", f"attention.execution={execution}")
    suffix = "" if compiled_for is None else ", compiled"
    return {
        f"{name}{suffix}": lambda choice=choice: _ours(size, precision, choice, compiled_for)
        for name, choice in choices.items()
    }


def peers(size: Size, precision: str, found: Peers) -> dict[str, Maker]:
    makers: dict[str, Maker] = {
        "transformers Llama": lambda: _hugging(size, precision, "Llama", found.draw),
        "transformers DeepseekV3": lambda: _hugging(size, precision, "DeepseekV3", found.draw),
        "litgpt": lambda: _litgpt(size, precision, found),
    }
    if found.nanogpt is not None:
        makers["nanoGPT"] = lambda: _nanogpt(size, precision, found)
    return makers


def fill(state: GenerationState) -> None:
    """Have the KV caches hold made-up numbers for all but the last token of every row."""
    for cache in state.caches:
        assert isinstance(cache, ColumnCache)
        for column in cache.columns.values():
            column.fill_(MADE_UP)
    state.rows = state.rows._replace(num_cached=state.rows.lengths - 1, known=None)


def _ours(size: Size, precision: str, choice: tuple[str, ...], compiled_for: int | None) -> tuple[nn.Module, Writer]:
    model = initialised(run_of(size, *choice).model, size.vocab)
    model = MixedPrecision(model, precision).model
    compiled = None if compiled_for is None else CompiledStep(compiled_for, torch.device("cpu"))
    laid_out_for = 0

    def write(texts: Texts) -> Written:
        nonlocal laid_out_for
        if texts.rows != laid_out_for:
            lay_out_for_decoding(model, texts.rows)
            laid_out_for = texts.rows
        prompts = _prompts(size, texts).tolist()
        state = GenerationState(model, prompts, seeds=range(texts.rows), compiled=compiled)
        if texts.made_up:
            fill(state)
        steps = generate(model, state, SAMPLER, max_new_tokens=texts.new)
        return _timed(steps, lambda: sum(cache.bytes_per_sequence for cache in state.caches) * texts.rows)

    return model, Writer(cost.cache_bytes_per_token(model), write)


def _hugging(size: Size, precision: str, kind: str, draw: Callable) -> tuple[nn.Module, Writer]:
    import transformers

    model = _lowered(hugging_model(kind, size), precision)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def forward(tokens: Tensor, cache: Any) -> Tensor:
        return model(tokens, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1]

    @torch.inference_mode()
    def one_token(rows: int) -> Any:
        cache = transformers.DynamicCache(config=model.config)
        forward(torch.zeros(rows, 1, dtype=torch.int64), cache)
        return cache

    def write(texts: Texts) -> Written:
        cache = one_token(texts.rows) if texts.made_up else transformers.DynamicCache(config=model.config)
        if texts.made_up:
            for layer in cache.layers:
                layer.keys, layer.values = (x.repeat(1, 1, texts.prompt - 1, 1) for x in (layer.keys, layer.values))
        steps = _drawn(lambda tokens: forward(tokens, cache), size, texts, draw)
        return _timed(steps, lambda: _bytes(cache))

    return model, Writer(_bytes(one_token(1)), write)


def _litgpt(size: Size, precision: str, found: Peers) -> tuple[nn.Module, Writer]:
    model = _lowered(litgpt_of(found.litgpt, size.shape), precision)
    dtype = model.lm_head.weight.dtype

    def buffers() -> list[Tensor]:
        return [x for block in model.transformer.h for x in (block.attn.kv_cache.k, block.attn.kv_cache.v)]

    def write(texts: Texts) -> Written:
        model.max_seq_length = texts.prompt + texts.new
        model.set_kv_cache(texts.rows, dtype=dtype)
        done = 0
        if texts.made_up:
            done = texts.prompt - 1
            for buffer in buffers():
                buffer.fill_(MADE_UP)

        def logits(tokens: Tensor) -> Tensor:
            nonlocal done
            positions = torch.arange(done, done + tokens.shape[1])
            done += tokens.shape[1]
            return model(tokens, positions, input_pos_maxp1=done)[:, -1]

        written = _timed(_drawn(logits, size, texts, found.draw), lambda: sum(x.nbytes for x in buffers()))
        model.clear_kv_cache()
        return written

    return model, Writer(2 * size.n_layers * size.d_model * dtype.itemsize, write)


def _nanogpt(size: Size, precision: str, found: Peers) -> tuple[nn.Module, Writer]:
    """Without a cache: it computes the whole text for each token."""
    size = size._replace(tokens=min(size.tokens, RECOMPUTED))
    model = _lowered(nanogpt_of(found.nanogpt, torch.device("cpu"), size.shape, lr=0.0)[0], precision)

    def write(texts: Texts) -> Written:
        text = torch.empty(texts.rows, 0, dtype=torch.int64)

        def logits(tokens: Tensor) -> Tensor:
            nonlocal text
            text = torch.cat((text, tokens), 1)
            return model(text)[0][:, -1]

        texts = texts._replace(new=2)  # each takes as long as a prompt
        return _timed(_drawn(logits, size, texts, found.draw), lambda: 0)

    return model, Writer(0, write, size.tokens)


def _lowered(model: nn.Module, precision: str) -> nn.Module:
    return (model.bfloat16() if precision == "bf16" else model).eval()


def drawn_plainly(logits: Tensor) -> Tensor:
    likeliest = logits.float().topk(TOP_K)
    return likeliest.indices.gather(-1, likeliest.values.softmax(-1).multinomial(1))


def drawn_as_ours(logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    return SAMPLER(logits, rows, rows)[:, None]


@torch.inference_mode()
def _drawn(
    logits: Callable[[Tensor], Tensor], size: Size, texts: Texts, draw: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Draw tokens from a peer. logits: of the next token (B, V), of tokens (B, T) that continue what came before."""
    tokens = _prompts(size, texts)
    if texts.made_up:
        tokens = tokens[:, -1:]
    for _ in range(texts.new):
        tokens = draw(logits(tokens))
        yield tokens


def _timed(steps: Iterator[Tensor], cache: Callable[[], int]) -> Written:
    meter = Meter()
    next(steps)
    first = meter.read().seconds
    meter = Meter()
    further = sum(1 for _ in steps)
    return Written(first, further, meter.read(), cache())


def _bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache of transformers holds."""
    layers = (vars(layer).values() for layer in cache.layers)
    return sum(value.nbytes for values in layers for value in values if isinstance(value, Tensor))


def _prompts(size: Size, texts: Texts) -> Tensor:
    return (torch.arange(texts.prompt) % size.vocab).expand(texts.rows, -1)
