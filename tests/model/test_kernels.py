"""Kernels against the naive twin, on the shapes attentions hand them; and the mask they all read."""

import itertools
import re
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common.errors import Unsupported
from model.kernels import auto, base, online, sdpa
from model.kernels.auto import MAX_MATMUL_KEYS, Auto
from model.kernels.base import Attended, Case, How, Kernel
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import QUERY_TILE, SDPA
from model.kernels.tiles import Tiles
from model.mask import CAUSAL, Mask, Pattern
from runtime.memory import PeakTensorBytes
from tests.model.masks import LENGTH, SITUATIONS, mask_of
from tests.support import assert_one_line, relative_error

TILED = Online(query_tile=3, key_tile=4)  # several tiles of everything, the last of each cut short
PRODUCTS = Matmul(query_tile=5)
SHAPES = {  # T, S, H, G, D, Dv
    "MHA": (16, 16, 4, 4, 8, 8),
    "GQA": (16, 16, 6, 2, 8, 8),
    "MQA": (16, 16, 4, 1, 8, 8),
    "wider keys": (16, 16, 4, 4, 24, 16),
    "wider values": (16, 16, 4, 2, 8, 16),
}


def inputs(t, s, h, g, d, dv, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = (2, t, h, d), (2, s, g, d), (2, s, g, dv)
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def positions(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)[None].expand(2, -1)


def attend(kernel: Kernel, q, k, v, mask: Mask, scale: float, **how) -> torch.Tensor:
    return kernel(q, k, v, mask, How(scale, **how)).out


def by_definition(q, k, v, visible, scale):
    """One query, one head at a time, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b, t, h in ((b, t, h) for b in range(q.shape[0]) for t in range(q.shape[1]) for h in range(q.shape[2])):
        g = h // (q.shape[2] // k.shape[2])
        seen = visible[b, t].nonzero()[:, 0]
        weights = (scale * k[b, seen, g] @ q[b, t, h]).softmax(0)
        out[b, t, h] = weights @ v[b, seen, g]
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_naive_equals_the_definition(shape):
    q, k, v = inputs(*shape)
    mask = Mask(positions(0, shape[0]), positions(0, shape[1]), contiguous=True, pattern=CAUSAL)
    expected = by_definition(q, k, v, mask.visible(), 0.3)
    assert relative_error(attend(Naive(), q, k, v, mask, 0.3), expected) <= 1e-5


def mask_in(situation: str, t: int, s: int) -> Mask:
    if situation == "plain":
        return Mask(positions(0, t), positions(0, s), contiguous=True, pattern=CAUSAL)
    if situation == "ragged":
        ragged = torch.stack([torch.arange(t), torch.arange(t) - 5])
        return Mask(ragged, ragged, contiguous=False, pattern=CAUSAL)
    return Mask(positions(13, t), positions(0, s), contiguous=False, pattern=CAUSAL)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("situation", ["plain", "chunk", "one query", "ragged"])
def test_kernels_equal_naive_forward_and_backward(shape, situation):
    """As they come, and Auto, they are held against it in test_kernels_take_tensors_of_any_strides."""
    t, s = {"chunk": (5, 21), "one query": (1, 21)}.get(situation, shape[:2])
    check_against_naive((SDPA(), TILED, PRODUCTS, Tiles()), inputs(t, s, *shape[2:]), mask_in(situation, t, s))


def check_against_naive(kernels: Sequence[Kernel], given, mask, tolerance=1e-5) -> None:
    """Output and gradients of real queries."""
    q, _, v = given
    draw = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(9))
    real = (mask.q_pos >= 0).expand(q.shape[:2])[..., None, None]

    def results(kernel: Kernel) -> list[torch.Tensor]:
        out = attend(kernel, *given, mask, 0.4).where(real, 0)
        return [out, *torch.autograd.grad((out * draw).sum(), given)]

    expected = results(Naive())
    for kernel in kernels:
        for found, exact in zip(results(kernel), expected, strict=True):
            assert relative_error(found, exact) <= tolerance, kernel


PATTERNS = {
    "causal": CAUSAL,
    "both sides": Pattern(causal=False),
    "window": Pattern(window=4),
    "window on both sides": Pattern(causal=False, window=4),
    "wide window": Pattern(window=11),
    "dilated window": Pattern(window=7, dilation=3),
    "dilation": Pattern(dilation=3),
    "dilated window and global tokens": Pattern(window=9, dilation=2, global_tokens=3),
    "dilation on both sides": Pattern(causal=False, window=8, dilation=2, global_tokens=5),
    "global tokens": Pattern(window=3, global_tokens=2),
    "random blocks": Pattern(window=3, random_blocks=0.4, block_size=2),
    "not itself": Pattern(see_self=False),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    "sizes", [((3, 4), (16, 7)), pytest.param(((1, 1), (5, 2)), marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_kernels_with_any_tile_size_equal_naive_under_every_mask(monkeypatch, pattern, situation, sizes):
    """Tiles that some or all of their queries see nothing of, before and after those that they do."""
    kernels = [kernel for q, k in sizes for kernel in (Online(query_tile=q, key_tile=k), Matmul(query_tile=q))]
    given, mask = inputs(LENGTH, LENGTH, 4, 2, 8, 6), mask_of(situation, pattern)
    check_against_naive(kernels, given, mask)
    for queries, _ in sizes:
        monkeypatch.setattr(sdpa, "QUERY_TILE", queries)
        monkeypatch.setattr("model.kernels.tiles.QUERIES", (queries, 2 * queries))
        check_against_naive([SDPA(), Tiles()], given, mask)


CAN = {
    "naive": Naive(),
    "sdpa": SDPA(),
    "auto": Auto(),
    "online": Online(query_tile=3, key_tile=4),
    "matmul": Matmul(query_tile=5),
    "tiles": Tiles(),
}


def lse_by_definition(q, k, visible, scale):
    """log Σ e^score in float64, differentiable."""
    scores = scale * torch.einsum(
        "bthd,bshd->bths", q.double(), k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    )
    return scores.masked_fill(~visible[:, :, None], float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_lse_of_every_kernel_equals_the_definition_with_its_gradient(pattern, situation):
    """Alone, and beside that of the output: both pull at the same scores."""
    mask, heads = mask_of(situation, pattern), (4, 4) if situation in SITUATIONS[::2] else (6, 2)
    given = inputs(LENGTH, LENGTH, *heads, 8, 6)
    real = (mask.q_pos >= 0).expand(2, LENGTH)
    draw = torch.Generator().manual_seed(5)
    d_lse = torch.randn(2, LENGTH, heads[0], generator=draw) * real[..., None]
    d_out = torch.randn(2, LENGTH, heads[0], 6, generator=draw) * real[..., None, None]
    exact = lse_by_definition(*given[:2], mask.visible(), 0.4)
    plain = attend(Naive(), *given, mask, 0.4)
    expected = torch.autograd.grad((exact * d_lse).sum() + (plain * d_out).sum(), given)
    alone = torch.autograd.grad((lse_by_definition(*given[:2], mask.visible(), 0.4) * d_lse).sum(), given[:2])
    for name, kernel in CAN.items():
        out, lse = kernel(*given, mask, How(0.4, lse=True))
        assert lse.dtype == torch.float32 and lse.shape == (2, LENGTH, heads[0]), name
        assert relative_error(lse[real], exact[real]) <= 1e-5, name
        found = torch.autograd.grad((lse * d_lse).sum() + (out * d_out).sum(), given, retain_graph=True)
        for grad, other in zip(found, expected, strict=True):
            assert relative_error(grad, other) <= 2e-5, name
        only = torch.autograd.grad((lse * d_lse).sum(), given[:2], retain_graph=True)
        for grad, other in zip(only, alone, strict=True):
            assert relative_error(grad, other) <= 2e-5, name
        with torch.no_grad():
            again = kernel(*given, mask, How(0.4, lse=True))
        assert torch.equal(again.lse, lse) and kernel(*given, mask, How(0.4)).lse is None, name


@pytest.mark.parametrize("situation", ["chunk", "one query", "tiles"])
def test_lse_of_queries_behind_a_cache_equals_the_definition(monkeypatch, situation):
    monkeypatch.setattr(sdpa, "QUERY_TILE", 3)
    t = {"chunk": 3, "one query": 1, "tiles": 7}[situation]
    mask = Mask(positions(13, t), positions(0, 21), contiguous=False, pattern=CAUSAL)
    given = inputs(t, 21, 6, 2, 8, 8)
    exact = lse_by_definition(*given[:2], mask.visible(), 0.4)
    for name, kernel in CAN.items():
        assert relative_error(kernel(*given, mask, How(0.4, lse=True)).lse, exact) <= 1e-5, name


def test_lse_in_bfloat16_is_float32_within_rounding():
    low = inputs(16, 16, 4, 2, 8, 8, dtype=torch.bfloat16)
    mask = Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    exact = lse_by_definition(*low[:2], mask.visible(), 0.4)
    expected = torch.autograd.grad(exact.square().sum(), low[:2])
    for name, kernel in CAN.items():
        lse = kernel(*low, mask, How(0.4, lse=True)).lse
        assert lse.dtype == torch.float32 and relative_error(lse, exact) <= 0.02, name
        for grad, other in zip(torch.autograd.grad(lse.square().sum(), low[:2]), expected, strict=True):
            assert relative_error(grad, other) <= 0.04, name


def test_lse_from_a_kernel_that_has_none_is_refused_and_auto_takes_another():
    case = Case("cuda", torch.bfloat16, 4, 2, 8, 8, "causal", True, False, True)
    with pytest.raises(Unsupported, match=r"sdpa returns no log-sum-exp on cuda: kernel=auto") as refusal:
        SDPA().check_lse(case)
    assert_one_line(refusal.value)
    assert not SDPA().gives_lse("cuda")
    few, many = ({"few_keys": few_keys, "takes_tiles": True} for few_keys in (True, False))
    assert auto.preferred(case, **few) == auto.MATMUL and auto.preferred(case, **many) == auto.ONLINE
    assert auto.preferred(case._replace(lse=False), **few) == auto.SDPA_DEFAULT
    for keys in (few, many):
        assert auto.preferred(case, **keys).gives_lse("cuda")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=str)
def test_kernels_with_values_that_are_columns_of_the_keys_equal_values_passed(situation, heads):
    """As in absorbed MLA: by name of their width, with v unread, and gradients that come by both ways."""
    mask = mask_of(situation, CAUSAL)
    q, k, _ = inputs(LENGTH, LENGTH, *heads, 8, 8)
    real = (mask.q_pos >= 0).expand(2, LENGTH)[..., None, None]
    draw = torch.randn(2, LENGTH, heads[0], 5, generator=torch.Generator().manual_seed(5)) * real
    expected = attend(Naive(), q, k, k[..., :5], mask, 0.4)
    gradients = torch.autograd.grad((expected * draw).sum(), (q, k))
    for name, kernel in CAN.items():
        for unread in (None, k):
            out = attend(kernel, q, k, unread, mask, 0.4, v_dim=5)
            assert out.shape == expected.shape and relative_error(out * real, expected * real) <= 1e-5, name
            for grad, exact in zip(torch.autograd.grad((out * draw).sum(), (q, k)), gradients, strict=True):
                assert relative_error(grad, exact) <= 2e-5, name


def test_auto_tries_a_kernel_once_and_leaves_the_generator_as_it_was(monkeypatch):
    calls = []

    class Counted(Matmul):
        def __call__(self, q, k, v, mask, how):
            calls.append(q.shape[1])
            return super().__call__(q, k, v, mask, how)

    monkeypatch.setattr(auto, "MATMUL", Counted())
    auto.tried.cache_clear()
    given, mask = inputs(16, 16, 4, 2, 8, 8), Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    torch.manual_seed(3)
    expected = attend(Matmul(), *given, mask, 0.4, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(attend(Auto(), *given, mask, 0.4, dropout=0.25), expected)
    with PeakTensorBytes() as peak:
        attend(Auto(), *given, mask, 0.4, dropout=0.25)
    assert calls == [auto.TRIAL_TOKENS, 16, 16] and peak.bytes > 0
    auto.tried.cache_clear()


class Faulty(SDPA):
    """A kernel with a fault."""

    fault: str

    def __call__(self, q, k, v, mask, how):
        if self.fault == "does not run":
            raise RuntimeError("an illegal memory access\nwas encountered")
        if self.fault == "computes other outputs":
            return super().__call__(q, k, v, mask, how._replace(scale=2 * how.scale))
        q, k, v = (self._astray(x, name) for x, name in zip((q, k, v), ("queries", "keys", "values"), strict=True))
        out, lse = super().__call__(q, k, v, mask, how)
        if lse is not None and self.fault == "computes other log-sum-exps":
            lse = lse + 1
        if lse is not None and self.fault == "ignores the gradient of log-sum-exps":
            lse = lse.detach()
        return Attended(out, lse)

    def _astray(self, x, name):
        """x, with a gradient that is not its own."""
        if self.fault == f"computes other gradients of {name}":
            return 0.9 * x + 0.1 * x.detach()
        return x.detach() if self.fault == f"ignores gradients of {name}" else x


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("does not run", "does not run on cpu: an illegal memory access was encountered"),
        ("computes other outputs", "computes other outputs, by"),
        ("computes other gradients of queries", "computes other gradients of queries, by 0.1 of"),
        ("computes other gradients of keys", "computes other gradients of keys, by 0.1 of"),
        ("computes other gradients of values", "computes other gradients of values, by 0.1 of"),
        ("ignores gradients of keys", "computes other gradients of keys, by 1 of"),
        ("computes other log-sum-exps", "computes other log-sum-exps, by"),
        ("ignores the gradient of log-sum-exps", "computes other gradients of queries, by"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_auto_that_finds_a_kernel_at_fault_takes_the_naive_one_with_a_warning(
    monkeypatch, caplog, fault, reason, dtype
):
    monkeypatch.setattr(auto, "SDPA_DEFAULT", Faulty(fault=fault))
    auto.tried.cache_clear()
    base.forget_logged()
    given = inputs(16, 16, 4, 2, 8, 8, dtype=dtype)
    mask = Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    how = How(0.4, lse="log-sum" in fault)
    with caplog.at_level("INFO", logger="headroom"):
        for _ in range(2):
            assert torch.equal(Auto()(*given, mask, how).out, Naive()(*given, mask, how).out)
    auto.tried.cache_clear()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and len(warnings[0].splitlines()) == 1
    assert warnings[0].startswith(f"kernel auto takes the slow naive kernel: Faulty {reason}")
    assert not [message for message in caplog.messages if message.startswith("kernel sdpa")]


def test_auto_whose_kernel_has_wrong_gradients_takes_it_where_there_are_none(monkeypatch, caplog):
    monkeypatch.setattr(auto, "SDPA_DEFAULT", Faulty(fault="computes other gradients of keys"))
    auto.tried.cache_clear()
    base.forget_logged()
    given, mask = inputs(16, 16, 4, 2, 8, 8), Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    with torch.no_grad(), caplog.at_level("INFO", logger="headroom"):
        attend(Auto(), *given, mask, 0.4)
    auto.tried.cache_clear()
    assert [message.split(":")[0] for message in caplog.messages] == ["kernel sdpa (flash)"]


def test_online_with_distant_scores_equals_naive():
    """Maxima that rise and fall by a hundred from tile to tile."""
    q, k, v = inputs(16, 16, 4, 2, 8, 8)
    q, k = (x.detach().mul(8).requires_grad_() for x in (q, k))
    mask = Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    check_against_naive([TILED], (q, k, v), mask, tolerance=1e-3)


@pytest.mark.parametrize(
    "pattern", [CAUSAL, pytest.param(Pattern(window=40), marks=pytest.mark.slow)], ids=["causal", "window"]
)
def test_online_memory_grows_linearly_with_the_length(pattern):
    def peak(kernel, length: int) -> int:
        given, places = inputs(length, length, 4, 2, 8, 8), positions(0, length)
        with PeakTensorBytes() as peak_bytes:
            attend(kernel, *given, Mask(places, places, True, pattern), 0.4).sum().backward()
        return peak_bytes.bytes

    kernel = Online(query_tile=16, key_tile=16)
    small, large = peak(kernel, 128), peak(kernel, 512)
    assert large < 4.1 * small
    assert peak(Naive(), 512) > 12 * peak(Naive(), 128)  # which is what such a count shows of a kernel that is not
    scores = 4 * 2 * 4 * 512 * 512  # bytes of one T × S matrix per head
    assert large < scores / 10


def test_online_skips_fully_hidden_tiles(monkeypatch):
    """Of 8 x 8 tiles: those up to the diagonal; with a window of one tile, two per row of them."""
    computed, real = [], online.scores_of_tile
    monkeypatch.setattr(online, "scores_of_tile", lambda *given: (computed.append(given[-2:]), real(*given))[1])
    kernel, places = Online(query_tile=4, key_tile=4), positions(0, 32)
    for pattern, tiles in ((CAUSAL, 36), (Pattern(window=4), 15), (Pattern(causal=False), 64)):
        computed.clear()
        out = attend(kernel, *inputs(32, 32, 2, 1, 4, 4), Mask(places, places, True, pattern), 0.5)
        assert len(computed) == tiles
        out.sum().backward()
        assert len(computed) == 2 * tiles


def test_online_second_derivative_is_refused():
    given = inputs(4, 4, 1, 1, 4, 4)
    out = attend(Online(), *given, Mask(positions(0, 4), positions(0, 4), contiguous=True, pattern=CAUSAL), 0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_online_with_dropout_is_refused():
    mask = Mask(positions(0, 4), positions(0, 4), contiguous=True, pattern=CAUSAL)
    with pytest.raises(Unsupported, match=r"kernel=online drops no attention weights.*kernel=auto"):
        attend(Online(), *inputs(4, 4, 1, 1, 4, 4), mask, 0.5, dropout=0.1)


def test_matmul_second_derivative_is_refused():
    given = inputs(4, 4, 1, 1, 4, 4)
    out = attend(PRODUCTS, *given, Mask(positions(0, 4), positions(0, 4), contiguous=True, pattern=CAUSAL), 0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_matmul_dropout_is_the_same_forward_and_backward():
    """With the identity as values, the output is the weights; two calls from one seed drop the same ones."""
    given, mask = inputs(16, 16, 4, 2, 8, 8), Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    q, k, v = given
    identity = torch.eye(16)[:, None].expand(2, 16, 2, 16)
    draw = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(9))
    weights = attend(Naive(), q, k, identity, mask, 0.4)  # (B, T, H, S)
    torch.manual_seed(3)
    left = attend(Matmul(), q, k, identity, mask, 0.4, dropout=0.25) / weights.where(weights > 0, 1)
    torch.manual_seed(3)
    found = attend(Matmul(), *given, mask, 0.4, dropout=0.25)
    expected = torch.einsum("bths,bshv->bthv", left.detach() * weights, v.repeat_interleave(2, dim=2))
    assert (left[weights > 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.allclose(left[left > 0], torch.tensor(1 / 0.75))
    assert relative_error(found, expected) <= 1e-5
    gradients = (torch.autograd.grad((out * draw).sum(), given) for out in (found, expected))
    for grad, exact in zip(*gradients, strict=True):
        assert relative_error(grad, exact) <= 1e-5


def test_auto_on_a_cpu_training_on_short_texts_in_bfloat16_selects_matmul(caplog):
    def taken(length, dtype=torch.bfloat16, dropout=0.0):
        given = inputs(2, length, 5, 5, 6, 6, dtype=dtype)
        mask = Mask(positions(length - 2, 2), positions(0, length), contiguous=False, pattern=CAUSAL)
        base.forget_logged()
        caplog.clear()
        with caplog.at_level("INFO", logger="headroom"):
            attend(Auto(), *given, mask, 0.5, dropout=dropout)
        return caplog.messages[-1].split(":")[0]

    assert taken(MAX_MATMUL_KEYS) == "kernel matmul"
    assert taken(MAX_MATMUL_KEYS + 1) == taken(MAX_MATMUL_KEYS, torch.float32) == "kernel sdpa (flash)"
    assert taken(MAX_MATMUL_KEYS + 1, torch.float32, dropout=0.1) == "kernel matmul"
    with torch.no_grad():
        assert taken(MAX_MATMUL_KEYS) == "kernel sdpa (flash)"


def test_sdpa_on_long_chunks_runs_in_query_tiles():
    t, s = 2 * QUERY_TILE + 7, 2 * QUERY_TILE + 40
    q, k, v = inputs(t, s, 2, 1, 4, 4)
    mask = Mask(positions(33, t), positions(0, s), contiguous=False, pattern=CAUSAL)
    assert relative_error(*(attend(kernel, q, k, v, mask, 0.5) for kernel in (SDPA(), Naive()))) <= 1e-5


def test_kernels_in_bfloat16_are_within_rounding():
    low = inputs(16, 16, 4, 2, 8, 8, dtype=torch.bfloat16)
    mask = Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    expected = attend(Naive(), *(x.float() for x in low), mask, 0.35)
    gradients = torch.autograd.grad(expected.square().sum(), low)
    for kernel in (Naive(), SDPA(), TILED, PRODUCTS, Tiles(), Auto()):
        found = attend(kernel, *low, mask, 0.35)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) <= 0.02
        for grad, exact in zip(torch.autograd.grad(found.float().square().sum(), low), gradients, strict=True):
            assert grad.dtype == torch.bfloat16
            assert relative_error(grad, exact) <= 0.04


def test_sdpa_on_an_unknown_device_is_refused():
    q, k, v = (x.detach().to("meta") for x in inputs(4, 4, 1, 1, 4, 4))
    with pytest.raises(ValueError, match="kernel=naive"):
        attend(SDPA(), q, k, v, Mask(positions(0, 4), positions(0, 4), contiguous=True, pattern=CAUSAL), 0.5)


def test_sdpa_without_a_fused_backend_is_refused():
    """PyTorch would take its slow math path, which a CPU takes for values that are not as wide as keys."""
    q, v = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 6)
    enabled = torch.backends.cuda.math_sdp_enabled()
    with pytest.raises(ValueError, match=r"no fused kernel for head dim 8.*kernel=naive"):
        sdpa.FusedSDPA(None)(q, q, v, How(0.5))
    assert torch.backends.cuda.math_sdp_enabled() == enabled
    found, _ = sdpa.FusedSDPA(None)(q, q, q, How(0.5))
    assert found.shape == q.shape


def test_announce_logs_each_kernel_once_per_shape(caplog):
    q, k, v = inputs(4, 4, 7, 7, 10, 10)  # a shape no other test uses
    mask = Mask(positions(0, 4), positions(0, 4), contiguous=True, pattern=CAUSAL)
    with caplog.at_level("INFO", logger="headroom"):
        for _ in range(3):
            attend(Auto(), q, k, v, mask, 0.5)
    messages = [record.message for record in caplog.records if "7 query heads" in record.message]
    assert len(messages) == 1
    assert messages[0].startswith("kernel sdpa (flash)")


def test_mask_visible_follows_positions():
    mask = Mask(torch.tensor([[-1, 0, 2]]), torch.tensor([[-1, 0, 1, 2, 3]]), contiguous=False, pattern=CAUSAL)
    expected = [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]  # padding sees all there is, and is seen by none
    assert mask.visible().int().tolist() == [expected]
    assert mask.visible_in(slice(2, 3), slice(None)).int().tolist() == [expected[2:]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("see_self", [True, False])
def test_pattern_sees_what_its_definition_says(causal, see_self):
    """Of each window, dilation and number of global tokens, every pair."""
    indices = torch.arange(15)
    pairs = [(q, k) for q in range(15) for k in range(15)]
    for window, (dilation, global_tokens) in itertools.product((None, 1, 4, 40), ((1, 0), (3, 0), (1, 2), (2, 3))):
        pattern = Pattern(causal, window, dilation, global_tokens, see_self=see_self)
        found = pattern.sees(indices[:, None], indices).tolist()
        for q, k in pairs:
            apart = q - k if causal else abs(q - k)
            near = apart >= 0 and (window is None or apart < window) and apart % dilation == 0
            seen = near or (k < global_tokens and (k <= q or not causal))
            if q == k and not see_self:
                seen = q == 0
            assert found[q][k] == seen, (pattern, q, k)


def test_pattern_random_blocks_follow_the_seed_and_the_share():
    blocks, size = 200, 4
    indices = torch.arange(blocks * size)
    drawn = []
    for seed in (0, 1, 2**31 - 1):
        pattern = Pattern(causal=False, window=1, random_blocks=0.3, block_size=size, seed=seed)
        seen = pattern.sees(indices[:, None], indices) & (indices[:, None] != indices)
        by_block = seen.unflatten(0, (-1, size)).unflatten(2, (-1, size))
        some = by_block.any(3).any(1)
        off_diagonal = ~torch.eye(blocks, dtype=torch.bool)
        assert torch.equal(some & off_diagonal, by_block.all(3).all(1) & off_diagonal)
        assert some[off_diagonal].float().mean() == pytest.approx(0.3, abs=0.01)
        assert (some.float().mean(1) - 0.3).abs().max() < 0.15  # each block of queries has its share
        drawn.append(some)
        assert (some[0] != some[1]).any() and (some[:, 0] != some[:, 1]).any()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (drawn[a] == drawn[b])[off_diagonal].float().mean() == pytest.approx(0.3**2 + 0.7**2, abs=0.02)


@pytest.fixture
def gpu(monkeypatch):
    """What SDPA asks PyTorch of a GPU and its flash kernels, answered here -> what was activated."""
    activated, current = [], [None]

    def activate(name: str | None) -> None:
        if name == "FA4":
            raise ModuleNotFoundError("No module named 'flash_attn'")
        activated.append(name)
        current[0] = name

    attention = torch.nn.attention
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"], raising=False)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: activate(None), raising=False)
    monkeypatch.setattr(sdpa, "ACTIVATED", set())
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: current[0], raising=False)
    return activated


def test_flash_choice_is_activated_by_the_first_call_not_by_check(gpu):
    SDPA(flash="FA3").check(torch.device("cuda"), training=True, dropout=False)
    assert gpu == []
    for _ in range(3):
        sdpa._activate("FA3")
    assert gpu == ["FA3"]


def test_flash_unset_restores_pytorchs_own_unless_others_activated_it(gpu):
    for flash in ("FA3", None):
        sdpa._activate(flash)
    assert gpu == ["FA3", None]
    torch.nn.attention.activate_flash_attention_impl("mine")
    sdpa._activate(None)
    assert torch.nn.attention.current_flash_attention_impl() == "mine"


def test_flash_choice_in_compiled_code_is_activated_at_tracing(gpu):
    def use(kernel: SDPA, x: torch.Tensor) -> torch.Tensor:
        kernel.check(torch.device("cuda"), training=True, dropout=False)
        sdpa._activate(kernel.flash)
        return x + 1

    use = torch.compile(use, backend="eager", fullgraph=True)
    assert use(SDPA(flash="FA3"), torch.zeros(1)) == 1 and gpu == ["FA3"]


@pytest.mark.parametrize(
    ("kernel", "device", "complaint"),
    [
        (SDPA(flash="FA3"), "cpu", "kernel.flash=FA3 runs on a GPU, not on cpu: leave it unset"),
        (SDPA(flash="FA4"), "cuda", "needs the package flash_attn.cute, of FlashAttention: No module named"),
        (SDPA(backend="cudnn"), "cpu", "kernel.backend=cudnn runs on a GPU, not on cpu: leave it unset"),
        (SDPA(backend="cudnn"), "cuda", "kernel.backend=cudnn: there is no cuDNN here: leave kernel.backend unset"),
    ],
)
def test_sdpa_with_an_unavailable_kernel_is_refused_in_one_line(gpu, kernel, device, complaint):
    with pytest.raises(Unsupported, match=re.escape(complaint)) as refusal:
        kernel.check(torch.device(device), training=True, dropout=False)
    assert_one_line(refusal.value)


NO_KERNEL_MESSAGES = (
    "No available kernel. Aborting execution.",
    "cuDNN Frontend error: no valid engine configs",
    "what else?",
)


@pytest.mark.parametrize("message", NO_KERNEL_MESSAGES)
def test_sdpa_backend_without_a_kernel_is_refused_with_a_way_out(monkeypatch, message):
    def refuse(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(sdpa, "_chosen", lambda *_: "cudnn")
    q, complaint = torch.zeros(1, 2, 4, 8), "no cudnn kernel for head dim 8, torch.float32 on cpu: leave kernel.backend"
    with pytest.raises(RuntimeError if message == NO_KERNEL_MESSAGES[2] else Unsupported) as refusal:
        sdpa.FusedSDPA("cudnn")(q, q, q, How(1.0))
    assert (complaint in str(refusal.value)) == (message != NO_KERNEL_MESSAGES[2])


def test_flash_choice_on_a_pytorch_without_any_is_refused(monkeypatch):
    for name in ("list_flash_attention_impls", "activate_flash_attention_impl", "current_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name, raising=False)
    with pytest.raises(Unsupported, match=r"offers none beside its own: leave it unset"):
        SDPA(flash="FA3").check(torch.device("cuda"), training=True, dropout=False)


def test_sdpa_names_the_backend_a_gpu_chose(monkeypatch, gpu):
    sdpa._activate("FA3")
    there = SimpleNamespace(device=torch.device("cuda"))
    for taken, expected in ((1, "flash, FA3"), (2, "efficient"), (3, "cudnn"), (0, "fused")):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, taken=taken, **__: taken, raising=False)
        assert sdpa._chosen(there, there, there, {}) == expected
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert sdpa._chosen(there, there, there, {}) == "fused"


def test_sdpa_backend_flash_equals_default():
    given, mask = inputs(16, 16, 4, 2, 8, 8), Mask(positions(0, 16), positions(0, 16), contiguous=True, pattern=CAUSAL)
    assert torch.equal(*(attend(kernel, *given, mask, 0.4) for kernel in (SDPA(backend="flash"), SDPA())))


@pytest.mark.parametrize("contiguous", [True, False])
def test_kernels_take_tensors_of_any_strides(contiguous):
    """As an einsum or a transposition leaves them."""
    q, k, v = (torch.randn(2, 16, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    places = torch.arange(16)[None]
    mask = Mask(places, places, contiguous=contiguous, pattern=CAUSAL)
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attend(Naive(), *wanted, mask, 0.3)
    exact = torch.autograd.grad(expected.square().sum(), wanted)
    for kernel in (Naive(), Online(), Matmul(), SDPA(), Tiles(), Auto()):
        strided = [x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k, v)]
        found = attend(kernel, *strided, mask, 0.3)
        assert torch.allclose(found, expected, atol=1e-5), kernel
        gradients = torch.autograd.grad(found.square().sum(), strided)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(gradients, exact, strict=True)), kernel
