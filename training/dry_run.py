"""What a run would cost, without the run: from shapes, and from parts of a step of the real model, on whose speed the
time depends. Nothing is written but the prepared corpus, and nothing is downloaded."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import out_of_memory
from common.console import clock
from common.errors import UserError
from common.streams import print_line
from data.batches import check_split_lengths
from data.shards.prepare import Prepared, missing, prepare
from model import cost
from runtime.allocator import keep_buffers
from runtime.memory import free_memory
from runtime.precision import MixedPrecision
from training.compile import maybe_compiled
from training.epochs import epochs, repetition_warnings, tokens_of_epoch
from training.monitor.mfu import flops_of, peak_flops
from training.run.config import Run
from training.state import TrainState
from training.step import accumulate_gradients, losses_of, train_step

TIMED = 10  # micro-batches, or as many as fit into
DEADLINE = 5.0  # seconds for them; a micro-batch that alone takes longer is never run,
PART = 128  # but so many tokens
HELD = 1.8  # times the bytes of its tensors, what a process holds on a CPU, whose allocator leaves gaps: 1.75 was seen
USUAL_MFU = 0.4  # what is assumed where no step can be timed
log = logging.getLogger("headroom")


def dry_run(run: Run, device: torch.device, done: int, check: Callable[[Prepared], Any]) -> None:
    """Prints the costs, and what could not be known without the documents or the tokenizer. Prepares what needs no
    download.

    run: with its precision chosen. done: steps that a run to be resumed has behind it. check: called with the corpus
    where it is there, to refuse what training would. Raises UserError where nothing is left to do, or where the
    documents there are do not fit the run.
    """
    if done >= run.steps:
        raise UserError(f"{done} steps of this run are done, steps={run.steps}: give a larger steps=")
    corpus, lacking = _prepared(run, check)
    if corpus is None:
        vocab_size = run.tokenizer.max_vocab_size
        flops = cost.flops(run.model, vocab_size)
    else:
        vocab_size = corpus.tokenizer.vocab_size
        flops = flops_of(run.model, corpus, run.data.document_mask)
    keys = ""
    if run.data.document_mask:
        keys = " within documents" if corpus else ", an upper bound: pairs across documents are counted"
    parts = memory(run, vocab_size, device)
    for line in _shapes(run, vocab_size, flops, keys, parts, device):
        print_line(line)
    for line in _plan(run, corpus, done):  # before what takes a while
        print_line(line)
    print_line(_duration(run, vocab_size, flops, sum(parts.values()), device, done))
    if corpus is None:
        print_line(f"not known    how many epochs that is; the vocabulary is taken as {vocab_size:,} tokens")
        for line in lacking:
            print_line(f"missing      {line}")
    kept = f", and nothing kept but the prepared documents, in {corpus.folder}" if corpus else " or kept"
    print_line(f"dry run      nothing was trained{kept}: leave dry_run=true out to train")


def _prepared(run: Run, check: Callable[[Prepared], Any]) -> tuple[Prepared | None, list[str]]:
    """The corpus, or all that is missing for it, a line each."""
    cache_dir = Path(run.cache_dir)
    try:
        corpus = prepare(run.data, run.tokenizer, cache_dir, download=False)
    except UserError as error:
        return None, missing(run.data, run.tokenizer, cache_dir) or [str(error)]
    check_split_lengths(corpus, run.model.context_length)
    check(corpus)
    return corpus, []


def memory(run: Run, vocab_size: int, device: torch.device) -> dict[str, int]:
    """Bytes of tensors at the peak of a training step, by what they are. Activations are all that is neither of the
    others: what the backward pass needs of a micro-batch, and what is alive for a moment. The step's own code is run on
    the meta device for it, eagerly: a compiled one takes less."""
    micro_steps = min(2, run.sequences // run.micro_batch_size)  # the second meets the gradients of the first
    batch = torch.zeros(run.micro_batch_size, run.model.context_length, dtype=torch.int64, device="meta")
    with cost.LivePeak() as live:
        mixed = MixedPrecision(cost.on_meta(run.model, vocab_size, device=device), run.precision)
        accumulate_gradients(mixed, [(batch, batch)] * micro_steps, (0, 0), _loss(run, vocab_size))
    weights = sum(p.nbytes for p in mixed.parameters)
    known = {
        "weights": weights,
        "gradients": weights,
        "optimizer": run.optim.state_bytes(cost.on_meta(run.model, vocab_size)),
        "copies": sum(copy.nbytes for copy in mixed.copies),
    }
    return known | {"activations": max(0, live.bytes - 2 * weights - known["copies"])}


def _shapes(
    run: Run, vocab_size: int, flops: cost.Flops, keys: str, parts: dict[str, int], device: torch.device
) -> Iterator[str]:
    """keys: what is to be said of the number of keys. parts: of the memory."""
    model = cost.on_meta(run.model, vocab_size)
    counts = cost.parameters(model)
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"parameters   {sum(counts.values()):,}: {listed}{' (tied to the embedding)' if model.head is None else ''}"
    yield (
        f"flops        {flops.training():,.0f} per token of training, {flops.forward():,.0f} forward "
        f"({flops.per_pair * flops.keys / flops.forward():.0%} of it attention, over {flops.keys:,.1f} keys on average"
        f"{keys})"
    )
    yield (
        f"cache        {cost.cache_bytes_per_token(model):,} bytes per token when decoding in float32, "
        f"{cost.cache_bytes(model, run.model.context_length):,} for a full context"
    )
    where = "on the GPU" if device.type == "cuda" else "besides what Python and PyTorch take themselves"
    yield (
        f"memory       about {size(sum(parts.values()))} of tensors at the peak of a step {where}: "
        f"{', '.join(f'{name} {size(number)}' for name, number in parts.items())} (micro-batches of "
        f"{run.micro_batch_size} x {run.model.context_length}, {run.precision}); {_otherwise(run, vocab_size, device)}"
    )


def _otherwise(run: Run, vocab_size: int, device: torch.device) -> str:
    """What the activations would take with the other choice of what is kept of them."""
    other = run.model_copy(update={"activation_checkpointing": not run.activation_checkpointing})
    activations = memory(other, vocab_size, device)["activations"]
    return f"activation_checkpointing={str(not run.activation_checkpointing).lower()}: activations {size(activations)}"


def _plan(run: Run, corpus: Prepared | None, done: int) -> Iterator[str]:
    tokens = run.steps * run.batch_tokens
    behind = f" ({done:,} are done)" if done else ""
    read = f", {epochs(run, corpus)} epochs of {tokens_of_epoch(run, corpus):,}" if corpus else ""
    yield f"training     {run.steps:,} steps{behind} of {run.batch_tokens:,} tokens each: {tokens:,} tokens{read}"
    if corpus:
        yield from repetition_warnings(run, corpus, done)


def _duration(run: Run, vocab_size: int, flops: cost.Flops, needed: int, device: torch.device, done: int) -> str:
    """needed: bytes of memory. Where they are not free, nothing is timed: a system that runs out of memory kills."""
    left, free, held = run.steps - done, free_memory(device), needed * (HELD if device.type == "cpu" else 1)
    reason = f"it may take {size(held)}, {size(free)} are free" if free is not None and held > free else None
    if reason is None:
        try:
            seconds, measured = _timed(run, vocab_size, flops, device)
            return (
                f"time         about {clock(left * seconds)} for {left:,} steps, reading, evaluating and saving not "
                f"counted: {run.batch_tokens / seconds:,.0f} tokens per second on this {device.type}, from {measured}"
            )
        except Exception as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
    peak = peak_flops(device, run.precision, run.peak_flops)
    if peak is None:
        return (
            f"time         n/a: no step can be timed here ({reason}), and the peak of this {device.type} is not known"
        )
    per_token = flops.training() + (flops.forward() if run.activation_checkpointing else 0)
    seconds = left * run.batch_tokens * per_token / (USUAL_MFU * peak)
    return (
        f"time         about {clock(seconds)} for {left:,} steps, if {USUAL_MFU:.0%} of {peak:.3g} FLOPs per second "
        f"are reached: no step can be timed here ({reason})"
    )


def _timed(run: Run, vocab_size: int, flops: cost.Flops, device: torch.device) -> tuple[float, str]:
    """Seconds per step of the real model, put together from those of its parts, and which were timed. The tokens are
    made up: real ones take as long, and may not be there."""
    if device.type == "cpu" and run.tune_malloc:
        keep_buffers()
    state = TrainState.create(run, vocab_size, device)
    mixed = state.mixed
    shape, pieces = (run.micro_batch_size, run.model.context_length), run.sequences // run.micro_batch_size
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(run.seed)).to(device)

    def micro_batch(loss: Callable, tokens: Tensor) -> float:
        return _seconds(device, lambda: mixed.backward(loss(mixed.model, tokens, tokens) / pieces))

    def update() -> float:
        """With the gradients there are: all that a step does besides its micro-batches."""
        return _seconds(device, lambda: train_step(mixed, state.optimizer, [], run.lr(0), run.clip_norm))

    def work(tokens: Tensor) -> float:
        return tokens.numel() * flops.training(min(flops.keys, (tokens.shape[1] + 1) / 2))

    part = tokens[: max(1, PART // shape[1]), :PART]
    few = part[:1, : PART // 8]  # whose time is nearly all overhead: what a micro-batch takes whatever its length
    log.info(f"timing {part.numel():,} tokens")
    eager = _loss(run, vocab_size)
    mixed.copy_master_weights()
    for each in (few, part):
        micro_batch(eager, each)  # the first one on a device waits for what is loaded once
    overhead, seconds = micro_batch(eager, few), micro_batch(eager, part)
    if part.numel() > few.numel():
        seconds += max(0.0, seconds - overhead) * (work(tokens) - work(part)) / (work(part) - work(few))
    if seconds > DEADLINE:
        measured = f"{part.numel():,} tokens{', not compiled,' if run.compile else ''} and one update"
        measured += f" (a micro-batch would take {clock(seconds)}, too long for a dry run)"
    else:
        loss = maybe_compiled(eager, *run.compilation)
        micro_batches, seconds = _time_micro_batches(lambda: micro_batch(loss, tokens), update, compiled=run.compile)
        measured = f"{micro_batches} and one update"
    updating = update()
    step = pieces * seconds + updating
    return step, f"{measured}; the update takes {updating / step:.0%} of a step"


def _time_micro_batches(
    micro_batch: Callable[[], float], update: Callable[[], float], compiled: bool
) -> tuple[str, float]:
    """How many were timed, in words, and the mean seconds of one. The first of each warms up and does not count."""
    log.info(f"timing up to {TIMED} micro-batches, for {DEADLINE:.0f} s{', and compiling' if compiled else ''}")
    micro_batch()
    update()
    times: list[float] = []
    while len(times) < TIMED and sum(times) < DEADLINE:
        times.append(micro_batch())
    return ("a micro-batch" if len(times) == 1 else f"{len(times)} micro-batches"), sum(times) / len(times)


def _loss(run: Run, vocab_size: int) -> Callable:
    end_of_text = vocab_size - 1  # the last token of every vocabulary
    return losses_of(run.data, end_of_text, activation_checkpointing=run.activation_checkpointing)[0]


def _seconds(device: torch.device, what: Callable[[], Any]) -> float:
    start = time.perf_counter()
    what()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def size(count: float) -> str:
    """Bytes as a person reads them."""
    exponent = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
