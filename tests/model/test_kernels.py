"""Kernels against the naive twin, on the shapes attentions hand them; and the mask they all read."""

import pytest
import torch

from model.kernels.auto import Auto
from model.kernels.naive import Naive
from model.kernels.sdpa import QUERY_TILE, SDPA
from model.mask import Mask
from tests.support import relative_error

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
def test_naive_is_the_definition(shape):
    q, k, v = inputs(*shape)
    mask = Mask(positions(0, shape[0]), positions(0, shape[1]), plain=True)
    expected = by_definition(q, k, v, mask.visible(), 0.3)
    assert relative_error(Naive()(q, k, v, mask, 0.3), expected) <= 1e-5


@pytest.mark.parametrize("kernel", [SDPA(), Auto()], ids=["sdpa", "auto"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("situation", ["plain", "chunk", "one query", "ragged"])
def test_fused_equals_naive_forward_and_backward(kernel, shape, situation):
    t, s, *rest = shape
    if situation == "plain":
        mask = Mask(positions(0, t), positions(0, s), plain=True)
    elif situation == "chunk":
        t, s = 5, 21
        mask = Mask(positions(13, t), positions(0, s), plain=False)
    elif situation == "one query":
        t, s = 1, 21
        mask = Mask(positions(13, t), positions(0, s), plain=False)
    else:
        ragged = torch.stack([torch.arange(t), torch.arange(t) - 5])
        mask = Mask(ragged, ragged, plain=False)
    draw = torch.randn(2, t, rest[0], rest[3], generator=torch.Generator().manual_seed(9))
    results = []
    for chosen in (Naive(), kernel):
        q, k, v = inputs(t, s, *rest)
        out = chosen(q, k, v, mask, 0.4)
        results.append([out, *torch.autograd.grad((out * draw).sum(), (q, k, v))])
    for found, expected in zip(results[1], results[0], strict=True):
        assert relative_error(found, expected) <= 1e-5


def test_long_chunks_run_in_tiles_of_queries():
    t, s = 2 * QUERY_TILE + 7, 2 * QUERY_TILE + 40
    q, k, v = inputs(t, s, 2, 1, 4, 4)
    mask = Mask(positions(33, t), positions(0, s), plain=False)
    assert relative_error(SDPA()(q, k, v, mask, 0.5), Naive()(q, k, v, mask, 0.5)) <= 1e-5


def test_bfloat16_within_its_rounding():
    low = inputs(16, 16, 4, 2, 8, 8, dtype=torch.bfloat16)
    mask = Mask(positions(0, 16), positions(0, 16), plain=True)
    expected = Naive()(*(x.float() for x in low), mask, 0.35)
    for kernel in (Naive(), SDPA()):
        found = kernel(*low, mask, 0.35)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) <= 0.02


def test_sdpa_refuses_a_device_it_does_not_know():
    q, k, v = (x.detach().to("meta") for x in inputs(4, 4, 1, 1, 4, 4))
    with pytest.raises(ValueError, match="kernel=naive"):
        SDPA()(q, k, v, Mask(positions(0, 4), positions(0, 4), plain=True), 0.5)


def test_sdpa_refuses_the_math_fallback(monkeypatch):
    def no_fused_kernel(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_fused_kernel)
    with pytest.raises(ValueError, match=r"head dim 4.*kernel=naive"):
        SDPA()(*inputs(4, 4, 1, 1, 4, 4), Mask(positions(0, 4), positions(0, 4), plain=True), 0.5)


def test_the_kernel_that_runs_is_announced_once_per_shape(caplog):
    q, k, v = inputs(4, 4, 7, 7, 10, 10)  # a shape no other test uses
    mask = Mask(positions(0, 4), positions(0, 4), plain=True)
    with caplog.at_level("INFO", logger="headroom"):
        for _ in range(3):
            Auto()(q, k, v, mask, 0.5)
    said = [record.message for record in caplog.records if "7 query heads" in record.message]
    assert len(said) == 1
    assert said[0].startswith("kernel sdpa (flash)")


def test_who_sees_whom():
    mask = Mask(torch.tensor([[-1, 0, 2]]), torch.tensor([[-1, 0, 1, 2, 3]]), plain=False)
    expected = [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]  # padding sees all there is, and is seen by none
    assert mask.visible().int().tolist() == [expected]
    assert mask.visible(slice(2, 3)).int().tolist() == [expected[2:]]
