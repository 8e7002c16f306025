"""Numbers as a person reads them."""

from common.console import clock, counted


def test_counted_one_is_singular():
    assert [counted(n, "micro-batch", "micro-batches") for n in (0, 1, 2)] == [
        "0 micro-batches",
        "1 micro-batch",
        "2 micro-batches",
    ]
    assert [counted(n, "step") for n in (1, 2000)] == ["1 step", "2,000 steps"]


def test_clock_seconds_are_minutes_or_hours():
    assert [clock(seconds) for seconds in (0, 125, 3725)] == ["0:00", "2:05", "1:02:05"]
