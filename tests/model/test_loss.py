"""The chunked loss, held against cross-entropy of all logits at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batches import Batch
from model import loss
from model.placement import Placement
from model.score import score_batches, token_losses, token_losses_and_hits
from model.transformer import Hidden, LMHead
from runtime.precision import MixedPrecision
from tests.support import batches, logits_of, relative_error, small_model, some_tokens
from training.losses import mean_loss

VOCAB, TOLERANCE = 100, {torch.float32: 1e-6, torch.bfloat16: 0.015, torch.float16: 0.002}


def a_case(dtype=torch.float32, softcap=None, tokens=(3, 17), width=32, vocab=VOCAB):
    """Hidden states, a lm_head whose matrix is padded as PaddedEmbedding pads it, and targets."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(*tokens, width, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(-(-vocab // 64) * 64, width, generator=draw)
    weight[vocab:] = 0
    lm_head = LMHead(weight.to(dtype).requires_grad_(), vocab, softcap)
    return hidden, lm_head, torch.randint(vocab, tokens, generator=draw)


def cut_small(monkeypatch, chunk_tokens: int = 7, tile_tokens: int = 2) -> None:
    """So that a small case has many chunks, and many tiles in each, none of which divides anything."""
    monkeypatch.setattr(loss, "MAX_TOKENS", chunk_tokens)
    monkeypatch.setattr(loss, "TILE", {"cpu": tile_tokens * 128})


@pytest.mark.parametrize(  # each pair at least once
    ("dtype", "softcap", "cut", "masked"),
    [
        (torch.float32, None, False, False),
        (torch.float32, None, True, True),
        (torch.float32, 5.0, True, False),
        (torch.float32, 5.0, False, True),
        (torch.bfloat16, 5.0, True, True),
        (torch.bfloat16, None, False, False),
        (torch.float16, 5.0, False, True),
        (torch.float16, None, True, False),
    ],
)
def test_chunked_loss_and_gradients_equal_those_of_all_logits_at_once(monkeypatch, dtype, softcap, cut, masked):
    """Of numbers that the dtype holds, in float32: the truth. A gradient comes in as a float16 loss scale does."""
    if cut:
        cut_small(monkeypatch)
    hidden, lm_head, targets = a_case(dtype, softcap)
    if masked:
        targets[0, 3:9] = targets[2] = -1
    counted = targets >= 0
    exact = [x.detach().float().requires_grad_() for x in (hidden, lm_head.weight)]
    expected = loss.token_losses(lm_head._replace(weight=exact[1]).logits(exact[0]), targets)
    each = loss.chunked_losses(hidden, lm_head, targets)
    assert each.dtype == torch.float32 and each.shape == targets.shape and not each.requires_grad
    assert relative_error(each, expected) <= TOLERANCE[dtype]
    mean = loss.chunked_mean(hidden, lm_head, targets)
    assert mean.dtype == torch.float32 and torch.equal(mean, each.sum() / counted.sum())
    assert masked or torch.equal(mean, each.mean())
    found = torch.autograd.grad(mean * 64, (hidden, lm_head.weight))
    for gradient, its in zip(found, torch.autograd.grad(expected[counted].mean() * 64, exact), strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, its) <= TOLERANCE[dtype]
    assert not found[1][VOCAB:].any() and not found[0][~counted].any() and not each[~counted].any()


def test_chunked_mean_without_a_counted_target_is_zero_and_has_no_gradient():
    hidden, lm_head, targets = a_case()
    mean = loss.chunked_mean(hidden, lm_head, targets.fill_(-1))
    assert mean == 0 and not any(grad.any() for grad in torch.autograd.grad(mean, (hidden, lm_head.weight)))


def test_chunked_mean_ignores_what_stands_at_masked_targets():
    hidden, lm_head, targets = a_case()
    targets[1] = -1
    spoilt = hidden.detach().clone()
    spoilt[1] = float("nan")
    spoilt.requires_grad_()
    pairs = []
    for x in (hidden, spoilt):
        mean = loss.chunked_mean(x, lm_head, targets)
        pairs.append((mean, *torch.autograd.grad(mean, (x, lm_head.weight))))
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


def test_chunked_losses_of_a_target_out_of_range_raise():
    hidden, lm_head, targets = a_case()
    targets[0, 0] = -100
    with pytest.raises(RuntimeError):
        loss.chunked_losses(hidden, lm_head, targets)


def test_score_batches_counts_only_counted_targets():
    model, (batch,) = small_model(), batches(2, 2)
    masked = batch.targets.clone()
    masked[0, 5:] = masked[1, :3] = -1
    lengths = torch.arange(100)
    score = score_batches(model, [Batch(batch.inputs, masked)], lengths)
    counted = masked >= 0
    assert score.tokens == counted.sum() and score.text_bytes == batch.targets[counted].sum()
    assert score.nats == pytest.approx(token_losses(model, batch)[counted].sum().item(), rel=1e-6)


class Successor(torch.nn.Module):
    """A made-up model of ten tokens that predicts the next number after each, and 3 after 9."""

    def __init__(self):
        super().__init__()
        following = torch.tensor([*range(1, 10), 3])
        weight = torch.zeros(12, 10)
        weight[following, range(10)] = 1.0
        weight[10:] = 5.0  # padding of the vocabulary, which no token is
        self.lm_head = LMHead(torch.nn.Parameter(weight), 10, softcap=None)
        self.weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor, _: Placement) -> Hidden:
        hidden = torch.nn.functional.one_hot(tokens, 10).float()
        return Hidden(hidden, {}, hidden)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_score_batches_accuracy_is_the_share_of_counted_targets_that_are_predicted(monkeypatch, rows):
    monkeypatch.setitem(loss.CHUNK, "cpu", rows * 12 * 4)  # bytes of logits
    inputs = torch.tensor([[0, 1, 2, 9, 4], [5, 9, 9, 7, 8]])
    right = torch.tensor([[1, 2, 3, 3, 5], [6, 3, 3, 8, 9]])
    wrong = [(0, 1), (1, 2), (1, 4)]
    targets = right.clone()
    for place in wrong:
        targets[place] = 0
    score = score_batches(Successor(), [Batch(inputs, targets)], torch.ones(10), token_losses_and_hits, accuracy=True)
    assert (score.right, score.tokens, score.accuracy) == (7, 10, 0.7)
    counted = torch.tensor([True, False, True, False, True])
    batches = [Batch.of(inputs, targets, counted=counted), Batch.of(inputs[:1], right[:1], counted=counted)]
    some = score_batches(Successor(), batches, torch.ones(10), token_losses_and_hits, accuracy=True)
    assert (some.right, some.tokens) == (7, 9)  # two wrong ones count
    assert score.plus(some).accuracy == 14 / 19
    assert some.nats == score_batches(Successor(), batches, torch.ones(10)).nats
    assert score.plus(score_batches(Successor(), batches, torch.ones(10))).accuracy is None


def test_chunked_mean_equals_linear_cross_entropy_of_pytorch():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("before PyTorch 2.13")
    hidden, lm_head, targets = a_case(vocab=128)
    inputs = hidden.flatten(0, 1), lm_head.weight, targets.flatten()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    theirs = torch.nn.functional.linear_cross_entropy(*inputs, options=options)
    ours = loss.chunked_mean(hidden, lm_head, targets)
    assert relative_error(ours, theirs) <= 1e-6
    wanted = hidden, lm_head.weight
    for found, expected in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        assert relative_error(found, expected) <= 1e-6


def test_chunked_losses_of_huge_logits_are_finite():
    hidden, lm_head, targets = a_case()
    found = loss.chunked_losses(hidden * 1e4, lm_head, targets)
    assert found.isfinite().all() and (found >= 0).all()
    assert relative_error(found, loss.token_losses(lm_head.logits(hidden * 1e4), targets)) <= 1e-6


def test_chunked_mean_in_float16_does_not_overflow_with_one_target():
    """70,000 tokens, more than its largest number, all of which pull one way, at the largest that a normed width of 768
    can be."""
    hidden, lm_head = torch.ones(1, 70_000, 2).half(), torch.zeros(64, 2).half().requires_grad_()
    hidden[..., 1] = 768**0.5
    hidden.requires_grad_()
    mean = loss.chunked_mean(hidden, LMHead(lm_head, 64, None), torch.zeros(1, 70_000, dtype=torch.int64))
    (found,) = torch.autograd.grad(mean, lm_head)
    assert torch.allclose(found[0].float(), torch.tensor([-63 / 64, -63 / 64 * 768**0.5]), rtol=2e-3)


def test_chunked_mean_second_backward_raises():
    """The first one used the gradients that were kept up."""
    hidden, lm_head, targets = a_case()
    mean = loss.chunked_mean(hidden, lm_head, targets)
    mean.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        mean.backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [(), ("model.tie_embeddings=false",), ("model.logit_softcap=3",)], ids=str)
def test_mean_loss_gradients_of_a_model_equal_those_by_logits(monkeypatch, precision, options):
    cut_small(monkeypatch)
    model = small_model("attention=mla", *options)
    mixed, (batch,) = MixedPrecision(model, precision), batches(4, 4)
    mixed.backward(mean_loss(mixed.model, batch)[0])
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    each = loss.token_losses(logits_of(mixed.model, batch.inputs), batch.targets)
    mixed.backward(each.mean())
    for name, parameter in model.named_parameters():
        difference = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference <= (1e-5 if precision == "fp32" else 0.03), name
    assert relative_error(token_losses(mixed.model, batch), each) <= (1e-6 if precision == "fp32" else 0.02)


class Largest(TorchDispatchMode):
    """The most numbers of one tensor that an operator returned, by dtype."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.of[tensor.dtype] = max(self.of.get(tensor.dtype, 0), tensor.numel())
        return result


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return operator(*args, **(kwargs or {}))


def frozen_case(frozen: str, dtype: torch.dtype):
    """A case of which the hidden states, the head or both have no gradient; and the loss and gradients there are."""
    hidden, lm_head, targets = a_case(dtype, softcap=5.0)
    mean = loss.chunked_mean(hidden, lm_head, targets)
    gradients = torch.autograd.grad(mean, (hidden, lm_head.weight))
    hidden, weight = hidden.detach(), lm_head.weight.detach()
    trained = {"head": [hidden], "hidden": [weight], "both": []}[frozen]
    expected = {"head": gradients[:1], "hidden": gradients[1:], "both": ()}[frozen]
    for tensor in trained:
        tensor.requires_grad_()
    return (hidden, lm_head._replace(weight=weight), targets), mean, trained, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_chunked_mean_computes_no_gradient_of_what_is_frozen(monkeypatch, dtype, frozen):
    """The other one is equal, bit for bit, and took as many matrix products as there are chunks."""
    cut_small(monkeypatch)
    given, expected, trained, gradients = frozen_case(frozen, dtype)
    with Products() as products:
        found = loss.chunked_mean(*given)
    assert torch.equal(found, expected) and found.requires_grad == bool(trained)
    assert products.count == -(-given[2].numel() // loss.MAX_TOKENS) * (1 + len(trained))
    if trained:
        found.backward()
    assert all(torch.equal(tensor.grad, exact) for tensor, exact in zip(trained, gradients, strict=True))
    assert {given[0].grad is None, given[1].weight.grad is None} == ({True, False} if trained else {True})


@pytest.mark.parametrize(
    "frozen", ["head", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("hidden", "both"))]
)
def test_chunked_mean_of_what_is_frozen_compiles_as_one_graph(monkeypatch, frozen):
    cut_small(monkeypatch)
    given, expected, trained, gradients = frozen_case(frozen, torch.bfloat16)
    found = torch.compile(loss.chunked_mean, backend="aot_eager", dynamic=False, fullgraph=True)(*given)
    assert relative_error(found, expected) <= 1e-6 and found.requires_grad == bool(trained)
    if trained:
        assert relative_error(torch.autograd.grad(found, trained)[0], gradients[0]) <= 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mean_loss_never_holds_the_logits_of_a_batch(monkeypatch, precision):
    """In float32, no more than a tile where the weights are bfloat16; a chunk where they are float32."""
    model, tokens = small_model("attention=gqa", vocab_size=5000), some_tokens(4, 64, 5000)
    monkeypatch.setitem(loss.CHUNK, "cpu", 32 * 5056 * (4 if precision == "fp32" else 2))
    monkeypatch.setattr(loss, "TILE", {"cpu": 8 * 5056})
    mixed = MixedPrecision(model, precision)
    weights = model.embedding.weight.numel()
    with Largest() as largest:
        mixed.backward(mean_loss(mixed.model, Batch(tokens, tokens))[0])
        token_losses(mixed.model, Batch(tokens, tokens))
    assert largest.of[torch.float32] <= max(weights, 32 * 5056) < tokens.numel() * 5000 / 3
    with Largest() as naive:
        loss.token_losses(logits_of(mixed.model, tokens), tokens)
    assert naive.of[torch.float32] == tokens.numel() * 5056 or precision == "bf16"
    assert naive.of[torch.float32] >= tokens.numel() * 5000


def test_chunked_mean_compiles_as_one_graph(monkeypatch):
    cut_small(monkeypatch)
    hidden, lm_head, targets = a_case(torch.bfloat16, softcap=5.0)
    compiled = torch.compile(loss.chunked_mean, backend="aot_eager", dynamic=False, fullgraph=True)
    ours, theirs = loss.chunked_mean(hidden, lm_head, targets), compiled(hidden, lm_head, targets)
    assert relative_error(theirs, ours) <= 1e-6
    wanted = hidden, lm_head.weight
    for found, expected in zip(torch.autograd.grad(theirs, wanted), torch.autograd.grad(ours, wanted), strict=True):
        assert relative_error(found, expected) <= 0.01
