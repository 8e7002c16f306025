"""Attention statistics in tiles against their definitions, and the auxiliary outputs that attentions return."""

import pytest
import torch

from model.kernels.naive import Naive
from model.mask import CAUSAL, Mask, Pattern
from model.placement import Placement
from model.stats import Statistics, attention_map, collect_stats, head_summed, statistics
from model.transformer import TransformerLM
from runtime.memory import PeakTensorBytes
from tests.model.attention import laws
from tests.model.masks import LENGTH, SITUATIONS, mask_of
from tests.support import logits_of, mostly_slow, relative_error, small_model, some_tokens

ALL = frozenset({"max_logit", "entropy", "attention_map"})
PATTERNS = {
    "causal": CAUSAL,
    "both sides": Pattern(causal=False),
    "window": Pattern(window=4),
    "global tokens": Pattern(window=3, global_tokens=2),
    "not itself": Pattern(see_self=False),
}


def inputs(t: int, s: int, h: int, g: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(t)
    return spread * torch.randn(2, t, h, 8, generator=draw), torch.randn(2, s, g, 8, generator=draw)


def by_definition(q, k, mask, scale) -> tuple[Statistics, torch.Tensor]:
    """Each of (B, T, H), and the probabilities (B, H, T, S), in float64."""
    k = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    x = scale * torch.einsum("bthd,bshd->bths", q.double(), k)
    x = x.masked_fill(~mask.visible()[:, :, None], float("-inf"))
    p = x.softmax(-1)
    entropy = -(p * p.log()).nan_to_num(nan=0.0).sum(-1)  # 0 log 0 is 0
    return Statistics(x.logsumexp(-1), x.amax(-1), entropy), p.transpose(1, 2)


def check(q, k, mask, scale=0.4, tile=5):
    real = (mask.q_pos >= 0).expand(q.shape[:2])
    expected, p = by_definition(q, k, mask, scale)
    for name, found, exact in zip(Statistics._fields, statistics(q, k, mask, scale, tile), expected, strict=True):
        assert found.dtype == torch.float32 and not found.isnan().any()
        torch.testing.assert_close(found[real].double(), exact[real], rtol=1e-5, atol=2e-5, msg=name)
    assert relative_error(head_summed(q, k, mask, scale, tile)[real], p.sum(1)[real]) <= 1e-5
    shown = real[:, None, :, None]
    assert relative_error(attention_map(q, k, mask, scale).where(shown, 0), p.where(shown, 0)) <= 1e-5


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_statistics_in_tiles_equal_the_definition(pattern, situation):
    mask = mask_of(situation, pattern)
    for heads in ((4, 4), (6, 2), (4, 1)):
        check(*inputs(LENGTH, LENGTH, *heads), mask)


@pytest.mark.parametrize("tile", [1, 4, 128])
def test_statistics_of_one_query_against_a_cache_equal_the_definition(tile):
    positions = torch.tensor([[13], [4]])
    check(*inputs(1, 21, 6, 2), Mask(positions, torch.arange(21)[None], contiguous=False, pattern=CAUSAL), tile=tile)


def test_statistics_entropy_of_distant_and_of_equal_scores_is_exact():
    """From certain, 0 nats, to as unsure as can be: log of the number of keys seen."""
    mask = Mask(torch.arange(40)[None], torch.arange(40)[None], contiguous=True, pattern=CAUSAL)
    check(*inputs(40, 40, 4, 2, spread=100.0), mask, scale=1.0, tile=7)
    q, k = inputs(40, 40, 4, 2)
    entropy = statistics(0 * q, k, mask, 1.0, tile=7).entropy
    torch.testing.assert_close(entropy, torch.arange(1.0, 41).log()[None, :, None].expand(2, -1, 4))


def test_statistics_memory_grows_linearly_and_head_summed_by_one_matrix():
    def peak(statistic, length: int) -> int:
        (q, k), positions = inputs(length, length, 8, 2), torch.arange(length)[None]
        with PeakTensorBytes() as peak_bytes:
            statistic(q, k, Mask(positions, positions, contiguous=True, pattern=CAUSAL), 0.4, tile=16)
        return peak_bytes.bytes

    assert peak(statistics, 512) < 4.1 * peak(statistics, 128)
    one_matrix = 4 * 2 * 512 * 512
    assert one_matrix < peak(head_summed, 512) < 1.3 * one_matrix  # of eight heads


def test_collect_stats_ignores_padding():
    """A row padded in front says what the same row says alone."""
    q, k = inputs(12, 12, 4, 2, spread=3.0)
    padded = Mask(torch.arange(12)[None] - 5, torch.arange(12)[None] - 5, contiguous=False, pattern=CAUSAL)
    alone = Mask(torch.arange(7)[None], torch.arange(7)[None], contiguous=True, pattern=CAUSAL)
    found, expected = (collect_stats(ALL, *given, 0.4) for given in ((q, k, padded), (q[:, 5:], k[:, 5:], alone)))
    for name in ("max_logit", "entropy"):
        assert found[name].shape == (4,)
        torch.testing.assert_close(found[name], expected[name])
    loud = q.clone()
    loud[:, :5] *= 100
    torch.testing.assert_close(collect_stats(ALL, loud, k, padded, 0.4)["max_logit"], expected["max_logit"])


# What attentions say.


@pytest.mark.parametrize("case", mostly_slow())
def test_attention_with_collect_returns_stats_and_equal_logits(case):
    model, tokens = small_model(*case), some_tokens(2, 20)
    without, with_stats = model(tokens), model(tokens, collect=ALL)
    assert without.aux == {} and torch.equal(without.x, with_stats.x)
    assert with_stats.aux.keys() == {f"layers.{i}.{name}" for i in range(2) for name in ALL}
    for i, block in enumerate(model.layers):
        entropy, largest, probabilities = (
            with_stats.aux[f"layers.{i}.{name}"] for name in ("entropy", "max_logit", "attention_map")
        )
        assert probabilities.shape == (2, 4, 20, 20) and entropy.shape == largest.shape == (4,)
        assert not any(value.requires_grad for value in (entropy, largest, probabilities))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 20))
        positions = torch.arange(20)
        hidden = ~block.attention.pattern.sees(positions[:, None], positions)
        assert (probabilities[..., hidden] == 0).all()
        torch.testing.assert_close(torch.special.entr(probabilities).sum(-1).mean((0, 2)), entropy)
    only = model(tokens, collect=frozenset({"entropy"})).aux
    assert only.keys() == {"layers.0.entropy", "layers.1.entropy"}


def test_mla_executions_return_equal_stats_with_and_without_a_cache():
    tokens = some_tokens(2, 20)
    expected = small_model("attention=mla", "attention.execution=naive")(tokens, collect=ALL).aux
    for execution in ("auto", "naive", "expanded", "absorbed"):
        model = small_model("attention=mla", f"attention.execution={execution}")
        for name, value in model(tokens, collect=ALL).aux.items():
            assert relative_error(value, expected[name]) <= 1e-5, (execution, name)
        caches = model.make_caches(2, 20)
        laws.decode_in_chunks(model, tokens[:, :19], [12, 7], caches)
        with torch.no_grad():
            last = model(tokens[:, 19:], Placement.decode(torch.full((2, 1), 19), caches), collect=ALL).aux
        for i in range(2):
            name = f"layers.{i}.attention_map"
            assert relative_error(last[name], expected[name][:, :, 19:]) <= 1e-5, (execution, name)


def test_layer_stats_equal_statistics_of_the_kernels_inputs():
    """The largest score by the definition, of the very queries and keys that the kernel gets."""
    seen = []

    class Spy(Naive):
        def __call__(self, q, k, v, mask, how):
            seen.append(by_definition(q, k, mask, how.scale)[0])
            return super().__call__(q, k, v, mask, how)

    for case in ("attention=gqa", "attention=mla"):
        seen.clear()
        model: TransformerLM = small_model(case, kernel=Spy())
        aux = model(some_tokens(2, 20), collect=ALL).aux
        for i, exact in enumerate(seen):
            assert relative_error(aux[f"layers.{i}.max_logit"], exact.max_logit.amax((0, 1))) <= 1e-5
            assert relative_error(aux[f"layers.{i}.entropy"], exact.entropy.mean((0, 1))) <= 1e-5


def test_attention_max_logit_with_alibi_equals_the_definition():
    """Not of the columns that kernels are given, which leave out what is the same for all keys of a query."""
    model, length, heads = small_model("attention=mha", "position=alibi", "model.n_layers=1"), 40, 4
    tokens, attention = some_tokens(2, length), model.layers[0].attention
    with torch.no_grad():
        x = model.layers[0].attention_norm(model.embedding(tokens))
        q, k = (p(x).unflatten(-1, (heads, -1)).double() for p in (attention.q_proj, attention.k_proj))
        q, k = attention.q_norm(q.float()).double(), attention.k_norm(k.float()).double()
    distance = (torch.arange(length)[:, None] - torch.arange(length)).double()
    slopes = torch.tensor([2 ** (-8 * i / heads) for i in range(1, heads + 1)], dtype=torch.float64)
    scores = attention.core.scale * torch.einsum("bthd,bshd->bhts", q, k) - slopes[:, None, None] * distance
    largest = scores.masked_fill(distance < 0, float("-inf")).amax((0, 2, 3))
    for at in (None, Placement.decode(torch.arange(length)[None], model.make_caches(2, length))):
        found = model(tokens, at, collect=ALL).aux["layers.0.max_logit"]
        assert relative_error(found, largest) <= 1e-5


def test_attention_with_collect_leaves_gradients_unchanged():
    model, tokens = small_model("attention=mla"), some_tokens(2, 20)
    gradients = []
    for collect in (frozenset(), ALL):
        model.zero_grad()
        logits_of(model, tokens, collect=collect).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
