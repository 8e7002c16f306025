"""kernel=tiles: which tiles it cuts, that what a pattern hides is skipped forward and backward, and when auto takes it.
That it equals the naive kernel under every mask: tests/model/test_kernels.py."""

import pytest
import torch

from common.errors import Unsupported
from model.kernels import base, tiles
from model.kernels.auto import Auto
from model.kernels.base import How
from model.kernels.naive import Naive
from model.kernels.tiles import Tile, Tiles, plan
from model.mask import CAUSAL, Mask, Pattern
from runtime.memory import PeakTensorBytes
from tests.model.masks import LENGTH, mask_of
from tests.support import assert_one_line, relative_error

TOKENS = 512
RANDOM = Pattern(window=16, random_blocks=0.1)


def contiguous(pattern: Pattern, tokens: int = TOKENS) -> Mask:
    positions = torch.arange(tokens)[None]
    return Mask(positions, positions, contiguous=True, pattern=pattern)


def packed(lengths: list[list[int]], pattern: Pattern = CAUSAL) -> Mask:
    """Documents of these lengths, for each sequence."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    docs = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    return Mask(positions, positions, contiguous=False, pattern=pattern, q_doc=docs, k_doc=docs)


def inputs(tokens: int, batch: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]


def indices(tile: Tile, tokens: int = TOKENS) -> list[int]:
    return [i for keys in tile.keys for i in range(tokens)[keys]]


def pairs(mask: Mask) -> int:
    return sum(tile.n_queries * sum(tile.lengths) for tile in plan(mask))


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(window=40),
        RANDOM,
        Pattern(window=16, global_tokens=3),
        Pattern(dilation=4),
        Pattern(window=40, dilation=4, global_tokens=3),
        Pattern(window=9, dilation=2, random_blocks=0.1),
        Pattern(causal=False, window=40),
    ],
    ids=str,
)
def test_tiles_meet_each_query_once_and_every_key_that_it_sees(pattern):
    mask = contiguous(pattern)
    visible, found = mask.visible()[0], []
    for tile in plan(mask):
        rows, keys = range(TOKENS)[tile.rows], indices(tile)
        found += rows
        assert len(set(keys)) == len(keys) == sum(tile.lengths)
        assert set(visible[rows].any(0).nonzero()[:, 0].tolist()) <= set(keys)
    assert sorted(found) == list(range(TOKENS))


def test_tiles_meet_no_block_that_the_pattern_hides():
    """A window's tile: itself and the window before. Random blocks: those that one of its queries sees. A dilation of
    n: every n-th."""
    for tile in plan(contiguous(Pattern(window=40))):
        assert sum(tile.lengths) <= tile.n_queries + 39
    mask = contiguous(RANDOM)
    for tile in plan(mask):
        met = mask.visible()[0, tile.rows].any(0)
        assert sum(tile.lengths) == met.sum()
    dilated = plan(contiguous(Pattern(dilation=4)))
    assert {tile.rows.step for tile in dilated} == {4}
    assert all(tile.rows.start % 4 == i % 4 for tile in dilated for i in indices(tile))
    full = TOKENS * (TOKENS + 1) / 2
    assert pairs(contiguous(Pattern(window=40))) < 0.5 * full and pairs(contiguous(Pattern(dilation=4))) < 0.5 * full
    assert pairs(mask) < 0.7 * full


def test_tiles_of_packed_documents_begin_where_one_of_the_sequences_does():
    mask = packed([[300, 212], [100, 412]])
    starts = {tile.rows.start: tile.keys[0].start for tile in plan(mask)}
    assert starts[0] == 0 and starts[448] == 100  # 300 in the other
    alone = packed([[64] * 8])
    assert all(tile.keys == (tile.rows,) for tile in plan(alone))
    assert pairs(packed([[64] * 8], RANDOM)) == pairs(alone)  # positions choose blocks, and an index tells none


def test_tiles_skip_in_the_backward_pass_too(monkeypatch):
    """Keys that the flash kernel is given, forward and backward."""
    met = {"forward": [], "backward": []}

    def noted(phase: str, of_keys: int, kernel):
        return lambda *given, **options: (met[phase].append(given[of_keys].shape[2]), kernel(*given, **options))[1]

    monkeypatch.setattr(tiles, "CPU_FLASH", noted("forward", 1, tiles.CPU_FLASH))
    monkeypatch.setattr(tiles, "CPU_FLASH_BACKWARD", noted("backward", 2, tiles.CPU_FLASH_BACKWARD))
    for pattern in (Pattern(window=40), RANDOM):
        met["forward"].clear(), met["backward"].clear()
        mask = contiguous(pattern)
        Tiles()(*inputs(TOKENS), mask, How(0.4)).out.sum().backward()
        assert met["forward"] == met["backward"] == [sum(tile.lengths) for tile in plan(mask)]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_tile_wrongly_skipped_is_caught(monkeypatch, phase):
    """The comparison with the naive kernel fails on one range of keys that one tile leaves out, in either pass."""
    monkeypatch.setattr(tiles, "QUERIES", (4,))
    mask, given = mask_of("plain", Pattern(window=3, random_blocks=0.4, block_size=2)), inputs(LENGTH, batch=2)
    right = plan(mask)
    i = max(range(len(right)), key=lambda i: len(right[i].keys))
    wrong = (*right[:i], Tile.of(right[i].rows, list(right[i].keys[1:])), *right[i + 1 :])

    def computed(kernel) -> tuple[torch.Tensor, ...]:
        out = kernel(*given, mask, How(0.4)).out
        if kernel is faulty and phase == "backward":
            out.grad_fn.plan = wrong
            mask.made.clear()
        return out, *torch.autograd.grad(out.square().sum(), given)

    faulty = Tiles()
    if phase == "forward":
        monkeypatch.setattr(tiles, "plan", lambda _: wrong)
    errors = [relative_error(one, exact) for one, exact in zip(computed(faulty), computed(Naive()), strict=True)]
    assert max(errors) > 0.01


@pytest.mark.parametrize("pattern", [Pattern(window=40), RANDOM, Pattern(window=40, dilation=4)], ids=str)
def test_tiles_memory_grows_linearly_with_the_length(monkeypatch, pattern):
    monkeypatch.setattr(tiles, "QUERIES", (16,))
    monkeypatch.setattr(tiles, "MAX_SHARED_KEYS", 100)  # which bounds what layers share, as for longer texts

    def peak(length: int) -> int:
        with PeakTensorBytes() as peak_bytes:
            Tiles()(*inputs(length), contiguous(pattern, length), How(0.4)).out.sum().backward()
        return peak_bytes.bytes

    assert peak(2048) < 4.2 * peak(512)


@pytest.mark.parametrize(
    "mask",
    [mask_of("documents", Pattern(window=5)), mask_of("plain", Pattern(window=3, random_blocks=0.4, block_size=2))],
    ids=["documents", "random blocks"],
)
def test_tiles_compiled_equal_eager_ones(monkeypatch, mask):
    """In one graph, forward and backward: which tiles there are is known when it is traced."""
    monkeypatch.setattr(tiles, "QUERIES", (6,))
    kernel, given = Tiles(), inputs(LENGTH, batch=2)

    def run(q, k, v):
        return kernel(q, k, v, mask, How(0.4)).out

    exact = run(*given)
    found = torch.compile(run, backend="aot_eager", dynamic=False, fullgraph=True)(*given)
    assert relative_error(found, exact) <= 1e-5
    gradients = (torch.autograd.grad(out.square().sum(), given) for out in (found, exact))
    for grad, expected in zip(*gradients, strict=True):
        assert relative_error(grad, expected) <= 1e-5


def test_auto_on_a_cpu_takes_tiles_under_what_hides_keys(caplog):
    def taken(mask: Mask, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> str:
        base.forget_logged()
        caplog.clear()
        given = [x.to(dtype) for x in inputs(mask.q_pos.shape[1])]
        with caplog.at_level("INFO", logger="headroom"):
            Auto()(*given, mask, How(0.4, dropout=dropout))
        return caplog.messages[-1].split(":")[0]

    ragged = Mask(torch.arange(9)[None] - 3, torch.arange(9)[None] - 3, contiguous=False, pattern=CAUSAL)
    assert taken(contiguous(RANDOM)) == taken(packed([[300, 300]]), torch.bfloat16) == "kernel tiles (flash)"
    assert taken(contiguous(CAUSAL)) == taken(ragged) == "kernel sdpa (flash)"
    assert taken(contiguous(RANDOM), torch.bfloat16) == taken(contiguous(RANDOM), dropout=0.1) == "kernel matmul"
    with torch.no_grad():
        assert taken(contiguous(RANDOM)) == taken(contiguous(RANDOM), torch.bfloat16) == "kernel tiles (flash)"


@pytest.mark.parametrize(("device", "dropout"), [("cuda", False), ("cpu", True)])
def test_tiles_where_they_do_not_run_are_refused(device, dropout):
    complaint = "kernel=tiles drops no attention weights" if dropout else "runs on a CPU, not on cuda: kernel=auto"
    with pytest.raises(Unsupported, match=complaint) as refusal:
        Tiles().check(torch.device(device), training=True, dropout=dropout)
    assert_one_line(refusal.value)
