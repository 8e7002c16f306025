"""The memory bandwidth that is measured is one that a machine may have."""

import torch

from runtime import bandwidth
from runtime.bandwidth import seconds_per_byte


def test_seconds_per_byte_is_between_those_of_a_disk_and_of_a_cache(monkeypatch):
    monkeypatch.setattr(bandwidth, "READ", 40_000_000)
    assert 1e8 < 1 / seconds_per_byte(torch.device("cpu")) < 1e13
