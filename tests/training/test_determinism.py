"""The same settings give the same run; what should not matter to the arithmetic does not."""

import json

import pytest
import torch

from model.initialise import initialised
from model.kernels.naive import Naive
from model.placement import Placement
from runtime.precision import choose_precision, multiplies_bf16
from tests.support import (
    ATTENTIONS,
    QUICK,
    call,
    logits_of,
    relative_error,
    small_config,
    small_model,
    some_tokens,
)
from tests.training import golden
from tests.training.runs import assert_same_run, losses

BUSY = [*QUICK, "model.dropout=0.1", "micro_batch_size=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


OFTEN = [("adamw", "fp32", "gqa"), ("muon", "fp32", "mla"), ("muon", "bf16", "mha", "v1")]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in golden.CASES],
    ids=map(" ".join, golden.CASES),
)
def test_training_losses_equal_the_recorded_ones(place, monkeypatch, case):
    recorded = json.loads(golden.FILE.read_text())[" ".join(case)]
    found = golden.losses(case, place, monkeypatch)
    assert len(found) == 30 and recorded[-1] < recorded[0] - 1.5, "it should be training"
    recorded_so = case[0] == "adamw" or multiplies_bf16(torch.device("cpu"))
    in_another_order = case[0] != "adamw" and torch.cpu._is_amx_tile_supported()
    assert found == pytest.approx(recorded, abs=(5e-3 if in_another_order else 1e-3) if recorded_so else 0.1)


@pytest.fixture
def restored_determinism():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deterministic_run_repeated_is_the_same_run(workplace, monkeypatch, restored_determinism, compiled):
    options = [*BUSY, "attention=mla", "deterministic=true", f"compile={compiled}", "steps=10", "eval_every=5"]
    for name in ("one", "two"):
        assert call("train", [*options, f"run_dir={name}"], monkeypatch) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_run(workplace / "one", workplace / "two", step=10)
    assert call("train", [*BUSY, "steps=1", "run_dir=three"], monkeypatch) == 0  # as in a sweep, in one process
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_run_without_such_an_algorithm_is_refused_in_one_line(
    workplace, monkeypatch, capsys, restored_determinism
):
    def indeterminate(model, batch):
        return torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False).sum()

    monkeypatch.setattr("training.losses.mean_loss", indeterminate)
    assert call("train", [*BUSY, "deterministic=true"], monkeypatch) == 2
    assert "error: deterministic=true: put_ does not have a deterministic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "attention",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "mla")) for name in ATTENTIONS],
)
def test_training_loss_does_not_depend_on_the_micro_batch_nor_on_the_kernel(workplace, monkeypatch, attention):
    """Over 30 steps in float32. Muon, which divides by the smallest singular values, would make more of rounding."""
    options = [*QUICK, f"attention={attention}", "optim=adamw", "precision=fp32", "steps=30"]
    options += ["eval_every=99", "save_every=99"]
    found = {}
    for name, change in {"whole": 4, "halves": 2, "single": 1, "naive": None}.items():
        change = "kernel=naive" if change is None else f"micro_batch_size={change}"
        assert call("train", [*options, change, f"run_dir={name}"], monkeypatch) == 0
        found[name] = torch.tensor([row[1] for row in losses(workplace / name)], dtype=torch.float64)
    for name in ("halves", "single", "naive"):
        assert ((found[name] - found["whole"]).abs() / found["whole"]).max() <= 1e-5, name


def test_dropout_draws_while_training_only():
    model = initialised(small_config("attention=gqa", "model.dropout=0.5"), 100)
    sharp = small_model("attention=gqa")
    model.load_state_dict(sharp.state_dict())
    tokens = some_tokens(2, 10)
    with torch.no_grad():
        assert torch.equal(logits_of(model, tokens), logits_of(sharp, tokens))
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(logits_of(model, tokens, training=True))
        assert torch.equal(drawn[0], drawn[1])
        assert relative_error(drawn[2], drawn[0]) > 0.1
        assert torch.equal(logits_of(sharp, tokens, training=True), logits_of(sharp, tokens))


def test_dropout_keeps_the_mean_and_drops_the_share_it_says():
    block = small_model("attention=gqa", "model.dropout=0.25").layers[0]
    from model.context import Context

    ctx = Context(Placement.contiguous(1), rotary={}, training=True)
    torch.manual_seed(0)
    dropped = ctx.drop(torch.ones(100_000), block.dropout)
    assert (dropped == 0).double().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "case",
    [
        ("attention=gqa", "attention.dropout=0.25"),
        *(("attention=mla", "attention.dropout=0.25", f"attention.execution={how}") for how in ("naive", "expanded")),
        ("attention=mla", "attention.dropout=0.25", "attention.execution=absorbed"),
        ("attention=stack", "attention.parts.local.dropout=0.25", "attention.parts.global.dropout=0.25"),
    ],
    ids=" ".join,
)
def test_dropout_of_attention_weights_drops_the_share_it_says_while_training_only(case):
    """The weights themselves, read off with a row of the identity as each key's value."""
    recorded = []

    class Recording(Naive):
        def __call__(self, q, k, v, mask, how):
            rows = torch.eye(k.shape[1])[None, :, None].expand(*k.shape[:3], -1)
            seed = torch.random.get_rng_state()
            shown = (how._replace(dropout=p, v_dim=None) for p in (how.dropout, 0.0))
            weights = [super(Recording, self).__call__(q, k, rows, mask, one).out for one in shown]
            torch.random.set_rng_state(seed)
            recorded.append(weights)
            return super().__call__(q, k, v, mask, how)

    model, tokens = small_model(*case, kernel=Recording()), some_tokens(8, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        model(tokens, training=True)
        model(tokens)
    for dropped, whole in recorded[:2]:
        visible = whole > 0
        kept = visible & (dropped > 0)
        assert torch.allclose(dropped[kept], whole[kept] / 0.75)
        assert (kept.sum() / visible.sum()).item() == pytest.approx(0.75, abs=0.01)
        assert dropped.sum().item() == pytest.approx(whole.sum().item(), rel=0.04)
    for dropped, whole in recorded[2:]:
        assert torch.equal(dropped, whole)


@pytest.mark.parametrize(
    ("device", "native", "chosen"), [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", False, "fp32")]
)
def test_choose_precision_auto_falls_back_as_the_device_allows(monkeypatch, caplog, device, native, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    with caplog.at_level("INFO", logger="headroom"):
        assert choose_precision("auto", torch.device(device)) == chosen
    assert caplog.records[-1].message.startswith(f"precision {chosen}: this {device}")


@pytest.mark.parametrize(
    ("bf16", "amx", "chosen"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_choose_precision_auto_of_a_processor_is_what_it_multiplies(monkeypatch, bf16, amx, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", torch.device("cpu")) == chosen


@pytest.mark.parametrize(
    ("precision", "native", "slow"), [("bf16", False, True), ("fp16", True, True), ("bf16", True, False)]
)
def test_choose_precision_that_the_device_imitates_is_kept_with_a_warning(monkeypatch, caplog, precision, native, slow):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision(precision, torch.device("cpu")) == precision
    assert ("only imitates it" in caplog.text) == slow
