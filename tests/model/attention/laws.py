"""The laws every attention obeys, as functions that raise AssertionError. Each is tested to catch what it is for."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.cache import SLACK, Cache
from model.placement import Placement
from model.transformer import TransformerLM
from tests.support import distinct_tokens, logits_of, relative_error, some_tokens


def check_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Logits are those expected, within a tolerance relative to the largest."""
    error = relative_error(found, expected)
    assert error <= tolerance, f"{what}: logits differ by {error:.2g} of the largest, and {tolerance:g} is allowed"


def check_reach(model: TransformerLM) -> None:
    """d logits[t] / d embedding[t'] is exactly zero where no chain of layers leads from t' to t, as it is for t' > t in
    a causal model, and not zero where one does, unless an indexer chose another. Needs an untied head: each token
    stands once, so that its row of the embedding's gradient is the gradient at its place."""
    length = 12
    tokens = torch.randperm(model.vocab_size, generator=torch.Generator().manual_seed(1))[None, :length]
    positions = torch.arange(length)
    chains = torch.eye(length)
    for block in model.layers:
        seen = block.attention.pattern.sees(positions[:, None], positions).float()
        chains = (seen + torch.eye(length)) @ chains  # along the residual stream each token goes on by itself
    logits = logits_of(model, tokens)[0]
    for t in range(length):
        (grad,) = torch.autograd.grad(logits[t].square().sum(), model.embedding.weight, retain_graph=True)
        reach = grad[tokens[0]].abs().sum(-1)
        assert (reach[chains[t] == 0] == 0).all(), f"token {t} sees what it should not"
        assert model.indexers() or (reach[chains[t] > 0] > 0).all(), f"token {t} does not see all it should"


def check_causality(model: TransformerLM) -> None:
    """No layer's pattern shows a later token, and the gradients reach as far as the patterns say."""
    for block in model.layers:
        positions = torch.arange(40)
        assert not block.attention.pattern.sees(positions[:, None], positions).triu(1).any()
    check_reach(model)


@torch.no_grad()
def decode_in_chunks(
    model: TransformerLM, tokens: Tensor, chunks: Sequence[int], caches: list[Cache], *, kv_len=None, grow=False
) -> Tensor:
    """Logits (B, T, V), the tokens fed through the caches a chunk at a time."""
    outputs, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size)[None].expand(tokens.shape[0], -1)
        if grow:
            for cache in caches:
                if cache.capacity < start + size:
                    cache.grow(max(start + size, 2 * cache.capacity))
        seen = None if kv_len is None else kv_len(start + size)
        outputs.append(logits_of(model, tokens[:, start : start + size], Placement.decode(positions, caches, seen)))
        start += size
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def ways_to_decode(model: TransformerLM, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same logits (B, T, V), through the cache in every way a caller may choose."""
    batch, length = tokens.shape
    positions = torch.arange(length)[None].expand(batch, -1)
    caches = model.make_caches(batch, length)
    whole = torch.full((batch,), length)
    yield "prefill", logits_of(model, tokens, Placement.prefill(whole, caches))
    yield "prefill by positions", decode_in_chunks(model, tokens, [length], model.make_caches(batch, length))
    yield "token by token", decode_in_chunks(model, tokens, [1] * length, model.make_caches(batch, length))
    odd = [5, 1, 7, 3, 1, 1, length - 18]
    yield "odd chunks", decode_in_chunks(model, tokens, odd, model.make_caches(batch, length))
    yield "growing", decode_in_chunks(model, tokens, odd, model.make_caches(batch, 2), grow=True)
    caches = model.make_caches(batch, 4 * length)
    yield "extents", decode_in_chunks(model, tokens, odd, caches, kv_len=lambda seen: seen + 3)
    yield "stale rows", decode_in_chunks(model, tokens, odd, caches)  # the same caches again, full of old rows
    caches = model.make_caches(batch, length)
    first = logits_of(model, tokens[:, :9], Placement.prefill(torch.full((batch,), 9), caches))
    rest = [
        logits_of(model, tokens[:, t : t + 1], Placement.decode(positions[:, t : t + 1], caches))
        for t in range(9, length)
    ]
    yield "prefill, then token by token", torch.cat([first, *rest], dim=1)
    yield "after rewinding", decode_with_rewinding(model, tokens)


@torch.no_grad()
def decode_with_rewinding(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Logits (B, T, V), where before each chunk other tokens are decoded and taken back, up to as many as a cache
    allows: first in one chunk, then one by one."""
    batch, length = tokens.shape
    caches = model.make_caches(batch, length + SLACK)
    assert all(cache.max_rewind >= SLACK for cache in caches)
    outputs, start = [], 0
    for i, size in enumerate((1, 6, 1, 9, length - 17)):
        ahead = torch.arange(start, start + SLACK)[None].expand(batch, -1)
        wrong = (ahead * 7 + 3) % model.vocab_size
        for part in [ahead] if i % 2 else ahead.split(1, dim=1):
            logits_of(model, wrong[:, part[0] - start], Placement.decode(part, caches))
        for cache in caches:
            cache.rewind(torch.full((batch,), start))
        positions = torch.arange(start, start + size)[None].expand(batch, -1)
        outputs.append(logits_of(model, tokens[:, start : start + size], Placement.decode(positions, caches)))
        start += size
    return torch.cat(outputs, dim=1)


def check_cached(model: TransformerLM, oracle: TransformerLM, tolerance: float = 1e-5) -> None:
    """Decoding gives, at every position, the logits of the oracle's one uncached forward."""
    tokens = distinct_tokens(2, 23)
    with torch.no_grad():
        expected = logits_of(oracle, tokens)
    for way, found in ways_to_decode(model, tokens):
        check_close(found, expected, tolerance, way)


@torch.no_grad()
def check_ragged(model: TransformerLM, oracle: TransformerLM, tolerance: float = 1e-5) -> None:
    """Rows of different length, padded on the left with negative positions, decode as each does alone."""
    lengths, total = (5, 11, 8), 11
    rows = [distinct_tokens(1, n + 4, seed=n)[0] for n in lengths]
    expected = [logits_of(oracle, row[None])[0] for row in rows]
    tokens = torch.zeros(len(rows), total, dtype=torch.int64)
    positions = torch.full((len(rows), total), -1)
    for i, n in enumerate(lengths):
        tokens[i, total - n :], positions[i, total - n :] = rows[i][:n], torch.arange(n)
    uncached = logits_of(model, tokens, Placement(positions))
    caches = model.make_caches(len(rows), total + 4)
    prefill = logits_of(model, tokens, Placement.decode(positions, caches))
    for i, n in enumerate(lengths):
        check_close(uncached[i, total - n :], expected[i][:n], tolerance, "uncached")
        check_close(prefill[i, total - n :], expected[i][:n], tolerance, "prefill")
    for step in range(4):
        token = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
        position = torch.tensor([[n + step] for n in lengths])
        logits = logits_of(model, token, Placement.decode(position, caches))
        for i, n in enumerate(lengths):
            check_close(logits[i, 0], expected[i][n + step], tolerance, f"row {i}, step {step}")


@torch.no_grad()
def check_relative_positions(model: TransformerLM, tolerance: float = 1e-4) -> None:
    """Moving all positions by the same amount changes nothing."""
    tokens, positions = some_tokens(2, 16), torch.arange(16)[None]
    for shift in (1, 37):
        moved = logits_of(model, tokens, Placement(positions + shift))
        check_close(moved, logits_of(model, tokens), tolerance, f"moved by {shift} positions")


def check_packed_documents(model: TransformerLM) -> None:
    """Documents packed into one sequence compute what each computes alone, gradients too."""
    lengths = [7, 1, 20, 12]
    tokens = some_tokens(2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    docs = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).expand(2, -1)
    packed = logits_of(model, tokens, Placement.packed(positions, docs))
    alone = torch.cat([logits_of(model, part) for part in tokens.split(lengths, dim=1)], dim=1)
    check_close(packed, alone, 1e-5, "documents in one window and each alone")
    parameters = list(model.parameters())
    found, expected = (
        torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True) for logits in (packed, alone)
    )
    check_gradients(found, expected, tolerance=1e-4)


def check_gradients(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> None:
    """An indexer's are None: it learns by a loss of its own. Each is relative to its own largest number or a thousandth
    of the largest of all: some are zero but for rounding, as that of a bias on keys, which softmax does not see."""
    assert [grad is None for grad in found] == [exact is None for exact in expected]
    found, expected = ([grad for grad in grads if grad is not None] for grads in (found, expected))
    largest = max(float(exact.abs().max()) for exact in expected)
    for grad, exact in zip(found, expected, strict=True):
        error = float((grad - exact).abs().max())
        assert error <= tolerance * max(float(exact.abs().max()), largest / 1000), (grad.shape, error)
