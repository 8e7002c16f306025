"""Losses of 30 steps on the default corpus, as recorded: the same on every machine, within rounding. They are AdamW's:
Muon multiplies its matrices in bfloat16 where the machine can, and in float32 elsewhere.

python -m tests.training.golden      # computes them anew, for a change that is meant to change them
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.support import ATTENTIONS, call
from training.log import read_metrics
from training.step import Score

FILE = Path(__file__).with_name("golden.json")
OPTIONS = ["precision=fp32", "steps=30", "batch_tokens=512", "eval_every=1000", "save_every=1000", "tune_malloc=false"]
OPTIONS += ["optim=adamw", "model.n_layers=2", "model.d_model=64", "model.context_length=64", "sample_prompt=def "]
OPTIONS += ["tokenizer.cut=line_ends"]  # as they were recorded


def losses(attention: str, folder: Path, monkeypatch) -> list[float]:
    """Of `python train.py *OPTIONS attention=...` in a folder; the evaluation, which takes longest, is left out."""
    monkeypatch.setattr("training.step.evaluate", lambda *_: Score(1.0, 1, 1))
    monkeypatch.chdir(folder)
    assert call("train", [*OPTIONS, f"attention={attention}", f"run_dir={attention}"], monkeypatch) == 0
    return [row["train_loss"] for row in read_metrics(folder / attention / "metrics.jsonl")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        recorded = {attention: losses(attention, Path(name), patch) for attention in ATTENTIONS}
        patch.undo()
        FILE.write_text(json.dumps(recorded, indent=1) + "\n")
