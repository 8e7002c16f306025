"""Summary lines of a training run: before its first step, after its last one, and where it is stopped. Pure functions
from settings and numbers to text; nothing is printed or measured here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.console import counted
from common.invocation import command
from data.shards.prepare import Prepared
from model.cost import on_meta
from model.score import Score
from training.epochs import epochs, repetition_warnings
from training.measure import Measured
from training.metrics_file import MetricRow
from training.optim.groups import described
from training.run.config import Run
from training.run.folder import resume_command
from training.run.validation_errors import spelled


def opening_lines(
    run: Run, folder: Path, corpus: Prepared, device: str, done: int, measured: Measured
) -> Iterator[str]:
    """Model, attention, KV cache, data and plan of a run. device: its kind, as in cuda. done: steps before the first of
    this process."""
    dims = run.model
    mtp = ", multi-token prediction" if dims.mtp_depth else ""
    threads = "" if measured.threads is None else f", {counted(measured.threads, 'thread')}"
    active = "" if measured.active_parameters is None else f" ({measured.active_parameters:,} of them for each token)"
    yield (
        f"model        {counted(dims.n_layers, 'layer')}, d_model {dims.d_model}, {counted(dims.n_heads, 'head')}, "
        f"positions by {dims.positions}{mtp}, {measured.parameters:,} parameters{active} on {device}{threads}"
    )
    yield f"attention    {_attention(run, measured.attention_differences)}"
    yield f"cache        {measured.cache_bytes:,} bytes per token when decoding in float32"
    yield f"data         {_data(run, corpus, measured.bytes_per_token)}"
    yield f"training     {_plan(run, corpus)}"
    if run.optim.groups:
        names = [name for name, _ in on_meta(run.model, vocab_size=1).named_parameters()]
        yield f"groups       {described(run.optim.groups, names)}"
    yield f"run          {folder}"
    yield from repetition_warnings(run, corpus, done)


def _attention(run: Run, differences: Mapping[str, Any]) -> str:
    described = run.model.attention.describe(run.model.n_heads)
    settings = " ".join(f"{key}={spelled(value)}" for key, value in differences.items())
    return f"{described}: {settings}" if settings else described


def _data(run: Run, corpus: Prepared, bytes_per_token: float) -> str:
    contents = f" ({corpus.contents})" if corpus.contents else ""
    return (
        f"{run.data.name}{contents}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate, in a "
        f"vocabulary of {corpus.tokenizer.vocab_size:,}, {bytes_per_token:.2f} bytes per token, "
        f"fingerprint {corpus.fingerprint[:12]}"
    )


def _plan(run: Run, corpus: Prepared) -> str:
    micro_batches = counted(run.sequences // run.micro_batch_size, "micro-batch", "micro-batches")
    rates = " and ".join(f"{name} up to {peak:.3g}" for name, peak in run.optim.base_lrs.items())
    return (
        f"{counted(run.steps, 'step')} of {run.batch_tokens:,} tokens, {epochs(run, corpus)} epochs of the training "
        f"text, {micro_batches} of {run.micro_batch_size} x {run.model.context_length}, {rates}"
    )


def score_line(when: str, score: Score) -> str:
    """Validation loss during training."""
    return f"{when}: validation {_scored(score)}"


def _scored(score: Score) -> str:
    accuracy = "" if score.accuracy is None else f", accuracy {score.accuracy:.4f}"
    return f"{score.loss:.4f} nats per token, {score.bpb:.4f} bits per byte{accuracy}"


def skipped_line(row: MetricRow, skipped: int, precision: str, documents: str) -> str:
    """A step whose update was skipped. skipped: how many were, this one included."""
    halved = " (float16's scale is halved)" if precision == "fp16" else ""
    return (
        f"step {row['step']}: loss {row['train_loss']:.4g}, gradient norm {row['grad_norm']:.4g}: update skipped, "
        f"{skipped} so far{halved}; its documents: {documents}"
    )


def uncounted_line(row: MetricRow) -> str:
    """The first step that learns nothing."""
    return (
        f"step {row['step']}: none of its tokens is counted, all are of prompts: nothing is learned in such "
        "steps, of which a larger batch_tokens leaves fewer"
    )


def spike_line(row: MetricRow, usual_loss: float, documents: str) -> str:
    """A loss spike."""
    return (
        f"step {row['step']}: loss {row['train_loss']:.4g} is a spike, {usual_loss:.4g} was usual; its documents: "
        f"{documents}"
    )


def validation_line(score: Score) -> str:
    """The final validation loss."""
    return f"validation   {_scored(score)} (the whole validation set, {counted(score.tokens, 'token')})"


def before_line(before: MetricRow | None, prefix: Score) -> Iterator[str]:
    """The validation loss before training beside the last one, where it was measured."""
    loss, bpb = (before.get("val_loss"), before.get("val_bpb")) if before else (None, None)
    if loss is not None and bpb is not None:
        verdict = "better" if prefix.loss < loss else "no better"
        yield (
            f"before       {loss:.4f} nats per token, {bpb:.4f} bits per byte; now {prefix.loss:.4f} and "
            f"{prefix.bpb:.4f}, which is {verdict} (both on {_first(prefix.tokens)})"
        )


def best_line(folder: Path, step: int, val_loss: float, prefix_tokens: int) -> str:
    """A checkpoint that is better than the last one."""
    how = command("sample.py", "--checkpoint", "best", "--run", str(folder))
    return f"best         step {step}, {val_loss:.4f} nats per token (on {_first(prefix_tokens)}): {how}"


def _first(tokens: int) -> str:
    return f"the first {counted(tokens, 'token')} of the validation set"


def speed_line(tokens_per_second: float, mfu: float | None, data_share: float) -> str:
    """Training throughput. mfu: None where the device's peak is not known."""
    of_peak = "" if mfu is None else f"MFU {mfu:.1%}, "
    return (
        f"speed        {tokens_per_second:,.0f} training tokens per second, {of_peak}{data_share:.1%} of the time "
        "waiting for data"
    )


def next_lines(folder: Path, longer: str) -> list[str]:
    """Where the run is, and what can be done with it. longer: how it becomes a longer one."""
    return [
        f"run          {folder}  (loss.png is its curve)",
        f"next         {command('sample.py', 'your prompt', '--run', str(folder))}",
        f"             {longer}",
        f"             {command('train.py', '--help')}",
    ]


def cooldown_start(run: Run) -> int | None:
    """The step at which the learning rate's cooldown began; None for a schedule without one, and where it has no
    steps."""
    start = run.schedule.decay_start_step(run.steps)
    return None if start == run.steps else start


def longer_run(run: Run, folder: Path, checkpoint_before: str | None) -> str:
    """The command that makes a complete run longer. checkpoint_before: the last one from before the cooldown, if there
    is one."""
    longer = f"{resume_command(folder)} steps={2 * run.steps}"
    start = cooldown_start(run)
    if start is None:
        return longer
    since = f"the cooldown began at step {start}"
    if checkpoint_before is None:
        return f"(a longer run is a new one: {since}, and no checkpoint from before is left)"
    return f"{longer}  (after moving away the checkpoints after {checkpoint_before}: {since})"


def stopped_line(signal: str, step: int, *, within: bool, unscored: bool, complete: bool, go_on: str) -> str:
    """A run that a signal stopped. step: the last whole one, which is saved. within: in the midst of the next one.
    unscored: its evaluation was cut short. complete: it was the last one. go_on: how to continue."""
    if within:
        where = f"within step {step + 1}, which does not count"
    else:
        where = f"after step {step}" if step else "before step 1"
    saved = f"step {step} is saved" if within else "saved"
    if not step:
        saved = "nothing is to be saved yet"
    if unscored:
        saved += ", its evaluation is still to come"
    last = "it was the last one, its final lines are still to come; " if complete and not unscored else ""
    return f"{signal}: stopped {where}; {saved}; {last}{go_on}"
