"""Trains a language model: the story of one run, from the composed configuration to a sampled text.

python train.py                                   # tiny MHA model on SymPy's source, minutes on a laptop
python train.py attention=mla steps=300           # any setting of conf/ can be overridden
python train.py --help
"""

import sys

if __name__ == "__main__":
    from common import process

    process.start()

from pathlib import Path
from typing import Any, NoReturn

from common.cli import (
    one_line_errors,
    plain_tree,
    refuse_twice,
    smaller_batches_advised,
    with_stored_choices,
)
from common.overrides import readable
from common.suggestions import CONF

# Hydra is imported inside `main`, where its absence is one line, and torch, with all that needs it, inside `train`:
# --help answers before it would have loaded.


def composed(cfg: Any) -> None:
    """cfg: what Hydra composed for one run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    with one_line_errors(of_a_sweep=hydra_config.mode == RunMode.MULTIRUN):
        train(plain_tree(cfg), typed=hydra_config.overrides.task)


def main() -> None:
    with one_line_errors():  # here, for what Hydra has to say of the overrides themselves
        import hydra

        refuse_twice(sys.argv[1:])
        sys.argv[1:] = readable(with_stored_choices(sys.argv[1:]))
        hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")(composed)()


def train(tree: dict, typed: list[str]) -> None:
    """tree: the composed configuration; typed: the overrides on the command line."""
    import torch

    from common import process
    from common.console import to_stderr
    from common.signals import Stopped, StopRequest
    from data.batches import micro_batches, refuse_short
    from data.shards.prepare import Prepared, prepare
    from generation.preview import continuation, preview_prompt
    from model.score import Score
    from model.transformer import TransformerLM
    from runtime.allocator import keep_buffers
    from runtime.device import choose_device, set_determinism
    from runtime.precision import MixedPrecision, choose_precision
    from training.dry_run import dry_run
    from training.evaluate import evaluate
    from training.experimental import warn_experimental_settings
    from training.monitor.report import Report
    from training.run import checkpoint, replay
    from training.run import folder as run_folder
    from training.run.start import load_pretrained_weights, resolve_run
    from training.step import losses_of, train_step

    process.end_by_unwinding()
    to_stderr()
    run, folder, run_lock = resolve_run(tree, typed)
    run.logger.refuse_missing()
    set_determinism(run.deterministic)
    device = choose_device(run.device)
    run.model.check_training(device)
    run = run.model_copy(update={"precision": choose_precision(run.precision, device)})  # as config.yaml shall say

    warn_experimental_settings(run, device, typed)

    def preview_tokens(corpus: Prepared) -> list[int]:
        return preview_prompt(corpus, run.sample_prompt, run.model.context_length)

    if run.dry_run:
        return dry_run(run, device, checkpoint.steps_done(folder) if folder else 0, check=preview_tokens)
    corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
    tokenizer, window, sizes = corpus.tokenizer, run.model.context_length, (run.sequences, run.micro_batch_size)
    refuse_short(corpus, window)
    beginning = preview_tokens(corpus)
    run = run.model_copy(update={"data": run.data.pinned()})

    if device.type == "cpu" and run.tune_malloc:
        keep_buffers()
    model = TransformerLM(run.model, tokenizer.vocab_size, run.seed).to(device)
    mixed, clip = MixedPrecision(model, run.precision), run.optim.clip(model)
    training = checkpoint.TrainState(model, run.optim.build(model), mixed.loss_scale)
    if folder is not None:
        done = checkpoint.resume(folder, run, corpus, training)
    else:
        (folder, run_lock), done = run_folder.create(run, tokenizer), 0
    if run.init_from and not done:
        load_pretrained_weights(Path(run.init_from), model)
    loss, losses = losses_of(run.data, tokenizer.end_of_text, clip, run.checkpoint_activations, run.compilation)
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
    prefix, rest = slice(0, run.eval_tokens), slice(run.eval_tokens, None)

    def between(what: str, index: int, count: int) -> None:
        stop.obey()
        report.within(what, index, count)

    def validate(tokens: slice) -> Score:
        mixed.copy_master_weights()
        where = corpus.val, window, run.micro_batch_size, byte_lengths, tokens
        return evaluate(mixed.model, *where, losses, between)

    def scores(step: int) -> tuple[Score | None, Score | None]:
        """After a step: on the prefix of the validation set, and what is told, which is of all of it at the end. None
        where a signal came."""
        try:
            with report.aside():
                part = validate(prefix)
                return part, part.plus(validate(rest)) if step == run.steps else part
        except Stopped:
            return None, None

    def save(step: int, val_loss: float | None = None) -> None:
        report.settle()
        if not report.failing_still:
            with report.aside():
                checkpoint.save(folder, run, corpus, training, step, val_loss)

    def leave(step: int, within: bool = False) -> NoReturn:
        report.stopped(step, stop.signal.name, within)
        sys.exit(stop.exit_code)

    def preview() -> str:
        return continuation(model, tokenizer, beginning, run.seed)

    report, saved, part = Report(run, folder, corpus, model, done, byte_lengths.to(device)), done, None
    with run_lock, smaller_batches_advised(*sizes), StopRequest() as stop, report:
        if report.unscored or done == run.steps or (run.evaluates_before and not done):
            part, score = scores(done)
            if score is None:
                leave(done)
            if report.unscored:
                checkpoint.score(
                    folder, done, part.loss
                )  # first: the row's mark is what a kill leaves to say it is due
                report.complete(score)
            elif not done:
                report.before(score)
        for step in range(done, run.steps):
            with report.waiting():
                batches = micro_batches(corpus.train, window, run.seed, step, *sizes, device)
            seeds, lr = (run.seed, step), run.lr(step)
            try:
                result = train_step(mixed, training.optimizer, batches, lr, run.clip_norm, seeds, loss, clip, between)
            except Stopped:
                if step > saved:
                    save(step, part and part.loss)  # of `step`: what this one would have made of it was not reached
                leave(step, within=True)
            now, last, part, score = step + 1, step + 1 == run.steps, None, None
            due = last or now % run.eval_every == 0
            if due:
                part, score = scores(now)
            report.step(now, result, batches, score, unscored=due and score is None)
            if last or stop.signal or report.failing or now % run.save_every == 0:
                save(now, part and part.loss)
                saved = now
            if report.failing:
                raise replay.keep(folder, run, corpus, training, now, report.guard.in_a_row, batches)
            if stop.signal:
                leave(now)
            if run.sample_every and now % run.sample_every == 0 and not last:
                with report.aside():
                    report.show(preview())
    report.end(score, part, preview())


if __name__ == "__main__":
    main()
