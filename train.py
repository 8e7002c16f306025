"""Train a language model: the story of one run, from the composed configuration to a sampled text.

python train.py                                   # tiny MHA model on SymPy's source, minutes on a laptop
python train.py attention=mla steps=300           # any setting of conf/ can be overridden
python train.py --help
"""

import logging
import os
import sys

if __name__ == "__main__":
    from common import process

    process.start()

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import one_line_errors, smaller_batches_advised
from common.errors import escaped, reason
from common.hydra_errors import one_line_hydra_errors, plain_tree
from common.invocation import CONF, version_line
from common.overrides import hydra_arguments, sweep_overrides
from common.signals import Stopped, StopRequest
from common.streams import escaped_for_terminal, print_line, print_stderr, write_if_possible

if TYPE_CHECKING:
    from training.evaluate import Evaluation
    from training.session import Session

# Hydra is imported inside `main`, where its absence is one line, and torch, with all that needs it, inside `train`:
# --help answers before it would have loaded.


def main() -> None:
    def composed(cfg: Any) -> None:
        """cfg: what Hydra composed for one run."""
        from hydra.core.hydra_config import HydraConfig

        hydra_config = HydraConfig.get()
        with one_line_errors():
            train(plain_tree(cfg), typed=hydra_config.overrides.task, choices=dict(hydra_config.runtime.choices))

    with one_line_errors(), one_line_hydra_errors(sys.argv[1:]):  # here, for the overrides themselves
        if "--version" in sys.argv[1:]:
            return print_line(version_line())
        import hydra

        sweep = sweep_overrides(sys.argv[1:])
        if sweep is not None:
            from ablation.sweep.run import run_sweep

            sys.exit(run_sweep(sweep))

        os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would otherwise print over several lines
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
        hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")(composed)()


def train(tree: dict, typed: list[str], choices: dict[str, str]) -> None:
    """Train one run. tree: the composed configuration; typed: the overrides on the command line; choices: the choice of
    each group."""
    from common import process
    from common.console import to_stderr
    from data.batches import check_split_lengths
    from data.shards.prepare import prepare
    from generation.preview import continuation, preview_prompt
    from runtime.device import choose_device, set_determinism, set_threads
    from runtime.precision import choose_precision
    from training.dry_run import dry_run
    from training.experimental_settings import warn_experimental_settings
    from training.measure import measure
    from training.monitor.monitor import Monitor
    from training.run import checkpoint
    from training.run.start import begin_or_resume
    from training.session import Session
    from training.step import losses_of

    process.end_by_unwinding()
    to_stderr(logging.WARNING if process.in_sweep else logging.INFO)
    run, folder, run_lock = requested_run(tree, typed)
    run.logger.check_installed()
    set_determinism(run.deterministic)
    set_threads(run.threads)
    device = choose_device(run.device)
    run.model.check_training(device)
    run = run.model_copy(update={"precision": choose_precision(run.precision, device)})  # as config.yaml shall say
    warn_experimental_settings(run, device, typed)
    length = run.model.context_length
    if run.dry_run:
        done = checkpoint.steps_done(folder) if folder else 0
        return dry_run(run, device, done, check=lambda corpus: preview_prompt(corpus, run.sample_prompt, length))

    corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
    check_split_lengths(corpus, length)
    preview_tokens = preview_prompt(corpus, run.sample_prompt, length)
    run = run.model_copy(update={"data": run.data.with_fixed_revision()})
    state, done, folder, run_lock = begin_or_resume(run, corpus, device, folder, run_lock, choices)
    losses = losses_of(state.clip, run.compilation)
    monitor = Monitor(run, folder, corpus, measure(run, corpus, state.model, device), done, device)
    advice = smaller_batches_advised(run.sequences, run.micro_batch_size)

    def preview() -> str:
        return continuation(state.model, corpus.tokenizer, preview_tokens, run.seed)

    with run_lock, advice, StopRequest() as stop, stop_ends_process(stop, folder), monitor:
        session = Session(run, folder, corpus, state, losses.token_losses, monitor, stop, saved_step=done)
        evaluation = run_steps(session, losses.mean_loss, done, preview)
    if process.in_sweep:
        print_score(evaluation)
    else:
        print_result(preview(), monitor.final_lines(evaluation), folder)
    monitor.draw_picture()


def requested_run(tree: dict, typed: list[str]) -> tuple:
    """The run that a command asks for; and its folder, and the lock on it, if it has one already."""
    from training.minutes import steps_for
    from training.run.config import check_not_of_sweep, pop_command_settings
    from training.run.start import resolve_run

    given = pop_command_settings(tree)
    check_not_of_sweep(given)
    if given["minutes"] is not None:
        tree["steps"] = steps_for(given, resolve_run(tree, typed)[0], typed)
    return resolve_run(tree, typed, given["resume"])


def run_steps(session: "Session", mean_loss: Callable, done: int, preview: Callable[[], str]) -> "Evaluation":
    """The training loop -> the evaluation after the last step. mean_loss: of training, as training.step.losses_of makes
    it; done: steps already done; preview: samples a text. Raises Stopped where a signal came: what counts is saved
    then."""
    from data.batches import TrainingBatches
    from training.run.replay import save_failed_step
    from training.step import train_step

    run = session.run
    state = session.state
    monitor = session.monitor
    corpus = session.corpus
    batches_by_step = TrainingBatches(
        corpus.train,
        run.model.context_length,
        run.seed,
        run.sequences,
        run.micro_batch_size,
        run.document_start(corpus.tokenizer),
    )
    evaluation = session.evaluate_before_steps(done)
    for step in range(done, run.steps):
        with monitor.timing_data():
            batches = batches_by_step.of_step(step, monitor.device)
        try:
            result = train_step(
                state.mixed,
                state.optimizer,
                batches,
                run.lr_factor(step),
                run.clip_norm,
                seeds=(run.seed, step),
                loss=mean_loss,
                clip=state.clip,
                between=session.check_stop,
            )
        except Stopped:
            session.save_if_new(step, evaluation)
            session.report_stop(step, within=True)
            raise
        done = step + 1
        evaluation_due = done == run.steps or (run.eval_every > 0 and done % run.eval_every == 0)
        evaluation = session.evaluate(done) if evaluation_due else None
        monitor.step(done, result, batches, evaluation, unscored=evaluation_due and evaluation is None)
        stopping = session.stop.signal is not None
        if stopping or session.save_is_due(done):
            session.save(done, evaluation)
        if monitor.guard.diverged:
            raise save_failed_step(session.folder, run, corpus, state, done, monitor.guard.in_a_row, batches)
        if stopping:
            session.report_stop(done)
            raise Stopped
        if run.sample_every and done % run.sample_every == 0 and done < run.steps:
            with monitor.paused_timer():
                monitor.print_text(preview())
    return evaluation


def print_score(evaluation: "Evaluation") -> None:
    """Print the one line that a run of a sweep ends with."""
    from training.monitor.summary import validation_line

    print_stderr(validation_line(evaluation.reported))


def print_result(sample: str, lines: list[str], folder: Path) -> None:
    """Print the end of a run on stdout, whether or not anybody reads it: the run itself is saved."""
    lost = write_if_possible("\n".join(["", escaped_for_terminal(sample), "", *map(escaped, lines)]))
    if lost is not None:
        print_stderr(f"stdout cannot be written: {reason(lost)}; the run is saved in {folder}")


@contextmanager
def stop_ends_process(stop: StopRequest, folder: Path) -> Iterator[None]:
    """A context around the training loop: a signal that stops it ends the process with the shell's exit code of that
    signal, and a second one at once, with one line."""
    from training.run.start import how_to_continue

    try:
        yield
    except Stopped:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print_stderr(f"stopped at once; {how_to_continue(folder)}")
        sys.exit(130)


if __name__ == "__main__":
    main()
