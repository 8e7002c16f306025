"""Limits of memory as Linux states them, in trees of files like its own."""

import pytest
import torch

from runtime import memory
from runtime.memory import memory_left

GIB = 2**30


def group(root, place: str, version: int, limit: object, used: int, files: int) -> None:
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {files}\n")


def member(root, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_memory_left_in_nested_groups_is_that_of_the_tightest(tmp_path):
    member(tmp_path, "0::/user/job\n")
    group(tmp_path, "user/job", 2, "max", 2 * GIB, 0)
    assert memory_left(tmp_path) is None
    group(tmp_path, "user", 2, 8 * GIB, 3 * GIB, 1 * GIB)
    assert memory_left(tmp_path) == 6 * GIB
    group(tmp_path, "user/job", 2, 4 * GIB, 3 * GIB, 0)
    assert memory_left(tmp_path) == 1 * GIB
    group(tmp_path, "user/job", 2, 4 * GIB, 5 * GIB, 0)
    assert memory_left(tmp_path) == 0


def test_memory_left_in_a_version_1_group_of_a_container_is_read(tmp_path):
    member(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    group(tmp_path, "memory", 1, 8 * GIB, 5 * GIB, 2 * GIB)
    group(tmp_path, "cpu", 1, 1, 1, 0)
    assert memory_left(tmp_path) == 5 * GIB


@pytest.mark.parametrize("lines", [None, "", "4:memory:/job\n0::/job\n"])
def test_memory_left_without_a_stated_limit_is_none(tmp_path, lines):
    if lines is not None:
        member(tmp_path, lines)
    assert memory_left(tmp_path) is None


def test_free_memory_is_at_most_what_the_group_leaves(monkeypatch):
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or free > 10**6
    monkeypatch.setattr(memory, "memory_left", lambda: 10**6)
    assert memory.free_memory(torch.device("cpu")) == 10**6
    assert memory.free_memory(torch.device("meta")) is None
