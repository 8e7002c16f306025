"""The benchmark of several processes, in small."""

import json
import sys

import pytest
import torch.distributed as dist

from benchmarks import scale
from common.errors import UserError
from tests.training.parallel.together import forking

SMALL = [*("--models", "mini", "--rounds", "2", "--steps", "1", "--vocab", "100"), "--set", "batch_tokens=512"]


def call(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", *SMALL, *options])
    scale.main()


def test_scale_times_both_plans_in_the_same_processes(workplace, monkeypatch, capfd):
    forking()  # so that no process imports what the others do
    monkeypatch.setattr(scale, "LOOKS", 1)
    call(monkeypatch, "--processes", "1", "2", "--json", "s.json")
    rows = json.loads((workplace / "s.json").read_text())["rows"]
    assert [(row["processes"], row["plan"]) for row in rows] == [(1, "ddp"), (1, "fsdp"), (2, "ddp"), (2, "fsdp")]
    assert [row["x ddp"] == 1 for row in rows] == [True, False, True, False]
    for row in rows:
        assert row["ms"] > 0 and 0 <= int(row["waiting"].removesuffix(" %")) < 100
        if row["processes"] == 1:  # of more, test_memory_of_processes looks often enough
            assert row["predicted"] == pytest.approx(row["MB"], rel=0.01)
    assert int(rows[2]["waiting"].removesuffix(" %")) > 0  # two processes do send
    assert "mini, 2 processes: round 2 of 2" in capfd.readouterr().err  # of a process


def test_scale_refuses_processes_that_cannot_share_a_step_before_it_measures(monkeypatch):
    monkeypatch.setattr("benchmarks.scale.in_processes", None)
    with pytest.raises(UserError, match=r"8 sequences, which 3 processes cannot share evenly"):
        call(monkeypatch, "--processes", "2", "3")


def test_scale_of_a_process_that_fails_says_which():
    def fails(world: scale.ProcessGroup) -> None:
        if world.rank == 1:
            raise ValueError("no more")
        dist.barrier()  # waits for it

    with pytest.raises(UserError, match="rank 1 failed: no more"):
        scale.in_processes(2, fails)
