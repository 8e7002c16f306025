"""The measurements for a GPU, in small on a CPU: what fails is a row, and no section outlasts its time."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.side_by_side import output
from benchmarks.smoke import verdict
from common.errors import Unsupported, UserError
from tests.benchmarks.stand_in import STAND_IN


def rows(monkeypatch, workplace, *options: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--out", "rows.jsonl", *options])
    gpu.main()
    first, *found = map(json.loads, (workplace / "rows.jsonl").read_text().splitlines())
    assert first["section"] == "environment"
    return found


def test_gpu_training_is_measured_beside_nanogpt(workplace, monkeypatch):
    (workplace / "model.py").write_text(STAND_IN)
    found = rows(monkeypatch, workplace, "training", "--nanogpt", ".")
    assert [row["attention"] for row in found] == ["mha", "nanoGPT", "gqa", "mla"]
    assert all(row["loss_is_finite"] and row["tokens_per_second"] > 0 for row in found)


def test_gpu_variant_that_the_device_lacks_is_a_row_that_says_why(workplace, monkeypatch):
    found = {row["variant"]: row for row in rows(monkeypatch, workplace, "variants") if row["attention"] == "mla"}
    assert found["bf16"]["tokens_per_second"] > 0
    for variant in ("fp8", "FA3", "FA4", "cudnn"):
        assert "refused" in found[variant], variant


def test_gpu_decoding_is_measured_in_every_way(workplace, monkeypatch):
    found = rows(monkeypatch, workplace, "decoding", "executions", "long_prompts")
    assert not [row for row in found if "failed" in row or "refused" in row]
    by_section = {name: [row for row in found if row["section"] == name] for name in ("decoding", "executions")}
    assert all(row["first_token_ms"] > 0 and row["ms"] > 0 for row in by_section["decoding"])
    at_once = {row["attention"]: row for row in by_section["executions"] if row["texts"] == 1}
    held = {name: row["cache_bytes_per_token"] for name, row in at_once.items()}
    assert held["mla absorbed"] == held["mla expanded"] < held["gqa"] < held["mha"] == held["mla naive"]
    assert all(row["peak_mb"] > row["cache_mb"] for row in found if row["section"] == "long_prompts")


def test_output_relative_path_is_made_absolute(workplace):
    assert output("rows.jsonl") == workplace / "rows.jsonl"


@pytest.mark.slow
def test_smoke_on_a_cpu_passes(workplace, monkeypatch):
    *tried, summary = rows(monkeypatch, workplace, "--smoke")
    assert summary["passed"], summary
    assert {row["what"] for row in tried} == {"train, resume, sample", "compile", "memory"}


def test_smoke_names_what_failed():
    fine = {"attention": "mha", "learns": True, "resumed_bit_for_bit": True, "ratio": 1.05}
    assert verdict([fine, {"attention": "mla", "largest_difference": 0.01}]) == {"passed": True, "failures": []}
    wrong = [fine | {"resumed_bit_for_bit": False}, fine | {"ratio": 1.2}, {"attention": "mqa", "failed": "no"}]
    found = verdict(wrong)
    assert not found["passed"] and len(found["failures"]) == 3
    assert "mha: not resumed_bit_for_bit" in found["failures"]


@pytest.mark.parametrize(
    ("error", "key"),
    [(Unsupported("no"), "refused"), (UserError("no"), "refused"), (RuntimeError("no\nmore"), "failed")],
)
def test_gpu_measurement_that_fails_costs_no_other(error, key):
    def fail() -> None:
        raise error

    assert gpu.attempted({"size": "x"}, fail) == {"size": "x", key: " ".join(str(error).split())}
    assert gpu.attempted({"size": "x"}, lambda y: {"ms": y}, 2) == {"size": "x", "ms": 2}


def test_gpu_section_begins_no_row_that_may_outlast_it(workplace, monkeypatch):
    now = [0.0]

    def slow(scale):
        for i in range(100):
            now[0] += 100
            yield {"row": i}

    monkeypatch.setitem(gpu.SECTIONS, "kernels", slow)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    *measured, last = rows(monkeypatch, workplace, "kernels")
    assert len(measured) == 5 and "stopped" in last and now[0] <= gpu.DEADLINE
