"""What a run would cost, without the run: from shapes, and from a few steps of the real model, on whose speed the time
depends. Nothing is written but the prepared corpus."""

import functools
import math
import time
from collections.abc import Iterator

import torch

from data.batches import micro_batches, windows
from data.errors import UserError
from data.prepare import Prepared
from model import cost
from model.transformer import TransformerLM
from training.command import out_of_memory
from training.compilation import maybe_compiled
from training.config import Run
from training.device import free_memory
from training.log import clock
from training.mfu import peak_flops
from training.precision import Working
from training.step import accumulate, losses_of, mean_loss, train_step

WARMUP = 2  # steps before the timed ones
TIMED = 10  # steps, or as many as fit into
TIMED_SECONDS = 5.0
USUAL_MFU = 0.4  # what is assumed where no step can be timed


def dry_run(run: Run, corpus: Prepared, device: torch.device, done: int) -> None:
    """Prints the costs. run: with its precision chosen. done: steps that a run to be resumed has behind it. Raises
    UserError where nothing is left to do."""
    if done >= run.steps:
        raise UserError(f"{done} steps of this run are done, steps={run.steps}: give a larger steps=")
    for line in _shapes(run, corpus, device):
        print(line)
    print(_plan(run, corpus, done))
    print(_duration(run, corpus, device, done))
    print("dry run      nothing was trained or kept: leave dry_run=true out to train")


def memory(run: Run, vocab_size: int) -> dict[str, int]:
    """Bytes of tensors at the peak of a training step, by what they are. Activations are all that is neither of the
    others: what the backward pass needs of a micro-batch, and what is alive for a moment. The step's own code is run on
    the meta device for it, eagerly: a compiled one takes less."""
    micro_steps = min(2, run.sequences // run.micro_batch_size)  # the second meets the gradients of the first
    batch = torch.zeros(run.micro_batch_size, run.model.context_length, dtype=torch.int64, device="meta")
    with cost.LivePeak() as live:
        working = Working(cost.on_meta(run.model, vocab_size), run.precision)
        loss = functools.partial(mean_loss, end_of_text=vocab_size - 1) if run.data.document_mask else mean_loss
        accumulate(working, [(batch, batch)] * micro_steps, (0, 0), loss)
    weights = sum(p.nbytes for p in working.parameters)
    known = {
        "weights": weights,
        "gradients": weights,
        "optimizer": run.optim.state_bytes(cost.on_meta(run.model, vocab_size)),
        "copies": sum(copy.nbytes for copy in working.copies),
    }
    return known | {"activations": max(0, live.bytes - 2 * weights - known["copies"])}


def _shapes(run: Run, corpus: Prepared, device: torch.device) -> Iterator[str]:
    vocab_size = corpus.tokenizer.vocab_size
    model, flops, parts = (
        cost.on_meta(run.model, vocab_size),
        cost.flops(run.model, vocab_size),
        memory(run, vocab_size),
    )
    counts = cost.parameters(model)
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"parameters   {sum(counts.values()):,}: {listed}{' (tied to the embedding)' if model.head is None else ''}"
    yield (
        f"flops        {flops.training():,.0f} per token of training, {flops.forward():,.0f} forward "
        f"({flops.per_pair * flops.keys / flops.forward():.0%} of it attention, over {flops.keys:,.1f} keys on average)"
    )
    yield f"cache        {cost.cache_bytes_per_token(model):,} bytes per token when decoding in float32"
    where = "on the GPU" if device.type == "cuda" else "besides what Python and PyTorch take themselves"
    yield (
        f"memory       about {size(sum(parts.values()))} of tensors at the peak of a step {where}: "
        f"{', '.join(f'{name} {size(number)}' for name, number in parts.items())} (micro-batches of "
        f"{run.micro_batch_size} x {run.model.context_length}, {run.precision})"
    )


def _plan(run: Run, corpus: Prepared, done: int) -> str:
    epoch = windows(corpus.train, run.model.context_length) * run.model.context_length
    tokens = run.steps * run.batch_tokens
    behind = f" ({done:,} are done)" if done else ""
    return (
        f"training     {run.steps:,} steps{behind} of {run.batch_tokens:,} tokens each: {tokens:,} tokens, "
        f"{tokens / epoch:.3g} epochs of {epoch:,}"
    )


def _duration(run: Run, corpus: Prepared, device: torch.device, done: int) -> str:
    vocab_size, left = corpus.tokenizer.vocab_size, run.steps - done
    needed, free = sum(memory(run, vocab_size).values()), free_memory(device)
    reason = f"it needs {size(needed)}, {size(free)} are free" if free is not None and needed > free else None
    if reason is None:
        try:
            seconds, steps = _timed(run, corpus, device)
            speed = f"{run.batch_tokens / seconds:,.0f} tokens per second"
            return (
                f"time         about {clock(left * seconds)} for {left:,} steps, evaluating and saving not counted: "
                f"from {steps} steps timed on this {device.type} ({speed})"
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
    seconds = left * run.batch_tokens * cost.flops(run.model, vocab_size).training() / (USUAL_MFU * peak)
    return (
        f"time         about {clock(seconds)} for {left:,} steps, if {USUAL_MFU:.0%} of {peak:.3g} FLOPs per second "
        f"are reached: no step can be timed here ({reason})"
    )


def _timed(run: Run, corpus: Prepared, device: torch.device) -> tuple[float, int]:
    """Seconds per step of the real model, and how many were timed."""
    model = TransformerLM(run.model, corpus.tokenizer.vocab_size, run.seed).to(device)
    working, optimizer = Working(model, run.precision), run.optim.build(model)
    loss = maybe_compiled(losses_of(run.data, corpus.tokenizer)[0], run.compile)
    window, start, steps = run.model.context_length, 0.0, 0
    for step in range(WARMUP + TIMED):
        if step == WARMUP:
            start = time.perf_counter()
        batches = micro_batches(corpus.train, window, run.seed, step, run.sequences, run.micro_batch_size, device)
        train_step(working, optimizer, batches, run.lr(0), run.clip_norm, (run.seed, step), loss).loss.item()
        steps = step + 1 - WARMUP
        if steps > 0 and time.perf_counter() - start > TIMED_SECONDS:
            break
    return (time.perf_counter() - start) / steps, steps


def size(count: float) -> str:
    """Bytes as a person reads them."""
    exponent = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
