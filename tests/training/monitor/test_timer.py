"""Training throughput: what counts as training time."""

from types import SimpleNamespace

import pytest
import torch

from training.monitor.timer import TrainingTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr("training.monitor.timer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_timer_while_paused_counts_no_time(clock):
    timer = TrainingTimer(torch.device("cpu"))
    clock(2.0)
    timer.step(100)
    with timer.paused():
        clock(50.0)
    clock(3.0)
    timer.step(100)
    assert timer.close_interval() == 200 / 5
    clock(1.0)
    timer.step(100)
    assert timer.close_interval() == 100
    assert timer.tokens_per_second == 300 / 6


def test_timer_after_a_restart_forgets_the_interval(clock):
    timer = TrainingTimer(torch.device("cpu"))
    clock(9.0)
    timer.restart()
    clock(1.0)
    timer.step(7)
    assert timer.close_interval() == timer.tokens_per_second == 7


def test_timer_waiting_for_data_is_training_time_and_known_per_step(clock):
    timer = TrainingTimer(torch.device("cpu"))
    waited = []
    for seconds in (1.0, 3.0):
        with timer.waiting_for_data():
            clock(seconds)
        clock(6.0 - seconds)
        waited.append(timer.step(10))
    timer.close_interval()
    assert waited == [1.0, 3.0]
    assert timer.data_share == 4 / 12
