"""Dry run: parameters, FLOPs, KV cache, memory, epochs and time of a run, without the run. Nothing is written but the
prepared corpus, and nothing is downloaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common.cli import out_of_memory
from common.console import clock, counted, size
from common.errors import NotFetched, UserError
from common.streams import print_line
from data.batches import check_split_lengths, micro_batch_of
from data.shards.prepare import Prepared, missing, prepare
from model import cost
from runtime.memory import free_memory
from training.epochs import epochs, repetition_warnings, tokens_of_epoch
from training.monitor.mfu import flops_of, peak_flops
from training.run import checkpoint
from training.run.config import Run
from training.step_memory import StepMemory, memory
from training.step_time import time_step
from training.text_lines import text_lines

OVERHEAD = 1.8  # bytes of the process to bytes of its tensors on a CPU, whose allocator leaves gaps: 1.75 was seen
GPT2_VOCABULARY = 50_257  # tokens; the published sizes of models are counted with it
USUAL_MFU = 0.4  # what is assumed where no step can be timed


def dry_run(run: Run, device: torch.device, folder: Path | None, check: Callable[[Prepared], Any]) -> None:
    """Prints the costs, and what could not be known without the documents or the tokenizer. Prepares what needs no
    download.

    run: with its precision chosen. folder: of a run that is to be resumed. check: called with the corpus where it is
    there, to refuse what training would. Raises UserError where nothing is left to do, or where training would refuse
    the documents, the tokenizer or the checkpoints, other than for what can be fetched.
    """
    corpus, lacking = _prepared(run, check)
    done = _steps_done(run, folder, corpus) if folder else 0
    if corpus is None:
        vocab_size = run.tokenizer.max_vocab_size
        flops = cost.flops(run.model, vocab_size)
    else:
        vocab_size = corpus.tokenizer.vocab_size
        flops = flops_of(run.model, corpus, run.document_mask)
    keys = ""
    if run.document_mask:
        keys = " within documents" if corpus else ", an upper bound: pairs across documents are counted"
    needed = memory(run, vocab_size, device)
    for line in _shapes(run, vocab_size, flops, keys):
        print_line(line)
    print_line(_memory_line(run, vocab_size, needed, device))
    for line in _plan(run, corpus, done):  # before what takes a while
        print_line(line)
    print_line(_duration(run, vocab_size, flops, needed.peak, device, done))
    if corpus is None:
        print_line(f"not known    how many epochs that is; the vocabulary is taken as {vocab_size:,} tokens")
        for line in lacking:
            print_line(f"missing      {line}")
    kept = f", and nothing kept but the prepared documents, in {corpus.folder}" if corpus else " or kept"
    print_line(f"dry run      nothing was trained{kept}: leave dry_run=true out to train")


def _steps_done(run: Run, folder: Path, corpus: Prepared | None) -> int:
    """By the newest whole checkpoint where the corpus is there, else by their names. Raises UserError where nothing is
    left to do."""
    done = checkpoint.check_resumable(folder, run, corpus) if corpus else checkpoint.steps_done(folder)
    if done >= run.steps:
        raise UserError(f"{done} steps of this run are done, steps={run.steps}: give a larger steps=")
    return done


def _prepared(run: Run, check: Callable[[Prepared], Any]) -> tuple[Prepared | None, list[str]]:
    """The corpus, or all that must be fetched for it, a line each."""
    cache_dir = Path(run.cache_dir)
    try:
        corpus = prepare(run.data, run.tokenizer, cache_dir, download=False, window=run.model.context_length + 1)
    except NotFetched as error:
        return None, missing(run.data, run.tokenizer, cache_dir) or [str(error)]
    check_split_lengths(corpus, run.model.context_length, run.eval_tokens)
    check(corpus)
    return corpus, []


def _shapes(run: Run, vocab_size: int, flops: cost.Flops, keys: str) -> Iterator[str]:
    """keys: what is to be said of the number of keys."""
    model = cost.on_meta(run.model, vocab_size)
    counts = cost.parameters(model)
    active = f" ({cost.active_parameters(model):,} of them for each token)" if cost.has_experts(model) else ""
    remarks = {"head": " (tied to the embedding)"} if model.head is None else {}
    listed = ", ".join(f"{name} {count:,}{remarks.get(name, '')}" for name, count in counts.items())
    yield f"parameters   {sum(counts.values()):,}{active}: {listed}"
    if vocab_size != GPT2_VOCABULARY:
        published = sum(cost.parameters(cost.on_meta(run.model, GPT2_VOCABULARY)).values())
        yield (
            f"vocabulary   {vocab_size:,} tokens; with the {GPT2_VOCABULARY:,} of tokenizer=gpt2 the model would have "
            f"{published:,} parameters"
        )
    yield (
        f"flops        {flops.training():,.0f} per token of training, {flops.forward():,.0f} forward "
        f"({flops.per_pair * flops.keys / flops.forward():.0%} of it attention, over {flops.keys:,.1f} keys on average"
        f"{keys})"
    )
    if model.mtp is not None:
        yield f"mtp          {flops.mtp():,.0f} forward FLOPs per token besides, in training alone"
    yield (
        f"cache        {cost.cache_bytes_per_token(model):,} bytes per token when decoding in float32, "
        f"{cost.cache_bytes(model, run.model.context_length):,} for a full context"
    )


def _memory_line(run: Run, vocab_size: int, needed: StepMemory, device: torch.device) -> str:
    """The peak, its parts, and the peak with the other choice of what is kept of the activations."""
    where = "on the GPU" if device.type == "cuda" else "besides what Python and PyTorch take themselves"
    if run.parallel.count > 1:
        several = f"in each of {run.parallel.count} processes ({run.parallel.name})"
        where = f"{several}, if each has a device of its own, {where}"
    parts = ", ".join(f"{name} {size(number)}" for name, number in _parts(run, needed))
    checkpointing = not run.activation_checkpointing
    other = memory(run.model_copy(update={"activation_checkpointing": checkpointing}), vocab_size, device)
    return (
        f"memory       about {size(needed.peak)} of tensors at the peak of a step {where} (micro-batches of "
        f"{micro_batch_of(run.sequences // run.parallel.count, run.micro_batch_size)} x {run.model.context_length}, "
        f"{run.precision}); parts, each at its own peak: {parts}; "
        f"with activation_checkpointing={str(checkpointing).lower()} about {size(other.peak)}, "
        f"activations {size(other.activations)}"
    )


def _parts(run: Run, needed: StepMemory) -> Iterator[tuple[str, int]]:
    named = {"copies": "gathered", "activations": "activations with what is gathered"} if run.parallel.shards else {}
    for name in ("weights", "gradients", "optimizer", "copies", "activations"):
        yield named.get(name, name), needed._asdict()[name]


def _plan(run: Run, corpus: Prepared | None, done: int) -> Iterator[str]:
    if corpus:
        yield from text_lines(run.data, corpus)
    tokens = run.steps * run.batch_tokens
    behind = f" ({done:,} are done)" if done else ""
    read = f", {epochs(run, corpus)} epochs of {tokens_of_epoch(run, corpus):,}" if corpus else ""
    steps = counted(run.steps, "step")
    yield f"training     {steps}{behind} of {run.batch_tokens:,} tokens each: {tokens:,} tokens{read}"
    if corpus:
        yield from repetition_warnings(run, corpus, done)


def _duration(run: Run, vocab_size: int, flops: cost.Flops, needed: int, device: torch.device, done: int) -> str:
    """needed: bytes of memory. Where they are not free, nothing is timed: a system that runs out of memory kills."""
    steps = run.steps - done
    reason = _too_large(needed, device)
    if reason is None:
        try:
            seconds, measured = time_step(run, vocab_size, flops, device)
            several = run.parallel.count > 1
            left_out = "reading, evaluating and saving" + (", and what processes send each other," if several else "")
            devices = f"{run.parallel.count} such devices" if several else f"this {device.type}"
            return (
                f"time         about {clock(steps * seconds)} for {counted(steps, 'step')}, {left_out} not counted: "
                f"{run.batch_tokens / seconds:,.0f} tokens per second on {devices}, from {measured}"
            )
        except Exception as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
    return _usual_duration(run, steps, flops, device, reason)


def _too_large(needed: int, device: torch.device) -> str | None:
    free = free_memory(device)
    taken = needed * (OVERHEAD if device.type == "cpu" else 1)
    return f"it may take {size(taken)}, {size(free)} are free" if free is not None and taken > free else None


def _usual_duration(run: Run, steps: int, flops: cost.Flops, device: torch.device, reason: str) -> str:
    """From the peak of the device. reason: why nothing was timed."""
    peak = peak_flops(device, run.precision, run.peak_flops)
    if peak is None:
        return (
            f"time         n/a: no step can be timed here ({reason}), and the peak of this {device.type} is not known"
        )
    per_token = flops.training() + (flops.forward() if run.activation_checkpointing else 0)
    seconds = steps * run.batch_tokens * per_token / (USUAL_MFU * peak * run.parallel.count)
    return (
        f"time         about {clock(seconds)} for {counted(steps, 'step')}, if {USUAL_MFU:.0%} of {peak:.3g} FLOPs per "
        f"second are reached: no step can be timed here ({reason})"
    )
