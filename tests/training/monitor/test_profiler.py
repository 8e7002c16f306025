"""The profiler: which steps its trace shows, whenever the process ends."""

import logging

import pytest
import torch

from training.monitor.profiler import Profile


@pytest.mark.parametrize(
    ("begun", "shown"), [(2, None), (3, None), (4, "14-14"), (5, "14-15"), (6, "14-15"), (9, "14-15")]
)
def test_profile_of_two_steps_shows_those_after_the_first_three(tmp_path, caplog, begun, shown):
    """Of a process that resumed after step 10 and ended after so many steps."""
    profile = Profile(2, tmp_path, torch.device("cpu"), done=10, last=100)
    profile.start()
    with caplog.at_level(logging.INFO, logger="headroom"):
        for _ in range(begun):
            profile.step()
            torch.zeros(1).add(1)
        profile.close()
    assert [path.name for path in tmp_path.iterdir()] == ([f"trace_steps_{shown}.json"] if shown else [])
    assert ("this process ended within the 3 steps before; no trace" in caplog.text) == (shown is None)


def test_profile_that_cannot_write_warns_and_goes_on(tmp_path, caplog):
    profile = Profile(1, tmp_path / "gone", torch.device("cpu"), done=0, last=10)
    profile.start()
    for _ in range(8):
        profile.step()
    profile.close()
    assert caplog.text.count("profile_steps=1 failed, training goes on: ") == 1


def test_profile_of_no_steps_makes_nothing(tmp_path, caplog):
    profile = Profile(0, tmp_path, torch.device("cpu"), done=0, last=10)
    profile.start()
    profile.step()
    profile.close()
    assert not list(tmp_path.iterdir()) and not caplog.text
