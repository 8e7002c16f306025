"""The order of windows: sections of it are those of the whole, sorted at once."""

from itertools import chain

import numpy as np
import pytest

from data import order
from data.order import windows_of


def whole_epoch(n: int, seed: int, epoch: int) -> list[int]:
    """The naive twin: all windows, sorted by their hashes in Python's own integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = mix((mix(seed) + epoch) % 2**64)
    return sorted(range(n), key=lambda window: mix(key ^ window))


@pytest.fixture
def small_sections(monkeypatch):
    """Sections of four windows, three of which are hashed at one time."""

    def forget():
        order._section.cache_clear()
        order._section_starts.cache_clear()

    forget()
    monkeypatch.setattr(order, "SECTION", 4)
    monkeypatch.setattr(order, "CHUNK", 3)
    yield
    forget()


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_windows_of_equals_the_whole_epoch_sorted(n):
    for seed in (0, 7):
        expected = [window for epoch in range(3) for window in whole_epoch(n, seed, epoch)]
        assert windows_of(n, seed, 0, 3 * n) == expected


@pytest.mark.parametrize("n", [1, 3, 4, 5, 40, 101])
def test_windows_of_in_sections_equals_the_whole_epoch_sorted(n, small_sections):
    expected = [window for epoch in range(4) for window in whole_epoch(n, 5, epoch)]
    for count in (1, 3, n):  # begins and ends within sections, and on the edges of epochs
        found = [windows_of(n, 5, first, count) for first in range(0, 3 * n, count)]
        assert [len(part) for part in found] == [count] * len(found)
        assert list(chain.from_iterable(found)) == expected[: count * len(found)]


def test_windows_of_a_long_text_takes_the_memory_of_a_section():
    n = 3 * order.SECTION + 5
    found = windows_of(n, 3, 2 * n - 2, 5)  # the end of one epoch and the beginning of the next
    section, sections = order._section(n, 3, 2, 0), order._sections(n)
    assert sections == 4 and len(section) == pytest.approx(n / sections, rel=0.01)
    key = order._mix(order._mix(np.array([3], np.uint64)) + np.uint64(2))
    hashes = order._mix(key ^ np.arange(n, dtype=np.uint64))
    assert found[2:] == np.argsort(hashes)[:3].tolist()
