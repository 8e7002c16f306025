"""What a run is said to cost, held against what it costs."""

import gc
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import cost
from model.transformer import TransformerLM
from tests.support import ATTENTIONS, SMOKE, call, load_composed, some_tokens
from training.dry_run import memory
from training.log import clock
from training.precision import Working
from training.step import accumulate

VOCAB = 100


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("options", ["precision=fp32", "precision=bf16", "model.dropout=0.1", "kernel=naive"])
def test_the_peak_memory_is_what_the_allocator_says(tmp_path, attention, options):
    """Within 1 %, asking PyTorch's allocator of a CPU for every block it gave and took back."""
    run = load_composed(*SMOKE, f"attention={attention}", "precision=fp32", "micro_batch_size=4", options)
    tokens = some_tokens(4, 64, VOCAB)
    predicted = memory(run, VOCAB)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        working = Working(TransformerLM(run.model, VOCAB), run.precision)
        accumulate(working, [(tokens, tokens)] * 2, (0, 0))
    assert predicted["weights"] == predicted["gradients"] == sum(p.grad.nbytes for p in working.parameters)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    alive = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    assert sum(predicted.values()) - predicted["optimizer"] == pytest.approx(peak, rel=0.01)


def test_the_state_of_the_optimizer_is_what_it_keeps():
    run = load_composed(*SMOKE)
    model = TransformerLM(run.model, VOCAB)
    optimizer = run.optim.build(model)
    model(some_tokens(1, 8)).logits.sum().backward()
    optimizer.step()
    kept = sum(part.nbytes for state in optimizer.state.values() for part in state.values() if part.ndim)
    assert run.optim.state_bytes(cost.on_meta(run.model, VOCAB)) == kept


def test_a_dry_run_says_the_costs_and_leaves_no_run(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "dry_run=true", "steps=3000"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "parameters   119,168: embedding 20,480, attention 32,768, mlp 65,536, norms 384, head 0 (tied" in out
    assert "flops        762,624 per token of training, 254,208 forward (7% of it attention, over 32.5 keys" in out
    assert "cache        1,024 bytes per token" in out
    assert "micro-batches of 16 x 64" in out and "optimizer 953 kB" in out
    assert "training     3,000 steps of 1,024 tokens each: 3,072,000 tokens, 33.8 epochs of 90,944" in out
    assert "for 3,000 steps, evaluating and saving not counted: from 10 steps timed on this cpu" in out
    assert [path.name for path in workplace.iterdir()] == ["cache"]


def test_a_dry_run_does_not_change_the_run_it_would_resume(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "steps=20", "run_dir=run"], monkeypatch) == 0
    before = {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=50", "dry_run=true"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "50 steps (20 are done) of" in out and "for 30 steps" in out
    assert {path: path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file()} == before
    assert call("train", ["resume=run", "dry_run=true"], monkeypatch) == 2
    assert "error: 20 steps of this run are done, steps=20: give a larger steps=" in capsys.readouterr().err
    assert call("train", ["resume=run", "steps=21"], monkeypatch) == 0


def test_a_model_beyond_this_machine_is_counted_all_the_same(workplace, monkeypatch, capsys):
    huge = [*SMOKE, "model.d_model=65536", "precision=bf16", "dry_run=true"]
    assert call("train", huge, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "time         n/a: no step can be timed here (it needs" in out
    assert f"mlp {2 * 8 * 65536**2:,}" in out
    assert call("train", [*huge, "peak_flops=1e15"], monkeypatch) == 0
    assert "if 40% of 1e+15 FLOPs per second are reached" in capsys.readouterr().out


def test_a_dry_run_that_meets_too_little_memory_says_so(workplace, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("training.dry_run.train_step", full)
    assert call("train", [*SMOKE, "dry_run=true"], monkeypatch) == 0
    assert "n/a: no step can be timed here (CUDA out of memory. Tried" in capsys.readouterr().out


def test_times_as_a_person_reads_them():
    assert [clock(seconds) for seconds in (0.4, 65, 3599.7, 100_000)] == ["0:00", "1:05", "1:00:00", "27:46:40"]
