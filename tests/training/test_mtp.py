"""Multi-token prediction: what its loss is, of which tokens, and that nothing but training minimises it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.batches import Batch
from model import cost
from model.initialise import initialised
from model.mtp import MTP_LOSS
from model.placement import Placement
from model.score import token_losses
from model.transformer import TransformerLM
from runtime.activation_checkpointing import checkpoint_activations
from tests.support import (
    SMOKE,
    TINY,
    batches,
    call,
    changed,
    composed_run,
    relative_error,
    small_config,
    small_model,
    some_tokens,
    training_state,
)
from training.losses import CROSS_ENTROPY, mean_loss
from training.optim.qk_clip import QKClip
from training.state import TrainState
from training.step import accumulate_gradients, train_step

ON = "model.mtp_depth=1"
START = 3  # the token that begins a document
MODELS = [
    ("attention=gqa",),
    ("attention=mla", "model.tie_embeddings=false", "model.mtp_weight=0.7"),
    ("attention=gqa", "attention.window=3", "model.norm=layer", "model.bias=true", "model.logit_softcap=5"),
    ("attention=stack", "attention.parts.local.window=5", "position=learned"),
]


def windows(rows: int = 3, length: int = 14, *, masked: bool = True, seed: int = 0) -> Batch:
    """Texts of short documents, of which some targets are not counted."""
    tokens = some_tokens(rows, length + 1, vocab_size=8, seed=seed)
    targets = tokens[:, 1:].clone()
    targets[0, 4:7] = -1
    return Batch.of(tokens[:, :-1], targets, START if masked else None)


def naive_targets(batch: Batch) -> list[tuple[int, list[int], int]]:
    """Each row, text up to the token that is read, and target, by plain loops: a text is a document, if these do not
    see each other."""
    found = []
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        for i in range(len(inputs) - 1):
            begin = 0
            if batch.docs is not None:
                if inputs[i + 1] == START:  # of another document
                    continue
                begin = max([0, *(j for j in range(i + 1) if inputs[j] == START)])
            if targets[i + 1] >= 0:
                found.append((row, inputs[begin : i + 2], targets[i + 1]))
    return found


def naive_nats(model: TransformerLM, text: list[int], target: int) -> torch.Tensor:
    """By the definition, of one target alone: the text up to the token before it, none computed for another."""
    at = Placement.contiguous(len(text) - 1)
    streams = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0][0]))
    model(torch.tensor([text[:-1]]), at)
    hook.remove()
    merged = []
    for h, token in zip(streams[0], text[1:], strict=True):
        parts = model.mtp.hidden_norm(h), model.mtp.embedding_norm(model.embedding.weight[token])
        merged.append(model.mtp.merge.weight @ torch.cat(parts))
    x = model.mtp.block(torch.stack(merged)[None], model._context(at, False, frozenset()))[0][0, -1]
    return -model.logits(model.mtp.norm(x)[None, None])[0, 0].log_softmax(-1)[target]


def naive_loss(model: TransformerLM, batch: Batch) -> torch.Tensor:
    return torch.stack([naive_nats(model, text, target) for _, text, target in naive_targets(batch)]).mean()


def gradients(loss: torch.Tensor, model: TransformerLM) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def check_gradients(model: TransformerLM, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max())), name


@pytest.mark.parametrize("masked", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("choice", MODELS, ids=" ".join)
def test_mtp_loss_is_that_of_its_definition_and_so_are_its_gradients(choice, masked):
    model, batch = small_model(*choice, ON), windows(masked=masked)
    objective, aux = mean_loss(model, batch)
    expected = naive_loss(model, batch)
    assert relative_error(aux[MTP_LOSS], expected) <= 1e-5
    check_gradients(model, gradients(aux[MTP_LOSS], model), gradients(expected, model))
    assert relative_error(objective, aux[CROSS_ENTROPY] + model.config.mtp_weight * expected) <= 1e-5


def test_ahead_counts_neither_the_last_of_a_window_nor_what_a_later_document_says():
    inputs, targets = torch.tensor([[3, 5, 6, 3, 7, 8]]), torch.tensor([[5, 6, 3, 7, -1, 9]])
    plain = Batch.of(inputs, targets).ahead()
    assert plain.tokens.tolist() == [[5, 6, 3, 7, 8, -1]] and plain.targets.tolist() == [[6, 3, 7, -1, 9, -1]]
    masked = Batch.of(inputs, targets, START).ahead()
    # 3 ends the first document, as a target of its last token in the loss of the next token too
    assert masked.tokens.tolist() == [[5, 6, -1, 7, 8, -1]] and masked.targets.tolist() == [[6, 3, -1, -1, 9, -1]]
    assert (int(plain.counted), int(masked.counted)) == (4, 3)


def test_mtp_reads_no_token_of_another_document():
    model = small_model("attention=gqa", ON)
    inputs = torch.tensor([[3, 5, 6, 7, 3, 9, 8]])
    other = torch.tensor([[3, 5, 6, 7, 3, 1, 2]])
    found = []
    for tokens in (inputs, other):
        batch = Batch.of(tokens, torch.tensor([[5, 6, 7, 3, -1, -1, -1]]), START)
        at = Placement.of_batch(batch)
        found.append(model.look_ahead(model(tokens, at).stream, batch.ahead().tokens, at).x[:, :4])
    assert torch.equal(*found)


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradient_of_uneven_micro_batches_is_that_of_one_batch(recomputed):
    model, whole = small_model("attention=gqa", ON), windows(4)
    model.config = model.config.model_copy(update={"mtp_weight": 0.9})
    if recomputed:
        checkpoint_activations(model)
    parts = whole.split(1)
    shares = [float(part.ahead().counted / part.counted) for part in parts]
    assert max(shares) > min(shares) + 0.05  # so that a share of the targets would be a wrong one
    found = []
    for micro in ([whole], parts, whole.split(3)):
        model.zero_grad()
        loss, aux = accumulate_gradients(training_state(model), micro)
        found.append(([p.grad.clone() for p in model.parameters()], loss, aux[MTP_LOSS]))
    for of_parts, loss, mtp_loss in found[1:]:
        check_gradients(model, of_parts, found[0][0])
        assert relative_error(loss, found[0][1]) <= 1e-6 and relative_error(mtp_loss, found[0][2]) <= 1e-6
    assert relative_error(found[0][2], naive_loss(model, whole)) <= 1e-5


def test_micro_batches_of_which_nothing_or_nothing_ahead_is_counted_change_no_mean():
    model, batch = small_model("attention=gqa", ON), windows()
    nothing = Batch.of(batch.inputs, torch.full_like(batch.targets, -1), START)
    loss, aux = accumulate_gradients(training_state(model), [batch, nothing])
    assert relative_error(aux[MTP_LOSS], naive_loss(model, batch)) <= 1e-5 and loss.isfinite()
    alone = torch.tensor([[START, START, START]])
    state = training_state(model)
    result = train_step(state, [Batch.of(alone, alone, START)], 0.0)  # every document is one token
    assert result.reported[MTP_LOSS] == 0 and not result.skipped and result.loss > 0
    assert train_step(state, [], 0.0).loss == 0  # as a dry run times an update


def test_step_reports_both_losses_apart():
    model, batch = small_model("attention=gqa", ON), windows()
    plain = mean_loss(model, batch)[1][CROSS_ENTROPY]
    expected = naive_loss(model, batch)
    result = train_step(training_state(model), [batch], 1.0)
    assert result.loss == plain
    assert set(result.reported) == {MTP_LOSS} and relative_error(result.reported[MTP_LOSS], expected) <= 1e-5


def test_scores_never_run_the_module(monkeypatch):
    model, batch = small_model("attention=gqa", ON), windows()
    monkeypatch.setattr(model, "look_ahead", None)
    monkeypatch.setattr(model.mtp, "forward", None)
    plain = small_model("attention=gqa")
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    assert torch.equal(token_losses(model, batch), token_losses(plain, batch))


def test_weight_of_zero_leaves_the_rest_of_the_model_as_without_the_module():
    """The same initial weights, and the same steps."""
    config = small_config("attention=gqa", "model.dropout=0.1", ON, "model.mtp_weight=0")
    with_module = initialised(config, 100)
    plain = initialised(config.model_copy(update={"mtp_depth": 0}), 100)
    for step in range(2):
        for model in (with_module, plain):
            train_step(training_state(model, step=step), batches(4, 2, seed=step), 0.1)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, with_module.get_parameter(name)), name


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_first_mtp_loss_is_about_ln_v_and_training_lowers_it(optim):
    run = composed_run("model=mini", f"optim={optim}", ON)
    state = TrainState.create(run.model_copy(update={"precision": "fp32"}), 100, torch.device("cpu"))
    losses = [float(train_step(state, [windows(8, 30, masked=False)], 1.0).reported[MTP_LOSS]) for _ in range(12)]
    limit = 0.02 if run.model.own_logit_init else 0.8
    assert abs(losses[0] - math.log(100)) < limit and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mtp_loss_in_low_precision_is_near_that_in_float32(precision):
    model, batch = small_model("attention=gqa", ON), windows()
    expected = accumulate_gradients(training_state(model), [batch])[1][MTP_LOSS]
    found = accumulate_gradients(training_state(model, precision=precision), [batch])[1][MTP_LOSS]
    assert relative_error(found, expected) < 0.02


def test_activation_checkpointing_of_the_module_changes_no_bit():
    model, found = small_model("attention=gqa", "model.dropout=0.2", ON), []
    for recomputed in (False, True):
        if recomputed:
            checkpoint_activations(model)
        model.zero_grad()
        accumulate_gradients(training_state(model), [windows()])
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_mean_loss_with_the_module_compiles_as_one_graph():
    model, batch = small_model("attention=gqa", "model.n_layers=1", ON), windows()
    compiled = torch.compile(mean_loss, backend="aot_eager", dynamic=False, fullgraph=True)
    found, expected = (loss(model, batch, torch.tensor(0.5)) for loss in (compiled, mean_loss))
    assert relative_error(found[0], expected[0]) <= 1e-6
    check_gradients(model, gradients(found[0], model), gradients(expected[0], model))


def test_qk_clip_and_frozen_groups_reach_the_module():
    model = small_model("attention=gqa", "model.qk_norm=false", ON)
    state = training_state(model, after_step=[QKClip(model, 0.01)])
    state.losses = state.losses._replace(
        mean_loss=lambda *arguments: mean_loss(*arguments, collect=frozenset({"max_logit"}))
    )
    before = model.mtp.block.attention.q_proj.weight.detach().clone()
    result = train_step(state, [windows()], 0.0)
    assert result.reported["clipped_heads"] == 3 * model.config.n_heads
    assert not torch.equal(model.mtp.block.attention.q_proj.weight, before)
    run = composed_run("model=mini", ON, "optim.groups=[{match: mtp.*, train: false}]")
    model = TransformerLM(run.model, 100)
    run.optim.freeze(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("mtp.") for name in trained)
    assert len(trained) + len(list(model.mtp.parameters())) == len(list(model.parameters()))


def test_costs_count_the_module_apart():
    config = small_config("attention=gqa", "model.tie_embeddings=false", ON)
    plain, model = config.model_copy(update={"mtp_depth": 0}), TransformerLM(config, 100)
    counts, without = cost.parameters(model), cost.parameters(TransformerLM(plain, 100))
    assert counts.pop("mtp") == sum(p.numel() for p in model.mtp.parameters()) and counts == without
    flops, of_plain = cost.flops(config, 100), cost.flops(plain, 100)
    assert flops.forward() == of_plain.forward() and of_plain.mtp() == 0
    assert flops.training() == of_plain.training() + 3 * flops.mtp()
    head, d = model.head.weight.numel(), config.d_model
    in_block = sum(p.numel() for p in model.mtp.block.parameters() if p.ndim == 2)
    of_pairs = of_plain.per_pair // config.n_layers
    assert flops.mtp(keys=7) == 2 * (head + 2 * d * d + in_block) + 7 * of_pairs
    assert cost.cache_bytes_per_token(model) == cost.cache_bytes_per_token(TransformerLM(plain, 100))


def test_encoder_has_no_module():
    with pytest.raises(ValueError, match="mtp_depth=1 predicts tokens that a model with causal=False sees"):
        TransformerLM(small_config(ON), 100, causal=False)


def test_run_with_the_module_resumes_to_the_same_bits_and_samples_the_same_text_with_drafts(
    workplace, monkeypatch, capsys
):
    """Documents masked, and micro-batches of unlike counts."""
    run = [*TINY, ON, "document_mask=true", "micro_batch_size=2", "model.dropout=0.1"]
    for name in ("whole", "resumed"):
        assert call("train", [*run, f"run_dir={name}"], monkeypatch) == 0
    shutil.rmtree("resumed/checkpoints/step_00000004")
    assert call("train", ["resume=resumed"], monkeypatch) == 0
    files = [f"checkpoints/step_00000004/{name}" for name in ("model.safetensors", "optimizer.safetensors")]
    assert all(Path("whole", file).read_bytes() == Path("resumed", file).read_bytes() for file in files)
    rows = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert all(4 < row[MTP_LOSS] < 7 for row in rows) and len({row[MTP_LOSS] for row in rows}) == 4
    capsys.readouterr()

    def sampled(*arguments: str) -> list[dict]:
        command = ["The", "--run", "whole", "--json", "--max-new-tokens", "40", *arguments]
        assert call("sample", command, monkeypatch) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [{key: one[key] for key in one if "second" not in key} for one in found]

    for options in (["--num-samples", "3"], ["--temperature", "0"]):
        assert sampled(*options) == sampled(*options, "--speculate", "self") == sampled(*options, "--no-cache")
    assert call("sample", ["The", "--run", "whole", "--speculate", "self", "--stats"], monkeypatch) == 0
    out = capsys.readouterr()
    drafted, accepted = (
        int(re.search(rf"^{name}_tokens=(\d+)$", out.err, re.M)[1]) for name in ("drafted", "accepted")
    )
    assert 0 <= accepted <= drafted > 10 and "tokens_per_step=" in out.err
    assert call("train", [*TINY, ON, "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(r"head 0 \(tied to the embedding\), mtp [\d,]+\n", out)
    assert re.search(r"^mtp +[\d,]+ forward FLOPs per token besides, in training alone$", out, re.M)


def test_speculate_self_without_the_module_is_refused(workplace, monkeypatch, capsys):
    assert call("train", changed(TINY, "steps=2", "run_dir=plain"), monkeypatch) == 0
    capsys.readouterr()
    assert call("sample", ["The", "--run", "plain", "--speculate", "self"], monkeypatch) == 2
    err = capsys.readouterr().err
    assert (
        len(err.splitlines()) == 1 and "the model of plain has no module that drafts: train one with model.mtp_" in err
    )
    wrong = [
        (["model.mtp_depth=2"], "model.mtp_depth=2: give at least 0 and at most 1"),
        (["model.mtp_weight=0.5"], "model.mtp_weight=0.5 is of multi-token prediction: set model.mtp_depth=1"),
        ([ON, "model.mtp_weight=-1"], "model.mtp_weight=-1: give at least 0 and at most 1000000"),
        (["init_from=plain", ON], "model.mtp_depth cannot be chosen with init_from=plain"),
    ]
    for overrides, message in wrong:
        assert call("train", [*SMOKE, *overrides], monkeypatch) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and message in err
