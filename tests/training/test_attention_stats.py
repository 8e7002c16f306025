"""log_attention: what is told of attention at each evaluation, and that telling it changes nothing."""

import math

import pytest
import torch

from data.shards.token_files import TokenStream
from tests.support import QUICK, call, small_model, some_tokens
from tests.training.runs import assert_same_run, rewind
from training.attention_stats import attention_stats
from training.metrics_file import read_metrics

OPTIONS = [*QUICK, "model.dropout=0.1", "steps=12", "save_every=5", "eval_every=4", "attention=mla"]
STATISTICS = ("entropy", "lowest_entropy", "max_logit")
NAMES = {f"attention/layer_{i}/{name}" for i in range(2) for name in STATISTICS}


def told(row: dict) -> dict:
    return {key: value for key, value in row.items() if key.startswith("attention/")}


@pytest.fixture
def told_run(workplace, monkeypatch):
    assert call("train", [*OPTIONS, "log_attention=true", "run_dir=told"], monkeypatch) == 0
    return workplace


def test_attention_stats_are_logged_at_each_evaluation_and_change_no_bit(told_run, monkeypatch):
    for row in read_metrics(told_run / "told/metrics.jsonl"):
        assert told(row).keys() == (NAMES if row["step"] in (4, 8, 12) else set())
        for i in range(2 if told(row) else 0):
            entropy, lowest, _ = (row[f"attention/layer_{i}/{name}"] for name in STATISTICS)
            assert 0 <= lowest <= entropy <= math.log(64)
    assert call("train", [*OPTIONS, "run_dir=silent"], monkeypatch) == 0
    assert not any(told(row) for row in read_metrics(told_run / "silent/metrics.jsonl"))
    assert_same_run(told_run / "told", told_run / "silent", step=12)


def test_attention_stats_of_a_resumed_run_are_the_same(told_run, monkeypatch):
    rewind(told_run / "told", told_run / "killed", step=5)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(told_run / "told", told_run / "killed", step=12)
    expected, found = (read_metrics(told_run / name / "metrics.jsonl") for name in ("told", "killed"))
    assert [told(row) for row in found] == [told(row) for row in expected]


def test_attention_stats_can_be_turned_on_when_a_run_is_resumed(workplace, monkeypatch):
    assert call("train", [*QUICK, "steps=5", "run_dir=run"], monkeypatch) == 0
    assert call("train", ["resume=run", "steps=7", "log_attention=true"], monkeypatch) == 0
    assert told(read_metrics(workplace / "run/metrics.jsonl")[-1]).keys() == NAMES


def test_attention_stats_cover_the_first_windows_and_documents_apart():
    model, tokens = small_model("attention=gqa"), some_tokens(1, 16 * 5 + 1)[0]
    tokens[::5] = 99  # begins a document
    stream = TokenStream([tokens.numpy()])
    first = tokens[:32].view(2, 16)
    expected = model(first, collect=frozenset({"entropy", "max_logit"})).aux
    found = attention_stats(model, stream, 16, batch_size=2)
    assert found.keys() == NAMES
    for i in range(2):
        entropy, largest = (expected[f"layers.{i}.{name}"] for name in ("entropy", "max_logit"))
        of_layer = [found[f"attention/layer_{i}/{name}"] for name in STATISTICS]
        assert of_layer == pytest.approx([float(x) for x in (entropy.mean(), entropy.min(), largest.max())])
    assert attention_stats(model, stream, 16, batch_size=500) == attention_stats(model, stream, 16, batch_size=5)
    apart = attention_stats(model, stream, 16, batch_size=2, document_start=99)
    assert all(apart[f"attention/layer_{i}/entropy"] < math.log(5) for i in range(2))
    assert all(found[f"attention/layer_{i}/entropy"] > apart[f"attention/layer_{i}/entropy"] for i in range(2))


def test_attention_stats_of_a_diverged_model_are_nan():
    model, stream = small_model("attention=mla"), TokenStream([some_tokens(1, 40)[0].numpy()])
    with torch.no_grad():
        model.layers[1].attention.o_proj.weight.fill_(math.nan)
        model.layers[0].attention.kv_down.weight.fill_(math.nan)
    assert all(math.isnan(value) for value in attention_stats(model, stream, 16, 2).values())
