"""Replaying a step whose loss or gradients were not finite: stored with its batch, recomputed to see where it begins.

python -m training.run.replay runs/NAME/failures/step_00000012      # in the checkout
"""

if __name__ == "__main__":
    from common import process

    process.start("torch", "hydra", "pydantic", "rich", "safetensors", "tokenizers")

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from common import process
from common.atomic_io import exists
from common.cli import Parser, one_line_errors
from common.console import to_stderr
from common.errors import UserError, reason
from common.invocation import command
from common.paths import entering
from common.streams import print_line
from data.batches import Batch
from data.shards.prepare import Prepared
from model.loss import NOT_COUNTED
from model.transformer import Hidden
from runtime.device import choose_device
from runtime.precision import MixedPrecision, choose_precision
from training.losses import Losses, mean_loss
from training.run import checkpoint
from training.run.config import Run
from training.run.folder import check_is_run, read_tokenizer
from training.state import TrainState
from training.step import accumulate_gradients

BATCH = "batch.safetensors"
MAX_TEXT_SHOWN = 120  # characters of each text
MAX_PARAMETERS_NAMED = 6  # parameters


def save_failed_step(
    folder: Path,
    run: Run,
    corpus: Prepared,
    state: TrainState,
    in_a_row: int,
    batches: list[Batch],
) -> UserError:
    """Store the step in failures/ -> what to tell the user. Call it before another step: the step was skipped, so the
    weights are still those it met."""
    step = state.step
    path = folder / "failures" / f"step_{step:08d}"
    rates = ", or ".join(f"optim.{name} than {rate:.3g}" for name, rate in run.optim.base_lrs.items())
    diverged = (
        f"{in_a_row} updates in a row were skipped up to step {step}: training has diverged; start again with "
        f"a smaller {rates}"
    )
    tokens = {name: torch.stack([getattr(batch, name) for batch in batches]) for name in ("inputs", "targets")}
    files = {checkpoint.MODEL: checkpoint.model_tensors(state), BATCH: tokens}  # (micro-steps, B, T) each
    try:
        checkpoint.write(path, run, corpus, state, files)
    except OSError as error:
        return UserError(f"{diverged} (the step cannot be stored in {path}: {reason(error)})")
    return UserError(f"{diverged}, or see where it begins: {command('-m training.run.replay', str(path))}")


def replay(path: Path) -> None:
    """Recompute the step, eagerly and on the run's kind of device, and print the first module whose output is not
    finite."""
    folder = path.resolve().parent.parent
    with entering(path):
        has_batch = exists(path / BATCH)
    if not has_batch:
        raise UserError(f"{path} is not a stored step: give a folder of a run's failures/")
    check_is_run(folder)
    found = checkpoint.read(path, (checkpoint.MODEL, BATCH))
    run, step = checkpoint.settings_of(found.path, found.manifest), found.manifest.step
    tokenizer, device = read_tokenizer(folder), choose_device(run.device)
    checkpoint.check_tokenizer(folder, tokenizer, found.manifest.tokenizer)
    inputs, targets = stored_batch(found, run, tokenizer.vocab_size)
    model = checkpoint.load_model(found, run.model, tokenizer.vocab_size)
    precision = choose_precision(run.precision, device) if run.precision == "auto" else run.precision
    model = model.to(device)
    state = TrainState(model, MixedPrecision(model, precision), run.optim.build(model), seed=run.seed, step=step - 1)
    if found.manifest.loss_scale is not None and state.loss_scale is not None:
        before = found.manifest.loss_scale.scale * 2  # this step halved it
        state.loss_scale.load(found.manifest.loss_scale.model_copy(update={"scale": before}))
    start = run.document_start(tokenizer)
    batches = [Batch.of(*tokens, start).to(device) for tokens in zip(inputs, targets, strict=True)]
    first = FirstNotFinite(state.precision.model)

    def watched(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, aux = mean_loss(model, batch)
        text = tokenizer.decode_bytes(batch.inputs[0].tolist()).decode(errors="replace")[:MAX_TEXT_SHOWN]
        print_line(f"micro-step   loss {loss.item():.4f} nats per token, its text begins {text!r}")
        return loss, aux

    state.losses = Losses(watched)
    accumulate_gradients(state, batches)
    print_line(f"forward      {first.where or 'finite everywhere'}")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    norm = nn.utils.get_total_norm(list(gradients.values()))
    more = f" and {len(bad) - MAX_PARAMETERS_NAMED} more" if len(bad) > MAX_PARAMETERS_NAMED else ""
    print_line(f"gradients    norm {norm:.4g}; not finite in {', '.join(bad[:MAX_PARAMETERS_NAMED]) or 'none'}{more}")
    largest = max(model.named_parameters(), key=lambda item: item[1].abs().max().nan_to_num(torch.inf))
    print_line(f"weights      the largest number is {largest[1].abs().max():.4g}, in {largest[0]}")


def stored_batch(found: checkpoint.Checkpoint, run: Run, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of the stored step, (micro-steps, B, T) int64. Raises UserError where they are no tokens
    of this run."""
    shape = (run.sequences // run.micro_batch_size, run.micro_batch_size, run.model.context_length)
    tensors = found.tensors[BATCH]
    for name in ("inputs", "targets"):
        tokens = tensors.get(name)
        if tokens is None or tokens.shape != shape or tokens.dtype != torch.int64:
            raise UserError(f"{found.path}/{BATCH} does not fit the run's settings: {name} is not of {shape} int64")
        lowest = NOT_COUNTED if name == "targets" else 0
        if not ((tokens >= lowest) & (tokens < vocab_size)).all():
            raise UserError(f"{found.path}/{BATCH} holds {name} that are no tokens of a vocabulary of {vocab_size:,}")
    return tensors["inputs"], tensors["targets"]


class FirstNotFinite:
    """Forward hooks on all modules, inner ones first, that record the first output that is not finite."""

    def __init__(self, model: nn.Module):
        self.where: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(self._watch(name or "the logits", module))

    def _watch(self, name: str, module: nn.Module):
        def hook(_module: nn.Module, inputs: tuple, output: Tensor | tuple | Hidden) -> None:
            if isinstance(output, Hidden):  # the loss makes its logits a piece at a time
                result = module.logits(output.x)
            else:
                result = output[0] if isinstance(output, tuple) else output
            if self.where is None and not result.isfinite().all():
                fine = all(x.isfinite().all() for x in inputs if isinstance(x, Tensor))
                source = "of finite numbers" if fine else "of numbers that were not finite already"
                self.where = f"first not finite in the output of {name} ({type(module).__name__}), {source}"

        return hook


def main() -> None:
    parser = Parser(
        prog="-m training.run.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a folder of a run's failures/")
    with one_line_errors():
        process.end_by_unwinding()
        to_stderr()
        replay(parser.parse_args().path)


if __name__ == "__main__":
    main()
