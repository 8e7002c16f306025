"""Monitor: metrics rows, opening lines, FLOPs and MFU, the profile, out-of-memory advice. None changes the run."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.shards.prepare import prepare
from model import cost
from tests.support import QUICK, SMOKE, call, changed, composed_run
from tests.training.runs import assert_same_run, rewind
from training.measure import Measured
from training.metrics_file import read_metrics
from training.monitor import summary
from training.monitor.mfu import flops_of, peak_flops, peak_of
from training.run.conf_differences import attention_differences


def test_metrics_rows_have_speed_memory_and_mfu(workplace, monkeypatch, capsys):
    options = changed(QUICK, "batch_tokens=1024", "steps=4")
    assert call("train", [*options, "peak_flops=1e12", "run_dir=run"], monkeypatch) == 0
    out, err = capsys.readouterr()
    run = composed_run(*SMOKE)
    for row in read_metrics(workplace / "run/metrics.jsonl"):
        # a token of the byte tokenizer is a byte, but for the end of a document
        assert row["train_bpb"] == pytest.approx(row["train_loss"] / math.log(2), rel=0.02)
        assert row["flops_per_second"] == pytest.approx(
            row["tokens_per_second"] * cost.flops(run.model, 257).training()
        )
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 1e12)
        assert 0 < row["data_seconds"] < 5
        assert 50e6 < row["memory_bytes"] < 50e9
    assert re.search(r"bpb \d\.\d+  [\d,]+ tokens/s  MFU \d+\.\d%  ETA", err)
    assert re.search(r"speed  .* MFU \d+\.\d%, \d+\.\d% of the time waiting for data", out)


def test_progress_line_shows_the_speed_by_which_its_eta_is_told(workplace, monkeypatch):
    monkeypatch.setattr("training.monitor.monitor.FLUSH_SECONDS", 0)  # each step has a speed of its own
    shown = []
    monkeypatch.setattr("training.monitor.progress.ProgressLine.step", lambda _, row, left: shown.append((row, left)))
    assert call("train", [*QUICK, "peak_flops=1e12", "steps=5", "run_dir=run"], monkeypatch) == 0
    assert len({row["tokens_per_second"] for row in read_metrics(workplace / "run/metrics.jsonl")}) == 5
    per_token = cost.flops(composed_run(*SMOKE).model, 257).training()
    for row, seconds_left in shown:
        assert row["tokens_per_second"] * seconds_left == pytest.approx((5 - row["step"]) * 256)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * per_token / 1e12)
    assert [row["step"] for row, _ in shown] == [1, 2, 3, 4, 5]


REPORTED = {
    ("attention=mha",): "MHA, 4 heads with a key and a value each",
    ("attention=mqa",): "MQA, 4 heads on one key and value head",
    ("attention=gqa",): "GQA, 4 heads on 2 key and value heads",
    ("attention=gqa", "attention.n_kv_heads=4"): "MHA, 4 heads with a key and a value each",
    ("attention=mqa", "attention.window=7"): "MQA, 4 heads on one key and value head: window=7",
    ("attention=mla",): "MLA, 4 heads on a latent of 16 and a rotated key of 12",
}
STACK = "layers in turn local, global; local is GQA, 4 heads on 2 key and value heads; global is GQA"


def test_opening_lines_name_the_attention_and_its_kv_heads():
    tokenizer = SimpleNamespace(vocab_size=257)
    corpus = SimpleNamespace(contents="", train=range(90), val=range(9), tokenizer=tokenizer, fingerprint="f" * 20)
    for choice, reported in REPORTED.items():
        run = composed_run(*SMOKE, *choice)
        measured = Measured(1, 2, 3.0, threads=2, attention_differences=attention_differences(run.model))
        lines = summary.opening_lines(run, Path("run"), corpus, "cpu", 0, measured)
        assert f"attention    {reported}" in lines


def test_opening_lines_of_a_run_are_printed(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "attention=stack", "steps=1"], monkeypatch) == 0
    err = capsys.readouterr().err
    assert f"attention    {STACK}" in err and "in a vocabulary of 257," in err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {}),
        (["attention=mla"], {}),
        (["attention=stack"], {}),
        (["attention=dsa"], {}),
        (
            ["attention=gqa", "attention.indexer.top_k=8", "attention.indexer.head_dim=6"],
            {"indexer.top_k": 8, "indexer.head_dim": 6},
        ),
        (["attention=gqa", "attention.n_kv_heads=1"], {}),  # the same as attention=mqa
        (["position=alibi"], {}),
        (["model.qk_norm=false", "attention.qk_bias=false"], {"qk_norm": False, "qk_bias": False}),
        (["attention=mla", "attention.kv_lora_rank=24"], {"kv_lora_rank": 24}),
        (["attention.rope_scaling=yarn", "attention.rope_factor=4"], {"rope_scaling": "yarn", "rope_factor": 4}),
        (["mask=sparse", "attention.window=9", "attention.dilation=2"], {"window": 9, "dilation": 2}),
        (
            ["attention=stack", "attention.parts.local.window=5", "attention.parts.global.qk_norm=false"],
            {"parts.local.window": 5, "parts.global.qk_norm": False},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_attention_differences_are_what_was_set_off_too(overrides, expected):
    assert attention_differences(composed_run(*overrides).model) == expected


def test_flops_document_mask_counts_pairs_within_documents(workplace, monkeypatch):
    assert call("train", [*QUICK, "document_mask=true", "steps=2", "run_dir=run"], monkeypatch) == 0
    run = composed_run(*QUICK)
    counted = flops_of(run.model, prepare(run.data, run.tokenizer, workplace / "cache"), document_mask=True)
    whole = cost.flops(run.model, 257)
    assert counted.per_token == whole.per_token and counted.keys < whole.keys
    for row in read_metrics(workplace / "run/metrics.jsonl"):
        assert row["flops_per_second"] == pytest.approx(row["tokens_per_second"] * counted.training())


def test_mfu_unknown_peak_is_null_and_not_shown(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "steps=3", "run_dir=run"], monkeypatch) == 0
    assert {row["mfu"] for row in read_metrics(workplace / "run/metrics.jsonl")} == {None}
    out, err = capsys.readouterr()
    assert "tokens/s  ETA" in err and "MFU" not in out + err


def test_peak_flops_known_gpu_and_precision_or_none(monkeypatch):
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", "fp32") == 51.2e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert peak_of("Tesla T4", "bf16") is None
    for another in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H20", ""):
        assert peak_of(another, "bf16") is None
    assert peak_flops(torch.device("cpu"), "fp32", None) is None
    assert peak_flops(torch.device("cpu"), "fp32", 7.0) == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(torch.device("cuda"), "bf16", None) == 121e12
    assert peak_flops(torch.device("cuda"), "bf16", 1.0) == 1.0


def test_profile_records_its_steps_and_changes_no_bit(workplace, monkeypatch, capsys):
    options = [*QUICK, "model.dropout=0.1", "steps=12", "save_every=5", "eval_every=4"]
    assert call("train", [*options, "profile_steps=2", "run_dir=whole"], monkeypatch) == 0
    assert "profile of steps 4 to 5 in whole/trace_steps_4-5.json: open it at" in capsys.readouterr().err
    trace = json.loads((workplace / "whole/trace_steps_4-5.json").read_text())["traceEvents"]
    names = [event.get("name") for event in trace]
    assert names.count("aten::_fused_adamw_") % 2 == 0 and "aten::_fused_adamw_" in names and "aten::mm" in names
    rewind(workplace / "whole", workplace / "killed", step=5)
    assert call("train", ["resume=killed", "profile_steps=30", "peak_flops=1e12"], monkeypatch) == 0
    assert (workplace / "killed/trace_steps_9-12.json").is_file()
    line = "profile_steps=30: this process has 7 steps, the first 3 of which are not recorded, so the trace will show 4"
    assert line in capsys.readouterr().err
    assert_same_run(workplace / "whole", workplace / "killed", step=12)


def test_profile_failure_is_a_warning(workplace, monkeypatch, capsys):
    def broken(**_):
        raise RuntimeError("no profiler\nhere")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    assert call("train", [*QUICK, "steps=5", "profile_steps=1"], monkeypatch) == 0
    assert "profile_steps=1 failed, training goes on: no profiler\n" in capsys.readouterr().err
    assert call("train", [*QUICK, "steps=2", "profile_steps=1"], monkeypatch) == 0
    assert "the first 3 of which are not recorded, so the trace will show none\n" in capsys.readouterr().err


OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")
OF_THE_SYSTEM = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("error", "sequences", "micro_batch", "advice"),
    [
        (OF_A_GPU, 16, 16, "try micro_batch_size=8,"),
        (OF_THE_SYSTEM, 15, 15, "try micro_batch_size=5,"),
        (MemoryError(), 15, 1, "take a smaller model or a sh"),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory_names_a_smaller_micro_batch_size(
    workplace, monkeypatch, capsys, error, sequences, micro_batch, advice
):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("training.step.train_step", full)
    sizes = ["data.size=40", f"batch_tokens={64 * sequences}", f"micro_batch_size={micro_batch}"]
    assert call("train", [*SMOKE, *sizes], monkeypatch) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"not enough memory for micro_batch_size={micro_batch}: {advice}" in line and "More advice" not in line
