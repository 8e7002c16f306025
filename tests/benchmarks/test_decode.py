"""The benchmarks of decoding, in small: of ours, and of stand-ins for peers."""

import json
import sys

import pytest

from benchmarks import decode, decode_models, one_row, train
from common.errors import UserError
from tests.benchmarks.stand_in import STAND_IN

LITGPT_CONFIG = """
class Config:
    def __init__(self, **settings):
        vars(self).update(settings)
"""
LITGPT_MODEL = """
import torch
from torch import nn
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble
from litgpt.config import Config

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.padded_vocab_size, config.n_embd)})
        self.transformer.h = [nn.Module()]
        self.transformer.h[0].attn = nn.Module()
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def set_kv_cache(self, batch_size, dtype):
        cache = nn.Module()
        cache.k, cache.v = torch.zeros(2, batch_size, 1, self.max_seq_length, self.config.n_embd, dtype=dtype)
        self.transformer.h[0].attn.kv_cache = cache

    def clear_kv_cache(self):
        del self.transformer.h[0].attn.kv_cache

    def forward(self, tokens, positions, input_pos_maxp1):
        assert positions.tolist() == list(range(input_pos_maxp1 - tokens.shape[1], input_pos_maxp1))
        assert input_pos_maxp1 <= self.max_seq_length <= self.config.block_size
        return self.lm_head(self.transformer.wte(tokens))
"""


@pytest.fixture
def place(workplace, monkeypatch):
    (workplace / "model.py").write_text(STAND_IN)
    (workplace / "litgpt").mkdir()
    (workplace / "litgpt/config.py").write_text(LITGPT_CONFIG)
    (workplace / "litgpt/model.py").write_text(LITGPT_MODEL)
    monkeypatch.setitem(train.SIZES, "ii", train.Size(1, 2, 16, tokens=16, batch=2, vocab=65, steps=1))
    monkeypatch.setattr(decode, "seconds_per_byte", lambda device: 1e-10)
    yield workplace
    for name in [name for name in sys.modules if name.partition(".")[0] == "litgpt"]:
        del sys.modules[name]


def measured(monkeypatch, capsys, *options: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["decode", "--new", "4", "--rounds", "1", *options])
    decode.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_decode_rows_of_long_prompts_are_measured_for_all_alike(place, monkeypatch, capsys):
    options = "--contexts 16 64 --batch 1 2 --prefill-up-to 24 --litgpt . --our-sampler --executions expanded"
    names = ["ours mha", "ours mla expanded", "litgpt"]
    rows = measured(monkeypatch, capsys, *options.split(), "--plot", "p.svg", "--only", *names)
    assert len(rows) == 12
    assert [row["model"] for row in rows[:3]] == names
    for row in rows:
        assert (row["first ms"] is None) == (row["context"] == 64)
        assert row["ms"] > 0 and row["cache bytes"] > 0 and row["of the floor"] > 0
    assert "ours mla expanded" in (place / "p.svg").read_text()


def test_decode_peer_without_a_cache_recomputes_short_texts_alone(place, monkeypatch, capsys):
    monkeypatch.setattr(decode_models, "RECOMPUTED", 32)
    rows = measured(
        monkeypatch, capsys, "--contexts", "16", "64", "--batch", "1", "--nanogpt", ".", "--only", "nanoGPT"
    )
    assert [(row["context"], row["cache bytes"]) for row in rows] == [(16, 0)]


def test_decode_cache_that_would_fill_the_memory_is_skipped(place, monkeypatch, capsys):
    monkeypatch.setattr(decode, "free_memory", lambda device: 50_000)
    rows = measured(monkeypatch, capsys, "--contexts", "64", "--batch", "1", "8", "--only", "ours mha")
    assert [row["batch"] for row in rows] == [1]
    with pytest.raises(UserError, match="nothing was measured"):
        measured(monkeypatch, capsys, "--contexts", "64", "--batch", "8", "--only", "ours mha")
    assert "batch 8, context 64: skipped" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--new", "1"], ["--contexts", "4"]])
def test_decode_too_few_tokens_are_refused(place, monkeypatch, capsys, options):
    with pytest.raises(UserError, match="give"):
        measured(monkeypatch, capsys, *options)


def test_one_row_times_few_rows_in_each_form_beside_the_rule(workplace, monkeypatch):
    monkeypatch.setattr(one_row, "SHAPES", ((64, 16), (16, 64)))
    monkeypatch.setattr(one_row, "BYTES", 1e4)
    monkeypatch.setattr(sys, "argv", ["one_row", "--rounds", "1", "--json", "rows.json"])
    one_row.main()
    rows = json.loads((workplace / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * len(one_row.ROWS)
    for row in rows:
        assert (row["mv, rows"] is None) == (row["rows of x"] > 1)
        assert row["product x best"] >= 1 and row["rule"].endswith(("rows", "columns"))
