"""What a run tells while it trains and when it ends."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from common.console import percent
from common.errors import UserError, escaped, reason
from common.invocation import command
from common.streams import escaped_for_terminal, print_stderr, write_if_possible
from data.batches import documents_of_step
from data.shards.prepare import Prepared
from model.score import Score
from model.transformer import TransformerLM
from runtime.memory import peak_memory
from training.epochs import epochs, repetitions
from training.monitor.attention_stats import attention_stats
from training.monitor.guard import Guard
from training.monitor.mfu import flops_of, peak_flops
from training.monitor.plot import plot_loss
from training.monitor.profiler import Profile
from training.monitor.progress import ProgressLine
from training.run.checkpoint import best, saved, step_of
from training.run.config import Run, dump
from training.run.folder import resume_command
from training.run.metrics_file import PICTURE, UNSCORED, MetricsFile, unscored
from training.run.origin import flatten_config
from training.step import StepResult

log = logging.getLogger("headroom")
DOCUMENTS_NAMED = 4
FLUSH_SECONDS = 0.5  # reading a loss waits for the device, so it is not done at every step


class Report:
    """Rows of metrics for the file and the logger, a live line, the loss curve, and the speed of training alone."""

    def __init__(self, run: Run, folder: Path, corpus: Prepared, model: TransformerLM, done: int, byte_lengths: Tensor):
        """done: steps before the first of this process. byte_lengths (V,): on the device of the losses."""
        self.run, self.folder, self.byte_lengths, self.device = run, folder, byte_lengths, byte_lengths.device
        self.corpus, self.model, self.done = corpus, model, done
        self.metrics = MetricsFile(folder / "metrics.jsonl", resume_after=done)
        if done < run.steps:
            with suppress(OSError):  # such as a folder, which is no picture
                (folder / PICTURE).unlink()  # as whoever finds one at the end takes the run for complete
        self.unscored = unscored(self.metrics.past, done)  # a signal cut the evaluation after the last step short
        self.now = done - self.unscored  # the last step that is told
        self.guard = Guard(self.metrics.past)
        # It ended so before, with all saved. (Of float16 a skipped step halves the scale, which is worth saving.)
        self.failing_still = self.guard.in_a_row >= run.most_skipped and run.precision != "fp16"
        self.sink = run.logger.open(folder, dump(run))
        self.watch = ProgressLine(done, run.steps)
        self.profile = Profile(run.profile_steps, folder, self.device, done, run.steps)
        self.pending: list[tuple[dict[str, Any], Tensor]] = []  # a row; its numbers on the device
        self.flops = flops_of(run.model, corpus, run.data.document_mask).training()  # per token
        self.peak_flops = peak_flops(self.device, run.precision, run.peak_flops)  # per second
        self.total_tokens, self.total_seconds, self.total_waited, self.waited = 0, 0.0, 0.0, 0.0
        warnings = (f"warning      {line}" for line in repetitions(run, corpus, done))
        for line in (*_opening(run, folder, corpus, model, self.device), *warnings):
            self.watch.say(line)
        self._restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self.flush()
            if kind not in (None, KeyboardInterrupt) and self.done < self.run.steps:
                self._plot()
        finally:
            self.watch.stop()
            self.profile.close()
            self.metrics.close()
            self.sink.close()
        if kind is KeyboardInterrupt:
            print_stderr(f"stopped at once; {self._go_on()}")
            sys.exit(130)

    def before(self, score: Score) -> None:
        """Call before the first step, with the validation score of the weights that training begins with."""
        row = {"step": 0, "tokens": 0, "train_loss": None, **_numbers(score)}
        row |= self._attention_seen() if self.run.log_attention else {}
        self.metrics.begin(row)
        self.sink.write(row)
        self._say_score("before step 1", score)
        self._restart_clock()

    def complete(self, score: Score) -> None:
        """Call before other steps, with the validation score that the last one has not got yet."""
        more = _numbers(score) | (self._attention_seen() if self.run.log_attention else {})
        row = self.metrics.complete(more)
        self.sink.write(row)
        self.unscored, self.now = False, row["step"]
        self._say_score(f"step {self.now}", score)
        self._restart_clock()

    def step(
        self,
        step: int,
        result: StepResult,
        batches: list[tuple[Tensor, Tensor]],
        score: Score | None,
        unscored: bool = False,
    ) -> None:
        """Call after every step, with the validation score if there is one; unscored: if there should be one, but a
        signal came."""
        self.done = self.now = step
        self.unscored, targets = unscored, torch.cat([targets for _, targets in batches])
        row = {"step": step, "tokens": step * targets.numel(), **self.run.learning_rates(step - 1)}
        row["data_seconds"] = self.waited
        self.total_waited += self.waited
        self.waited = 0.0
        if score is not None:
            row |= _numbers(score) | (self._attention_seen() if self.run.log_attention else {})
        row |= {UNSCORED: True} if unscored else {}
        text_bytes = self.byte_lengths[targets].sum()
        values = (result.loss, result.grad_norm, text_bytes, result.skipped, *(result.clipped or ()))
        self.pending.append((row, torch.stack([value.to(result.loss) for value in values])))
        self.interval_tokens += targets.numel()
        free_to_read = self.device.type == "cpu"
        due = score is not None or step == self.run.steps or self._elapsed() >= FLUSH_SECONDS
        if due or (free_to_read and result.skipped):
            self.flush()
        if score is not None:
            self._say_score(f"step {step}", score)

    def within(self, what: str, index: int, count: int) -> None:
        """Call before each part of a step, or of an evaluation, as training.step has it."""
        self.watch.within(self.now + 1, what, index, count)

    def say(self, line: str) -> None:
        """Above the live line."""
        self.watch.say(line)

    def show(self, text: str) -> None:
        """The same for a text of several lines."""
        self.watch.show(text)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch, with which every step begins."""
        if self.run.profile_steps:
            with self.aside():  # which waits for the device, as no other step does
                self.profile.step()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around whatever is not training: its time does not count."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.interval_start += time.perf_counter() - start

    def end(self, score: Score, part: Score, sample: str) -> None:
        """The last words of a run, on stdout, whether or not anybody reads them; then its picture, the last thing it
        does: where that is missing, a run that is resumed says its last words again.

        part: the score on the prefix of the validation set that is scored on the way.
        """
        lines = [
            f"validation   {score.loss:.4f} nats per token, {score.bpb:.4f} bits per byte "
            f"(the whole validation set, {score.tokens:,} tokens)",
            *self._compared(part),
            *([self._speed()] if self.total_tokens else []),
            f"run          {self.folder}  (loss.png is its curve)",
            f"next         {command('sample.py', 'a beginning of yours', '--run', str(self.folder))}",
            f"             {self._longer()}",
            f"             {command('train.py', '--help')}",
        ]
        lost = write_if_possible("\n".join(["", escaped_for_terminal(sample), "", *map(escaped, lines)]))
        if lost is not None:
            log.warning(f"stdout cannot be written: {reason(lost)}; the run is saved in {self.folder}")
        self._plot()

    def _speed(self) -> str:
        return (
            f"speed        {self.tokens_per_second:,.0f} training tokens per second, "
            f"MFU {percent(self._mfu(self.tokens_per_second))}, {self._share_waited:.1%} of the time waiting for data"
        )

    def stopped(self, step: int, name: str, within: bool = False) -> None:
        """The last words of a run that was asked to end. step: the last whole one, which is saved; within: in the midst
        of the next one."""
        self.watch.stop()
        where = f"within step {step + 1}, which does not count" if within else f"after step {step}"
        where = "before step 1" if not step and not within else where
        what = f"step {step} is saved" if within else "saved"
        what = what if step else "nothing is to be saved yet"
        if self.unscored:
            what += ", its evaluation is still to come"
        finished = step == self.run.steps and not self.unscored
        last = "it was the last one, its last words are still to come; " if finished else ""
        print_stderr(f"{name}: stopped {where}; {what}; {last}{self._go_on()}")

    def _go_on(self) -> str:
        verb = "continue" if saved(self.folder) else "begin again"
        return f"{verb} with: {resume_command(self.folder)}"

    def _say_score(self, when: str, score: Score) -> None:
        self.say(f"{when}: validation {score.loss:.4f} nats per token, {score.bpb:.4f} bits per byte")

    def _compared(self, part: Score) -> Iterator[str]:
        """Lines on what there was before training, and on a checkpoint that is better than the last one."""
        prefix, before = f"the first {part.tokens:,} of them", self.metrics.before
        loss, bpb = (before.get("val_loss"), before.get("val_bpb")) if before else (None, None)
        if loss is not None and bpb is not None:
            now = f"now {part.loss:.4f} and {part.bpb:.4f}: {'better' if part.loss < loss else 'no better'}"
            yield f"before       {loss:.4f} nats per token, {bpb:.4f} bits per byte ({prefix}; {now})"
        try:
            found = best(self.folder)
        except UserError as fault:
            log.warning(f"{fault}; so which checkpoint is the best is not known")
            return
        if found is not None and found.manifest.step != self.run.steps:
            how = command("sample.py", "--checkpoint", "best", "--run", str(self.folder))
            loss = found.manifest.val_loss
            yield f"best         step {found.manifest.step}, {loss:.4f} nats per token ({prefix}): {how}"

    @property
    def failing(self) -> bool:
        """So many updates in a row were skipped, up to the last step written down, that training is at its end."""
        return not self.pending and self.guard.in_a_row >= self.run.most_skipped

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process; evaluation, saving and sampling excluded."""
        return self.total_tokens / max(self.total_seconds, 1e-9)

    def settle(self) -> None:
        """All steps so far are on the disk when it returns. Call it before a checkpoint, so that none is missing."""
        self.flush()
        self.metrics.sync()
        self.sink.sync()

    def flush(self) -> None:
        """Writes down the steps since the last time."""
        if not self.pending:
            return
        rows, self.pending = self.pending, []
        values = torch.stack([tensors for _, tensors in rows]).tolist()  # waits for the device
        seconds = self._elapsed()
        speed = self.interval_tokens / max(seconds, 1e-9)
        self.total_tokens += self.interval_tokens
        self.total_seconds += seconds
        self._restart_clock()
        whole = {"tokens_per_second": speed, "flops_per_second": speed * self.flops, "mfu": self._mfu(speed)}
        whole["memory_bytes"] = peak_memory(self.device)
        for (row, _), (loss, grad_norm, text_bytes, skipped, *clipped) in zip(rows, values, strict=True):
            bpb = loss * self.run.batch_tokens / (math.log(2) * max(1.0, text_bytes))
            row |= {"train_loss": loss, "train_bpb": bpb, "grad_norm": grad_norm, **whole}
            row |= {"skipped": True} if skipped else {}
            row |= {"max_logit": clipped[0], "clipped_heads": int(clipped[1])} if clipped else {}
            self.metrics.write(row)
            self.sink.write(row)
            self._watch_over(row)
        last = rows[-1][0]
        self.watch.step(last, (self.run.steps - last["step"]) * self.run.batch_tokens / self.tokens_per_second)

    def _mfu(self, tokens_per_second: float) -> float | None:
        return self.peak_flops and tokens_per_second * self.flops / self.peak_flops

    @property
    def _share_waited(self) -> float:
        return self.total_waited / max(self.total_seconds, 1e-9)

    def _watch_over(self, row: dict[str, Any]) -> None:
        spike = self.guard.see(row)
        self.failing_still = self.failing_still and self.guard.in_a_row > 0
        what = f"step {row['step']}: loss {row['train_loss']:.4g}"
        if row.get("skipped") and self.guard.in_a_row <= self.run.most_skipped:
            what += f", gradient norm {row['grad_norm']:.4g}: update skipped, {self.guard.skipped} so far"
            what += " (float16's scale is halved)" if self.run.precision == "fp16" else ""
            self.say(f"{what}; its documents: {self._documents(row['step'])}")
        elif spike:
            what += f" is a spike, {self.guard.usual_loss:.4g} was usual"
            self.say(f"{what}; its documents: {self._documents(row['step'])}")

    def _attention_seen(self) -> dict[str, float]:
        run, corpus = self.run, self.corpus
        end_of_text = corpus.tokenizer.end_of_text if run.data.document_mask else None
        with self.aside():
            return attention_stats(self.model, corpus.val, run.model.context_length, run.micro_batch_size, end_of_text)

    def _documents(self, step: int) -> str:
        run = self.run
        names = documents_of_step(self.corpus, run.model.context_length, run.seed, step - 1, run.sequences)
        more = f" and {len(names) - DOCUMENTS_NAMED} more" if len(names) > DOCUMENTS_NAMED else ""
        return (", ".join(names[:DOCUMENTS_NAMED]) or "names are lost") + more

    def _longer(self) -> str:
        """How this run, which is complete, becomes a longer one."""
        longer = f"{resume_command(self.folder)} steps={2 * self.run.steps}"
        cooldown = self.run.schedule.decay_start_step(self.run.steps)
        if cooldown in (None, self.run.steps):
            return longer
        since = f"the cooldown began at step {cooldown}"
        try:
            before = [path.name for path in saved(self.folder) if step_of(path) <= cooldown]
        except UserError as fault:
            return f"(whether a longer run can go on from here is not known: {fault})"
        if not before:
            return f"(a longer run is a new one: {since}, and no checkpoint from before is left)"
        return f"{longer}  (after moving away the checkpoints after {before[-1]}: {since})"

    def _plot(self) -> None:
        try:
            plot_loss(self.folder)
        except Exception as error:  # a picture is not worth a run's last words
            log.warning(f"{self.folder}/loss.png cannot be drawn: {error}")

    def _restart_clock(self) -> None:
        self.interval_tokens, self.interval_start = 0, time.perf_counter()

    def _elapsed(self) -> float:
        return time.perf_counter() - self.interval_start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _numbers(score: Score) -> dict[str, float]:
    """As a row of metrics holds a score."""
    return {"val_loss": score.loss, "val_bpb": score.bpb, "val_tokens": score.tokens}


def _opening(run: Run, folder: Path, corpus: Prepared, model: TransformerLM, device: torch.device) -> Iterator[str]:
    dims, attention = run.model, run.model.attention
    parameters = sum(p.numel() for p in model.parameters())
    cache = sum(layer.bytes_per_token for layer in model.make_caches(1, 1))
    text_bytes = corpus.tokenizer.byte_lengths[corpus.val.read(0, len(corpus.val))].sum()
    contents = f" ({corpus.contents})" if corpus.contents else ""
    yield (
        f"model        {dims.n_layers} layers, d_model {dims.d_model}, {dims.n_heads} heads, "
        f"positions by {dims.positions}, {parameters:,} parameters on {device.type}"
    )
    changed = flatten_config(attention.model_dump(exclude_defaults=True)).items()
    yield f"attention    {attention.describe(dims.n_heads)}: {' '.join(f'{key}={value}' for key, value in changed)}"
    yield f"cache        {cache:,} bytes per token when decoding in float32"
    yield (
        f"data         {run.data.name}{contents}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to "
        f"validate, in a vocabulary of {corpus.tokenizer.vocab_size:,}, {text_bytes / len(corpus.val):.2f} bytes per "
        f"token, fingerprint {corpus.fingerprint[:12]}"
    )
    yield (
        f"training     {run.steps} steps of {run.batch_tokens:,} tokens, {epochs(run, corpus)} epochs of the training "
        f"text, {run.sequences // run.micro_batch_size} "
        f"micro-batches of {run.micro_batch_size} x {dims.context_length}, "
        f"{' and '.join(f'{name} up to {peak:.3g}' for name, peak in run.optim.base_lrs.items())}"
    )
    yield f"run          {folder}"
