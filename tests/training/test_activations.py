"""Memory of activations for the backward pass: it grows linearly with the text, and with activation_checkpointing=true
there is little of it, and not a bit else changes."""

import copy
import functools
import math

import pytest
import torch

from data.batches import Batch
from model.initialise import initialised
from model.kernels import auto, sdpa
from model.kernels.auto import Auto
from model.kernels.base import How, Kernel
from model.mask import CAUSAL, Mask
from model.transformer import TransformerLM
from runtime.activation_checkpointing import checkpoint_activations
from runtime.memory import allocated_peak
from runtime.precision import MixedPrecision
from tests.model.attention import laws
from tests.support import (
    ATTENTIONS,
    QUICK,
    batches,
    call,
    composed_run,
    relative_error,
    small_model,
    some_tokens,
    training_state,
)
from training.losses import Losses, mean_loss
from training.metrics_file import read_metrics
from training.optim.qk_clip import QKClip
from training.step import accumulate_gradients

DROPOUT = ("model.dropout=0.1", "attention.dropout=0.1")


def gradients(model: TransformerLM, precision: str, checkpointed: bool, document_start: int | None = None, **options):
    """Of two micro-steps, by the parameter's name, and what the loss reported. options: of mean_loss."""
    model = copy.deepcopy(model)
    losses = Losses(functools.partial(mean_loss, **options))
    hooks = [QKClip(model, 1.0)] if options else []
    state = training_state(model, precision=precision, losses=losses, after_step=hooks)
    if checkpointed:
        auto.tried.cache_clear()  # whose trial of a kernel is then within a block that is recomputed
        checkpoint_activations(state.precision.model)
    parts = [Batch.of(*batch[:2], document_start) for batch in batches(4, 2)]
    reported = accumulate_gradients(state, parts)
    return reported, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Any two of these meet; of each attention two are fast, in which each way is there and is not.
WAYS = [("fp32", False, None), ("bf16", True, 7), ("fp32", True, 7), ("bf16", False, None)]


@pytest.mark.parametrize(
    ("attention", "precision", "dropout", "document_start"),
    [
        pytest.param(attention, *way, marks=() if i // 2 == j % 2 else pytest.mark.slow)
        for j, attention in enumerate(ATTENTIONS)
        for i, way in enumerate(WAYS)
    ],
)
def test_activation_checkpointing_changes_no_bit(attention, precision, dropout, document_start):
    options = () if not dropout else DROPOUT[:1] if attention == "stack" else DROPOUT  # whose parts have their own
    model = small_model(f"attention={attention}", *options, kernel=Auto())
    (kept, _), exact = gradients(model, precision, False, document_start)
    (recomputed, _), found = gradients(model, precision, True, document_start)
    assert torch.equal(kept, recomputed)
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_activation_checkpointing_recomputes_and_repeats_dropout(monkeypatch):
    """A block's MLP runs once more in the backward pass, and dropout would draw other numbers if not told to repeat."""
    model, calls = small_model("attention=mha", *DROPOUT, kernel=Auto()), []
    model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    _, exact = gradients(model, "fp32", False)
    assert len(calls) == 2  # micro-steps
    gradients(model, "fp32", True)
    assert len(calls) == 6
    monkeypatch.setattr(
        "runtime.activation_checkpointing.checkpoint",
        lambda *arguments, **_: torch.utils.checkpoint.checkpoint(
            *arguments, use_reentrant=False, preserve_rng_state=False
        ),
    )
    _, found = gradients(model, "fp32", True)
    assert any(not torch.equal(found[name], exact[name]) for name in exact)


def test_activation_checkpointing_reports_the_scores_for_clipping_once():
    model = small_model("attention=gqa", "attention.qk_norm=false", kernel=Auto())
    (kept, scores), exact = gradients(model, "fp32", False, collect=frozenset({QKClip.collects}))
    (recomputed, again), found = gradients(model, "fp32", True, collect=frozenset({QKClip.collects}))
    assert torch.equal(kept, recomputed)
    assert scores and all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    checkpoint_activations(model)
    aux = model(some_tokens(2, 16), training=True, collect=frozenset({QKClip.collects})).aux
    assert list(aux) == [f"layers.{i}.max_logit" for i in range(len(model.layers))]


def test_activation_checkpointing_compiles_as_one_graph():
    model, (batch,) = small_model("attention=mla", "model.n_layers=1", kernel=Auto()), batches(4, 4)
    expected = torch.autograd.grad(mean_loss(model, batch)[0], list(model.parameters()))
    compiled = torch.compile(mean_loss, backend="aot_eager", dynamic=False, fullgraph=True)
    checkpoint_activations(model)
    found = torch.autograd.grad(compiled(model, batch)[0], list(model.parameters()))
    for gradient, exact in zip(found, expected, strict=True):
        assert relative_error(gradient, exact) <= 1e-4


def test_activation_checkpointing_decodes_as_without_it():
    """As a preview during training does in float32."""
    model = small_model("attention=mla")
    expected = list(laws.ways_to_decode(model, some_tokens(2, 23)))
    checkpoint_activations(model)
    for (way, found), (_, exact) in zip(laws.ways_to_decode(model, some_tokens(2, 23)), expected, strict=True):
        assert torch.equal(found, exact), way


def test_activation_checkpointing_may_begin_where_a_run_is_resumed(workplace, monkeypatch):
    options = [*QUICK, "steps=6", "save_every=3", "model.dropout=0.1"]
    assert call("train", [*options, "run_dir=kept"], monkeypatch) == 0
    assert call("train", [*options, "run_dir=recomputed", "activation_checkpointing=true"], monkeypatch) == 0
    losses = [
        [row["train_loss"] for row in read_metrics(workplace / run / "metrics.jsonl")] for run in ("kept", "recomputed")
    ]
    assert losses[0] == losses[1]
    assert call("train", ["resume=kept", "steps=8", "activation_checkpointing=true"], monkeypatch) == 0


PATHS = [
    ("attention=mha",),
    ("attention=gqa",),
    ("attention=mla",),
    ("attention=mha", "attention.window=64"),
    ("attention=mha", "document_mask=true"),
    ("attention=mla", "document_mask=true"),
]


SELDOM = [(PATHS[1], "fp32"), (PATHS[5], "fp32"), (PATHS[2], "bf16")]  # for which others stand


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        *[(options, "fp32") for options in PATHS if (options, "fp32") not in SELDOM],
        (PATHS[4], "bf16"),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_activation_memory_grows_linearly_with_the_text(options, precision):
    """On the default kernel, beyond the lengths up to which it keeps what grows as their square."""
    assert growth(options, precision, (2048, 4096)) <= 1.05


def test_activation_memory_with_every_mask_kept_grows_faster(monkeypatch):
    monkeypatch.setattr(sdpa, "MAX_SAVED_MASK_KEYS", math.inf)
    assert growth(("attention=mha", "kernel=sdpa", "document_mask=true"), "fp32", (2048, 4096)) > 1.3


def growth(options: tuple[str, ...], precision: str, lengths: tuple[int, int]) -> float:
    """The exponent of the peak of forward and backward, in the number of tokens."""
    peaks = []
    for length in lengths:
        size = ["model.n_layers=1", "model.d_model=32", f"model.context_length={length}", f"batch_tokens={length}"]
        run = composed_run("model.n_heads=2", f"precision={precision}", *size, *options, f"eval_tokens={length}")
        mixed, text = MixedPrecision(initialised(run.model, 256), precision), some_tokens(1, length, 256)
        batch = Batch.of(text, text, 255 if run.document_mask else None)
        peaks.append(allocated_peak(lambda w=mixed, batch=batch: w.backward(mean_loss(w.model, batch)[0])))
    return math.log(peaks[1] / peaks[0], lengths[1] / lengths[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_sdpa_tile_recomputed_in_backward_is_bit_identical(monkeypatch, groups):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 600, heads, 8, generator=draw).requires_grad_() for heads in (4, groups, groups))
    docs = (torch.arange(600) // 100)[None].expand(2, -1)
    mask = Mask(positions := torch.arange(600)[None] % 100, positions, False, CAUSAL, docs, docs)
    kept = passes(sdpa.SDPA(), q, k, v, mask)
    monkeypatch.setattr(sdpa, "MAX_SAVED_MASK_KEYS", 128)
    for found, exact in zip(passes(sdpa.SDPA(), q, k, v, mask), kept, strict=True):
        assert torch.equal(found, exact)
    compiled = torch.compile(passes_of(sdpa.SDPA(), mask), backend="aot_eager", dynamic=False, fullgraph=True)
    for found, exact in zip(torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)), kept[1:], strict=True):
        assert relative_error(found, exact) <= 1e-5


def passes_of(kernel: Kernel, mask: Mask):
    return lambda q, k, v: kernel(q, k, v, mask, How(0.3)).out


def passes(kernel: Kernel, q, k, v, mask: Mask) -> list[torch.Tensor]:
    out = kernel(q, k, v, mask, How(0.3)).out
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
