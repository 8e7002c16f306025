"""QK-clip: what it does to scores, to whom, and when."""

import functools

import pytest
import torch

from common.errors import UserError
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from tests.support import (
    QUICK,
    batches,
    call,
    configured,
    relative_error,
    small_model,
    some_tokens,
    training_state,
)
from tests.training.runs import assert_same_run, rewind
from training.losses import Losses, mean_loss
from training.metrics_file import read_metrics
from training.optim.adamw import AdamWConfig
from training.optim.qk_clip import QKClip
from training.step import accumulate_gradients, train_step

CASES = [
    ("attention=mha", "attention.qk_norm=false"),
    ("attention=mha", "attention.qk_norm=false", "model.bias=true", "position=none"),
    ("attention=gqa", "attention.qk_norm=false", "attention.rope_dim=6", "model.bias=true"),
    ("attention=mqa", "attention.qk_norm=false"),
    ("attention=mla", "attention.qk_norm=latent"),
    (
        "attention=mla",
        "attention.qk_norm=latent",
        "attention.q_lora_rank=24",
        "model.bias=true",
        "attention.execution=absorbed",
    ),
    ("attention=mla", "attention.qk_norm=latent", "attention.k_rope_from=latent"),
    ("attention=mla", "attention.qk_norm=latent", "position=none"),
]
GOOD = torch.tensor(False)
collecting = functools.partial(mean_loss, collect=frozenset({QKClip.collects}))


def max_logits(model) -> torch.Tensor:
    with torch.no_grad():
        aux = model(some_tokens(2, 24), collect=frozenset({"max_logit"})).aux
    return torch.stack(list(aux.values()))  # (layers, heads)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_qk_clip_scales_the_scores_of_heads_beyond_the_threshold_by_gamma(case):
    """In the first layer, whose input does not change; heads that share a key shrink together."""
    model = small_model(*case)
    before = max_logits(model)[0]
    threshold = before.sort().values[1:3].mean().item()  # two heads are beyond it
    beyond = before > threshold
    assert beyond.sum() == 2
    found = QKClip(model, threshold)(max_logits(model), GOOD)
    assert found["max_logit"] == max_logits(small_model(*case)).amax()
    assert found["clipped_heads"] == (max_logits(small_model(*case)) > threshold).sum()
    gamma = torch.where(beyond, threshold / before, 1.0)
    keys = {"gqa": 2, "mqa": 1}.get(case[0].split("=")[1], 4)
    gamma = gamma.view(keys, -1).amin(1, keepdim=True).expand(keys, 4 // keys).flatten()
    assert relative_error(max_logits(model)[0], before * gamma) <= 1e-5
    assert max_logits(model)[0].amax() <= threshold * (1 + 1e-5)


def test_qk_clip_leaves_values_and_heads_below_the_threshold_alone():
    model, twin = (small_model("attention=mla", "attention.qk_norm=latent") for _ in range(2))
    assert QKClip(model, 1e4)(max_logits(model), GOOD)["clipped_heads"] == 0
    QKClip(model, 1e-3)(max_logits(model), torch.tensor(True))  # a step that was skipped
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    QKClip(model, 1e-3)(max_logits(model), GOOD)
    changed = {name for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True)
               if not torch.equal(a, b)}  # fmt: skip
    parts = ("q_proj.weight", "q_proj.bias", "kv_up.weight")
    assert changed == {f"layers.{i}.attention.{part}" for i in (0, 1) for part in parts}
    mine, its = dict(model.named_parameters()), dict(twin.named_parameters())
    values = [(name, layout) for name, layout in model.layout().items() if "v" in [part.name for part in layout.parts]]
    assert len(values) == 2
    for name, layout in values:
        assert torch.equal(layout.views(mine[name])["v"], layout.views(its[name])["v"])


def test_qk_clip_that_some_layers_do_not_report_to_is_refused():
    model = small_model("attention=mla", "attention.qk_norm=latent")
    with pytest.raises(UserError, match=r"max_logit of every layer, and 1 of 2 return it.*leave optim.qk_clip unset"):
        QKClip(model, 1.0)(max_logits(model)[:1], GOOD)


def test_train_step_clips_by_the_largest_scores_of_its_micro_batches():
    model = small_model("attention=mla", "attention.qk_norm=latent", kernel=Naive())

    def largest(threshold: float, data: list) -> torch.Tensor:
        """(layers, heads)"""
        state = training_state(model, losses=Losses(collecting), after_step=[QKClip(model, threshold)])
        return torch.stack(list(accumulate_gradients(state, data)[1].values()))

    each = [largest(1.0, [batch]) for batch in batches(4, 1)]
    together = largest(1.0, batches(4, 1))
    assert torch.equal(torch.stack(each).amax(0), together) and together.shape == (2, 4)
    assert not together.requires_grad
    model.zero_grad()
    threshold, before = together.median().item(), model.layers[0].attention.kv_up.weight.detach().clone()
    optimizer = configured(AdamWConfig, lr=1e-6).build(model)
    clip = QKClip(model, threshold)
    state = training_state(model, optimizer, clip_norm=1.0, losses=Losses(collecting), after_step=[clip])
    result = train_step(state, batches(4, 1), 1.0)
    assert result.reported == {"max_logit": together.amax(), "clipped_heads": (together > threshold).sum()}
    assert result.reported["clipped_heads"] > 0
    assert relative_error(model.layers[0].attention.kv_up.weight, before) > 1e-3


def test_mean_loss_that_collects_has_the_same_loss():
    model, (batch,) = small_model("attention=gqa"), batches(4, 4)
    assert torch.equal(collecting(model, batch)[0], mean_loss(model, batch)[0])


@pytest.mark.parametrize("attention", ["mla", pytest.param("gqa", marks=pytest.mark.slow)])
def test_mean_loss_that_collects_compiles_as_one_graph(attention):
    model, (batch,) = small_model(f"attention={attention}", "model.n_layers=1", kernel=SDPA()), batches(4, 4)
    expected, scores = collecting(model, batch)
    compiled = torch.compile(collecting, backend="aot_eager", dynamic=False, fullgraph=True)
    loss, found = compiled(model, batch)
    assert relative_error(loss, expected) <= 1e-5 and found.keys() == scores.keys() and len(scores) == 1
    assert all(relative_error(found[name], scores[name]) <= 1e-5 for name in scores)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(one, parameters) for one in (loss, expected)]
    for gradient, exact in zip(*gradients, strict=True):
        assert relative_error(gradient, exact) <= 1e-4


MUON, ADAMW = (
    ["attention=mla", "attention.qk_norm=latent", "optim=muon"],
    ["attention=gqa", "attention.qk_norm=false", "optim=adamw"],
)


@pytest.mark.parametrize(
    ("choice", "compiled"),
    [(MUON, False), (ADAMW, False), *(pytest.param(choice, True, marks=pytest.mark.slow) for choice in (MUON, ADAMW))],
)
def test_qk_clip_run_resumed_is_bit_exact(workplace, monkeypatch, capsys, choice, compiled):
    options = [*QUICK, *choice, "optim.qk_clip=0.02", "model.n_layers=1", f"compile={compiled}", "steps=12"]
    options += ["save_every=5", "eval_every=4", "micro_batch_size=1"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    rows = read_metrics(workplace / "whole/metrics.jsonl")
    assert all(row["max_logit"] > 0 for row in rows) and any(row["clipped_heads"] for row in rows)
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)
    assert "running eagerly" not in capsys.readouterr().err


def test_run_without_qk_clip_has_no_rows_of_it(workplace, monkeypatch):
    assert call("train", [*QUICK, "steps=2", "run_dir=run"], monkeypatch) == 0
    assert not any(
        "max_logit" in row or "clipped_heads" in row for row in read_metrics(workplace / "run/metrics.jsonl")
    )
