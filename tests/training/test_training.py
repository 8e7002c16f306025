"""Steps, schedules, precision, evaluation and checkpoints, by what they promise a run."""

import itertools
import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.batches import Batch, evaluation_batches
from data.shards.token_files import TokenStream
from data.tokenizers.byte import ByteTokenizer
from model import score
from model.initialise import initialised
from model.kernels.sdpa import SDPA
from model.loss import token_losses
from runtime.device import choose_device
from runtime.precision import MixedPrecision, choose_precision
from tests.support import (
    ATTENTIONS,
    batches,
    composed_run,
    configured,
    logits_of,
    relative_error,
    small_config,
    small_model,
    training_state,
)
from training.compile import maybe_compiled
from training.evaluate import evaluate
from training.losses import mean_loss
from training.monitor.guard import Guard
from training.optim.adamw import AdamWConfig
from training.optim.schedule import WSD, Cosine, Linear
from training.step import _seed_micro_step, accumulate_gradients, train_step


def test_token_losses_are_cross_entropy_of_the_next_token():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    expected = -logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    found = token_losses(logits, targets)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)


def test_train_step_repeated_lowers_the_loss():
    model = small_model("attention=gqa", kernel=SDPA())
    state = training_state(model, configured(AdamWConfig, lr=3e-3).build(model), clip_norm=1.0)
    data = batches(8, 8)
    losses = [train_step(state, data, 1.0).loss.item() for _ in range(30)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_gradient_accumulation_changes_nothing_but_rounding(precision, tolerance):
    """Plain gradient descent without clipping: the update is the gradient, whose scale neither would let through."""
    updates, losses = [], []
    for micro in (8, 2, 1):
        model = small_model("attention=mla", kernel=SDPA())
        before = [p.detach().clone() for p in model.parameters()]
        result = train_step(training_state(model, precision=precision), batches(8, micro), 1.0)
        losses.append(result.loss.item())
        updates.append([(p - b).detach() for p, b in zip(model.parameters(), before, strict=True)])
    for other, loss in zip(updates[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=tolerance)
        for found, expected in zip(other, updates[0], strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm()


def test_accumulate_gradients_with_dropout_draws_by_seed_step_and_micro_step():
    model = small_model("attention=gqa", "model.dropout=0.5", kernel=SDPA())
    (batch,) = batches(4, 4)

    def loss(micro_steps: int = 1, **at: int) -> float:
        return accumulate_gradients(training_state(model, **at), [batch] * micro_steps)[0].item()

    assert loss() == loss()
    assert len({loss(), loss(micro_steps=2), loss(step=1), loss(seed=1)}) == 4


def test_a_micro_step_on_a_cpu_draws_what_torch_manual_seed_gives():
    _seed_micro_step((3, 5), 1, torch.device("cpu"))
    seed, found = torch.initial_seed(), torch.rand(9)
    torch.manual_seed(seed)
    assert torch.equal(found, torch.rand(9))
    _seed_micro_step((3, 5), 1, torch.device("meta"))  # as a GPU, by torch.manual_seed
    assert torch.initial_seed() == seed and torch.equal(found, torch.rand(9))


@pytest.mark.parametrize(
    "case", [("attention=mla",), ("attention=gqa", "model.bias=true", "model.norm=layer")], ids=" ".join
)
def test_mixed_precision_in_bfloat16_keeps_float32_master_weights(case):
    model = small_model(*case, kernel=SDPA())
    mixed = MixedPrecision(model, "bf16")
    for master, twin in zip(model.parameters(), mixed.model.parameters(), strict=True):
        assert master.dtype == torch.float32
        assert (twin is master) == (master.ndim < 2)
        assert master is twin or twin.dtype == torch.bfloat16
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(2)
    mixed.copy_master_weights()
    assert torch.equal(mixed.model.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight.bfloat16())
    (batch,) = batches(4, 4)
    mixed.backward(mean_loss(mixed.model, batch)[0])
    low = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.dtype == torch.float32 for grad in low.values())
    assert all(p.grad is None for p in mixed.copies)
    model.zero_grad()
    mean_loss(model, batch)[0].backward()
    for name, parameter in model.named_parameters():
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), low[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_choose_precision_auto_logs_its_choice(caplog):
    with caplog.at_level("INFO", logger="headroom"):
        chosen = choose_precision("auto", torch.device("cpu"))
    assert caplog.records[-1].message.startswith(f"precision {chosen}")
    assert chosen in ("bf16", "fp32")
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"


def test_choose_device_that_is_missing_is_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device=cuda:99"):
        choose_device("cuda:99")


def masked(count: int, micro: int, *rows: int) -> list[Batch]:
    """Batches some of whose targets are not counted, and none of these rows."""
    (whole,) = batches(count, count)
    targets = whole.targets.clone()
    targets[::3, 4:] = -1
    for row in rows:
        targets[row] = -1
    return Batch(whole.inputs, targets).split(micro)


@pytest.mark.parametrize("rows", [(), (2, 3)], ids=["", "a micro-batch without any"])
def test_train_step_weighs_every_counted_target_alike(rows):
    """Against the naive twin: the mean over the counted targets of the whole batch, from all logits at once."""
    model, twin = (small_model("attention=gqa", kernel=SDPA()) for _ in range(2))
    before = [p.detach().clone() for p in model.parameters()]
    result = train_step(training_state(model), masked(8, 2, *rows), 1.0)
    (whole,) = masked(8, 8, *rows)
    each = token_losses(logits_of(twin, whole.inputs), whole.targets)
    expected = each.sum() / (whole.targets >= 0).sum()
    assert not result.skipped and result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(expected, list(twin.parameters()))
    for parameter, was, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert relative_error(was - parameter, gradient) <= 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_step_without_a_counted_target_is_skipped(precision):
    model = small_model("attention=gqa", kernel=SDPA())
    state = training_state(model, configured(AdamWConfig, lr=1e-3).build(model), precision, clip_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    assert train_step(state, masked(4, 2, 0, 1, 2, 3), 1.0).skipped
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert not train_step(state, batches(4, 2), 1.0).skipped


def test_train_step_clips_the_gradient_norm_unless_zero():
    for clip_norm, expected in ((0.5, 0.5), (0.0, None)):
        model = small_model("attention=mha", kernel=SDPA())
        before = [p.detach().clone() for p in model.parameters()]
        result = train_step(training_state(model, clip_norm=clip_norm), batches(4, 4), 1.0)
        moved = torch.stack([(p - b).norm() for p, b in zip(model.parameters(), before, strict=True)]).norm()
        assert moved.item() == pytest.approx(expected or result.grad_norm.item(), rel=1e-3)
        assert result.grad_norm > 0.5


def test_weight_decay_applies_to_matrices_only():
    model = small_model("attention=mla")
    decayed, *rest = configured(AdamWConfig, lr=1e-3).build(model).param_groups
    vectors = [p for group in rest for p in group["params"]]
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.ndim < 2 for p in vectors) and all(group["weight_decay"] == 0 for group in rest)
    assert len(decayed["params"]) + len(vectors) == len(list(model.parameters()))
    classic = composed_run("model=classic_gpt", "model.n_layers=1").model
    model = initialised(classic, 100)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, *others = (
        {names[id(p)] for p in group["params"]} for group in configured(AdamWConfig, lr=1e-3).build(model).param_groups
    )
    rest = set().union(*others)
    assert {"embedding.weight", "position_embedding.weight", "head.weight", "layers.0.mlp.up_proj.weight"} <= decayed
    assert {"norm.weight", "norm.bias", "layers.0.attention.q_proj.bias", "layers.0.mlp.down_proj.bias"} <= rest
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_cosine_schedule_has_its_landmarks():
    schedule = configured(Cosine, warmup=0.1, final_fraction=0.2)
    rates = [schedule(step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11.1)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates.index(max(rates)) in (10, 11)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[11:]))
    assert rates[0] > 0 and configured(Cosine, warmup=0.0)(0, 1) > 0


def test_linear_schedule_after_its_warmup_is_a_straight_line():
    schedule = configured(Linear, warmup=0.1, final_fraction=0.2)
    rates = [schedule(step, 101) for step in range(101)]
    falls = {round(a - b, 9) for a, b in itertools.pairwise(rates[12:])}
    assert len(falls) == 1 and rates[-1] == pytest.approx(0.2) and max(rates) == pytest.approx(1, abs=0.01)


def test_wsd_schedule_has_its_landmarks():
    schedule = configured(WSD, warmup_steps=4, cooldown=0.2, final_fraction=0.1).derive(50)
    rates = [schedule(step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:41] == [1.0] * 36 + [pytest.approx(1 - 0.9 / 11)]
    assert len({round(a - b, 9) for a, b in itertools.pairwise(rates[40:])}) == 1
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 11)  # the last update is worth something; the next would be at 0.1
    longer = [schedule(step, 80) for step in range(80)]
    assert longer[:40] == rates[:40] and longer[40:64] == [1.0] * 24


@pytest.mark.parametrize("schedule", [configured(Cosine), configured(Linear), configured(WSD)])
def test_schedule_of_any_number_of_steps_stays_within_its_limits(schedule):
    for steps in (1, 2, 3, 7, 30):
        found = schedule.derive(steps)
        assert all(0 < found(step, steps) <= 1 for step in range(steps))
        open_step = found.decay_start_step(steps)
        if open_step is not None:
            assert [found(s, steps) for s in range(open_step)] == [found(s, 2 * steps) for s in range(open_step)]


def test_wsd_schedule_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"schedule.warmup_steps=25 .* steps=30: the cooldown begins at step 24"):
        composed_run("schedule=wsd", "schedule.warmup_steps=25", "steps=30")


def test_settings_that_are_not_finite_are_refused():
    for build in (lambda: configured(AdamWConfig, lr=math.inf), lambda: configured(Cosine, warmup=math.nan)):
        with pytest.raises(ValueError, match="finite"):
            build()


def test_evaluate_with_any_batch_size_weighs_tokens_alike():
    model = initialised(small_config("attention=gqa"), 257)
    text = "The mask sees a key — ñ.\n" * 40
    tokens = np.array([256, *text.encode()], np.uint16)
    stream, lengths = TokenStream([tokens]), torch.from_numpy(ByteTokenizer().byte_lengths)
    scores = [evaluate(model, evaluation_batches(stream, 16, batch), lengths) for batch in (1, 5, 1000)]
    count = (len(tokens) - 1) // 16 * 16
    with torch.no_grad():
        inputs = torch.from_numpy(tokens[:count].astype(np.int64)).view(-1, 16)
        targets = torch.from_numpy(tokens[1 : count + 1].astype(np.int64)).view(-1, 16)
        nats = token_losses(logits_of(model, inputs), targets).double().sum().item()
    for found in scores:
        assert found.tokens == count
        assert found.loss == pytest.approx(nats / count, rel=1e-6)
        assert found.bpb == pytest.approx(nats / math.log(2) / count, rel=1e-6)  # each of these tokens is one byte
    parts = [evaluation_batches(stream, 16, 4, part) for part in (slice(0, 100), slice(100, None))]
    first, rest = (evaluate(model, part, lengths) for part in parts)
    assert first.tokens == 96
    assert first.plus(rest).loss == pytest.approx(scores[0].loss)
    assert first.plus(rest)[1:] == scores[0][1:]


def test_evaluate_a_model_with_dropout_drops_nothing():
    batches = evaluation_batches(TokenStream([np.arange(250, dtype=np.uint16)]), 16, 4)
    lengths = torch.from_numpy(ByteTokenizer().byte_lengths)
    models = (small_model("attention=gqa", f"model.dropout={share}", vocab_size=257) for share in (0, 0.5))
    expected, found = (evaluate(model, batches, lengths) for model in models)
    assert found == expected


def test_losses_with_a_document_mask_are_those_of_documents_alone():
    """In training and in validation."""
    model = small_model("attention=mla", vocab_size=257, kernel=SDPA())
    tokens = torch.tensor([[256, *b"a text", 256, *b"another"]])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, masked = Batch(inputs, targets), Batch.of(inputs, targets, ByteTokenizer().end_of_text)
    cut = 7  # where the second document begins
    alone = [token_losses(logits_of(model, part), goal) for part, goal in
             ((inputs[:, :cut], targets[:, :cut]), (inputs[:, cut:], targets[:, cut:]))]  # fmt: skip
    expected = torch.cat(alone, dim=1)
    assert relative_error(score.token_losses(model, masked), expected) <= 1e-5
    assert relative_error(mean_loss(model, masked)[0], expected.mean()) <= 1e-5
    assert relative_error(score.token_losses(model, batch), expected) > 1e-3


def test_evaluate_counts_a_separators_nats_but_no_bytes():
    model = initialised(small_config("attention=gqa"), 257)
    tokens = np.array([256, 65, 66, 256, 67], np.uint16)
    batches = evaluation_batches(TokenStream([tokens]), 4, 1)
    found = evaluate(model, batches, torch.from_numpy(ByteTokenizer().byte_lengths))
    assert found.bpb == pytest.approx(found.loss * 4 / (math.log(2) * 3))


def test_maybe_compiled_that_fails_runs_eagerly_with_a_warning(caplog, monkeypatch):
    def broken(function, **_):
        def call(*_):
            raise RuntimeError("no compiler here\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, (batch,) = small_model("attention=gqa", kernel=SDPA()), batches(2, 2)
    fallen = maybe_compiled(mean_loss, enabled=True)
    assert fallen(model, batch) == fallen(model, batch) == mean_loss(model, batch)
    assert caplog.text.count("running eagerly: no compiler here") == 1


def test_maybe_compiled_with_a_failing_backward_runs_eagerly(caplog, monkeypatch):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("the backward does not compile")

    def broken(function, **_):
        return lambda *arguments: (NoBackward.apply(function(*arguments)[0]), {})

    monkeypatch.setattr(torch, "compile", broken)
    model, (batch,) = small_model("attention=gqa", kernel=SDPA()), batches(2, 2)
    maybe_compiled(mean_loss, enabled=True)(model, batch)[0].backward()
    assert "running eagerly: the backward does not compile" in caplog.text


@pytest.mark.parametrize(
    "attention",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "gqa")) for name in ATTENTIONS],  # mla: test_activations.py
)
def test_compiled_loss_has_the_same_gradients(attention):
    layers = 2 if attention == "stack" else 1  # of each kind
    model = small_model(f"attention={attention}", f"model.n_layers={layers}", kernel=SDPA())
    (batch,) = batches(4, 4)
    expected = torch.autograd.grad(mean_loss(model, batch)[0], list(model.parameters()))
    compiled = torch.compile(mean_loss, backend="aot_eager", dynamic=False, fullgraph=True)
    for found, exact in zip(
        torch.autograd.grad(compiled(model, batch)[0], list(model.parameters())), expected, strict=True
    ):
        assert relative_error(found, exact) <= 1e-4


def test_step_of_prompts_alone_changes_neither_weights_nor_the_loss_scale():
    model = small_model("attention=gqa", "model.n_layers=1")
    state = training_state(model, precision="fp16")
    before, scale = [p.clone() for p in model.parameters()], state.loss_scale.scale.clone()
    (batch,) = batches(2, 2)
    for _ in range(3):
        result = train_step(state, [batch._replace(targets=torch.full_like(batch.targets, -1))], 1.0)
        assert result.skipped
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(state.loss_scale.scale, scale)


def test_guard_does_not_count_steps_of_prompts_alone():
    guard = Guard([], 2)
    for step in range(5):
        guard.see({"step": step, "train_loss": None, "uncounted": True})
    assert not guard.diverged and guard.uncounted == 5 and guard.skipped == 0
