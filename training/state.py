"""TrainState: the model, its mixed precision, the optimizer and QK-clip."""

from typing import NamedTuple, Self

import torch

from model.initialise import initialised
from model.transformer import TransformerLM
from runtime.activation_checkpointing import checkpoint_activations
from runtime.precision import LossScale, MixedPrecision
from training.optim.qk_clip import QKClip
from training.run.config import Run


class TrainState(NamedTuple):
    """A model in training. Weights, optimizer state and loss scale are what a checkpoint holds of it."""

    model: TransformerLM  # the float32 master weights
    mixed: MixedPrecision  # what forward and backward run on
    optimizer: torch.optim.Optimizer
    clip: QKClip | None = None

    @classmethod
    def create(cls, run: Run, vocab_size: int, device: torch.device) -> Self:
        """A freshly initialised model of the run, in its precision, with its optimizer. run: with a chosen precision
        (not auto)."""
        model = initialised(run.model, vocab_size, run.seed).to(device)
        run.optim.freeze(model)
        mixed = MixedPrecision(model, run.precision)
        if run.activation_checkpointing:
            checkpoint_activations(mixed.model)
        return cls(model, mixed, run.optim.build(model), run.optim.clip(model))

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of float16; None in other precisions."""
        return self.mixed.loss_scale
