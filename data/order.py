"""Order: which windows of a text the sequences of a training run are, worked out a section at a time.

Sequence g, counted over the whole training, is one window: epoch g // N is a permutation of all N of them, sorted by a
hash of (seed, epoch, window). Libraries may change their shuffles; integer arithmetic gives the same order everywhere.
Hashes are spread evenly, so those of one range are a section of the order that can be sorted without the rest: the
longest text takes the memory of a section, and no step waits until all of it is sorted.
"""

import functools
from collections.abc import Iterator

import numpy as np

SECTION = 2**20  # the most windows that a section has on average
CHUNK = 2**16  # windows hashed at one time, which stay in the processor's cache


def windows_of(n: int, seed: int, first: int, count: int) -> list[int]:
    """The windows of sequences first ... first + count - 1, of n windows."""
    found: list[int] = []
    while len(found) < count:
        epoch, rank = divmod(first + len(found), n)
        starts = _section_starts(n, seed, epoch)
        number = int(np.searchsorted(starts, rank, side="right")) - 1
        start = rank - int(starts[number])
        found += _section(n, seed, epoch, number)[start : start + count - len(found)].tolist()
    return found


@functools.lru_cache(maxsize=4)
def _section_starts(n: int, seed: int, epoch: int) -> np.ndarray:
    """The rank in the epoch of each section's first window, (sections + 1,)."""
    sizes = np.zeros(_sections(n), np.int64)
    for _, hashes in _hashed(n, seed, epoch):
        sizes += np.bincount(_section_of(hashes, n), minlength=len(sizes))
    return np.concatenate(([0], sizes.cumsum()))


@functools.lru_cache(maxsize=4)
def _section(n: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """The windows of a section, in their order."""
    windows = []
    hashes = []
    for some, their in _hashed(n, seed, epoch):
        inside = _section_of(their, n) == number
        windows.append(some[inside])
        hashes.append(their[inside])
    return np.concatenate(windows)[np.concatenate(hashes).argsort()]  # no two hashes are equal: _mix is a bijection


def _hashed(n: int, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All windows, CHUNK at a time, and the hashes that sort them."""
    key = _mix(np.array([seed], np.uint64)) + np.uint64(epoch)
    for start in range(0, n, CHUNK):
        windows = np.arange(start, min(start + CHUNK, n), dtype=np.uint64)
        yield windows, _mix(_mix(key) ^ windows)


def _sections(n: int) -> int:
    return n // SECTION + 1


def _section_of(hashes: np.ndarray, n: int) -> np.ndarray:
    """The section of each hash: equal ranges of hashes, the lowest first."""
    half = np.uint64(32)
    return ((hashes >> half) * np.uint64(_sections(n)) >> half).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection that looks random. Wraps around 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
