"""Train a language model: the story of one run, from the composed configuration to a sampled text.

python train.py                                   # tiny MHA model on SymPy's source, minutes on a laptop
python train.py attention=mla steps=300           # any setting of conf/ can be overridden
python train.py --help
"""

import copy
import logging
import os
import sys

if __name__ == "__main__":
    from common import process

    process.start()

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common import ranks
from common.cli import one_line_errors, smaller_batches_advised
from common.errors import escaped, reason
from common.hydra_errors import one_line_hydra_errors
from common.invocation import CONF, version_line
from common.overrides import hydra_arguments, sweep_overrides
from common.signals import Stopped, StopRequest
from common.streams import escaped_for_terminal, print_line, print_stderr, write_if_possible
from training.run.composer import asks_hydra_itself, compose_request, request_of

if TYPE_CHECKING:
    from training.evaluate import Evaluation

# Hydra is imported inside `main`, where its absence is one line, and torch, with all that needs it, inside `train`:
# --help answers before it would have loaded.


def main() -> None:
    request = {}
    with one_line_errors(), one_line_hydra_errors(sys.argv[1:]):  # here, for the overrides themselves
        if "--version" in sys.argv[1:]:
            return print_line(version_line())
        import hydra

        sweep = sweep_overrides(sys.argv[1:])
        if sweep is not None:
            from ablation.sweep.run import run_sweep

            sys.exit(run_sweep(sweep))

        words = hydra_arguments(sys.argv[1:])
        if asks_hydra_itself(words):
            os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would otherwise print over several lines
            sys.argv[1:] = words
            main_of_hydra = hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")
            main_of_hydra(lambda cfg: request.update(request_of(cfg)))()
        else:
            request = compose_request(words)
    if request:  # none where Hydra only shows something, as with --help
        with one_line_errors():
            processes = processes_to_start(request["tree"], request["typed"])
            if processes > 1:
                from training.parallel.launch import launch

                sys.exit(launch(processes, sys.argv[1:]))
            train(**request)


def processes_to_start(tree: dict, typed: list[str]) -> int:
    """How many processes a command is to start on this machine for its run; 1 where it trains in its own."""
    if ranks.started_together() or tree["dry_run"]:
        return 1
    chosen = tree["parallel"]
    if tree["resume"] is not None:
        from training.run.folder import parallel_of

        chosen = parallel_of(str(tree["resume"]), tree, typed)
    if not isinstance(chosen, dict) or "processes" not in chosen:
        return 1
    from training.run.processes import processes_here

    count = processes_here(chosen, typed)
    if count > 1:
        check_startable(count, copy.deepcopy(tree), typed)
    return count


def check_startable(processes: int, tree: dict, typed: list[str]) -> None:
    """Raise UserError where so many processes would all refuse what a command asks for, before there are any."""
    from training.minutes import check_one_process
    from training.run.config import pop_command_settings
    from training.run.processes import with_processes
    from training.run.start import resolve_run

    given = pop_command_settings(tree)
    if given["minutes"] is not None:
        check_one_process(given["minutes"], tree["parallel"])
    logging.disable()  # what is to be warned of, the processes say
    with ExitStack() as held:
        held.callback(logging.disable, logging.NOTSET)
        run, _ = resolve_run(tree, typed, held, given["resume"], locks=False)
    with_processes(run, processes, typed)


def train(tree: dict, typed: list[str], choices: dict[str, str]) -> None:
    """Train one run. tree: the composed configuration; typed: the overrides on the command line; choices: the choice of
    each group."""
    from common import process
    from data.batches import check_split_lengths, micro_batch_of
    from data.shards.prepare import prepare
    from generation.preview import continuation, preview_prompt
    from training.dry_run import dry_run
    from training.measure import measure
    from training.monitor.monitor import Monitor
    from training.parallel.gather import whole_model
    from training.parallel.join import check_agreement, join, restarted
    from training.run.config import dump
    from training.run.folder import create
    from training.run.start import begin_or_resume
    from training.session import Session
    from training.step import train_step

    process.end_by_unwinding()
    with ExitStack() as held:  # the lock on its folder, released however this ends
        tree, typed = restarted(tree, typed)
        run, folder, device = requested_run(tree, typed, choices, held)
        length = run.model.context_length
        if run.dry_run:
            return dry_run(run, device, folder, check=lambda corpus: preview_prompt(corpus, run.sample_prompt, length))

        world = held.enter_context(join(run, device))
        corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir), window=length + 1)
        check_split_lengths(corpus, length, run.eval_tokens)
        preview_tokens = preview_prompt(corpus, run.sample_prompt, length)
        run = run.model_copy(update={"data": run.data.with_fixed_revision()})
        check_agreement(world, settings=dump(run), text=[corpus.fingerprint, corpus.tokenizer.hash])
        state, folder = begin_or_resume(
            run, corpus, device, world, folder, lambda: create(run, corpus.tokenizer, choices, held)
        )
        world.trains_in(folder)
        monitor = Monitor(run, folder, corpus, measure(run, corpus, state.model, device), state)
        share = run.sequences // world.size
        advice = smaller_batches_advised(share, micro_batch_of(share, run.micro_batch_size))

        def preview() -> str:
            model = whole_model(state)
            return continuation(model, corpus.tokenizer, preview_tokens, run.seed) if world.is_first else ""

        with (
            advice,
            StopRequest() as stop,
            stop_ends_process(stop, folder),
            monitor,
            Session(run, folder, corpus, state, monitor, stop) as session,
        ):
            session.evaluate_before_steps()
            for step in range(state.step, run.steps):
                batches = session.next_batches()
                with session.saving_where_stopped():
                    result = train_step(state, batches, run.lr_factor(step), session.check_stop)
                session.end_step(result, batches)
                if session.preview_is_due():
                    with monitor.paused_timer():
                        monitor.print_text(preview())
        if process.in_sweep:
            print_score(session.evaluation)
        else:
            print_result(preview(), monitor.final_lines(session.evaluation), folder)
        monitor.draw_picture()


def requested_run(tree: dict, typed: list[str], choices: dict[str, str], held: ExitStack) -> tuple:
    """The run that a command asks for; its folder, if it has one already; and the device, which is set up for it.
    held: takes the lock on the folder; the others as `train` has them."""
    from common import process
    from common.console import to_stderr
    from runtime.device import choose_device, set_determinism, set_threads
    from runtime.precision import choose_precision
    from training.experimental_settings import warn_experimental_settings
    from training.large_rates import warn_large_rates
    from training.minutes import check_one_process, steps_for
    from training.run.config import check_not_of_sweep, pop_command_settings
    from training.run.processes import with_processes
    from training.run.start import resolve_run

    to_stderr(logging.WARNING if process.in_sweep else logging.INFO)
    given = pop_command_settings(tree)
    check_not_of_sweep(given)
    if given["minutes"] is not None:
        check_one_process(given["minutes"], tree["parallel"])
        tree["steps"] = steps_for(given, resolve_run(tree, typed, held)[0], typed)
    run, folder = resolve_run(tree, typed, held, given["resume"], locks=ranks.rank() == 0)
    foreseen = run.parallel.count if run.dry_run else 1
    run = with_processes(run, ranks.size() if ranks.started_together() else foreseen, typed)
    run.logger.check_installed()
    set_determinism(run.deterministic)
    set_threads(run.threads)
    device = choose_device(run.device, ranks.local_rank() if ranks.size() > 1 else None)
    run.model.check_training(device)
    run = run.model_copy(update={"precision": choose_precision(run.precision, device)})  # as config.yaml shall say
    warn_experimental_settings(run, device, typed)
    if folder is None:
        warn_large_rates(run, typed, choices["optim"])
    return run, folder, device


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
