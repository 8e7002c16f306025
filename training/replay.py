"""A step whose loss or gradients were not finite, kept with its batch, and computed anew to see where it begins.

python -m training.replay runs/NAME/failures/step_00000012
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from data.errors import UserError
from data.prepare import Prepared
from data.tokenizer import load_tokenizer
from training import checkpoint
from training.command import Parser, one_line_errors
from training.config import Run, load
from training.device import choose_device
from training.log import to_stderr
from training.precision import LossScale, Working
from training.run_folder import refuse_no_run
from training.step import accumulate, mean_loss

BATCH = "batch.safetensors"
SHOWN = 120  # characters of each text
NAMED = 6  # parameters


def keep(
    folder: Path,
    run: Run,
    corpus: Prepared,
    training: checkpoint.Training,
    step: int,
    in_a_row: int,
    batches: list[tuple[Tensor, Tensor]],
) -> UserError:
    """Writes the step to failures/ -> what to tell the user. Call it before another step: the step was skipped, so the
    weights are still those it met."""
    path = folder / "failures" / f"step_{step:08d}"
    inputs, targets = (torch.stack(part) for part in zip(*batches, strict=True))  # (micro-steps, B, T)
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.write(path, run, corpus, training, step, others={BATCH: {"inputs": inputs, "targets": targets}})
    except OSError as error:
        return UserError(f"step {step} failed, and {path} cannot be written: {error.strerror or error}")
    return UserError(
        f"{in_a_row} updates in a row were skipped up to step {step}: training has diverged; start anew with a "
        f"smaller optim.lr than {run.optim.lr:.3g}, or see where it begins: python -m training.replay {path}"
    )


def replay(path: Path) -> None:
    """Prints what the step computes, and where it ceases to be finite."""
    refuse_no_run(path.parent.parent)
    found = checkpoint.read(path, (checkpoint.MODEL, BATCH))
    run, step = load(found.manifest.config), found.manifest.step
    tokenizer = load_tokenizer(path.parent.parent / "tokenizer.json")
    model = checkpoint.empty_model(run.model, tokenizer.vocab_size)
    model.load_state_dict(found.tensors[checkpoint.MODEL])
    device = choose_device(run.device)
    working = Working(model.to(device), run.precision)
    if found.manifest.loss_scale is not None:
        scale = LossScale.State(**found.manifest.loss_scale)
        working.loss_scale.load(scale._replace(scale=2 * scale.scale))  # before this step halved it
    batches = list(zip(*(found.tensors[BATCH][name].to(device) for name in ("inputs", "targets")), strict=True))

    first = FirstNotFinite(working.model)
    for i, (inputs, targets) in enumerate(batches):
        loss = mean_loss(working.model, inputs, targets).item()
        beginning = tokenizer.decode(inputs[0].tolist())[:SHOWN]
        print(f"micro-step {i}: loss {loss:.4f} nats per token, its text begins {beginning!r}")
    print(f"forward      {first.where or 'finite everywhere'}")
    accumulate(working, batches, (run.seed, step - 1))
    bad = [name for name, parameter in model.named_parameters() if not parameter.grad.isfinite().all()]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    print(f"gradients    norm {norm:.4g}; not finite in {', '.join(bad[:NAMED]) or 'none'}{more}")
    largest = max(model.named_parameters(), key=lambda item: item[1].abs().max().nan_to_num(torch.inf))
    print(f"weights      the largest number is {largest[1].abs().max():.4g}, in {largest[0]}")


class FirstNotFinite:
    """Watches the outputs of all modules, and remembers the first that is not finite."""

    def __init__(self, model: nn.Module):
        self.where: str | None = None
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._watch(name, module))

    def _watch(self, name: str, module: nn.Module):
        def hook(_module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if self.where is None and not output.isfinite().all():
                fine = all(x.isfinite().all() for x in inputs if isinstance(x, Tensor))
                source = "of finite numbers" if fine else "of numbers that were not finite already"
                self.where = f"first not finite in the output of {name} ({type(module).__name__}), {source}"

        return hook


def main() -> None:
    parser = Parser(prog="training.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a folder of a run's failures/")
    args = parser.parse_args()
    with one_line_errors():
        to_stderr()
        replay(args.path)


if __name__ == "__main__":
    main()
