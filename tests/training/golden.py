"""Losses of 30 steps on the default corpus, as recorded. AdamW's in float32 are the same on every machine, within
rounding; Muon multiplies its matrices in bfloat16 where the machine can, and in float32 elsewhere. bfloat16 was
recorded on an AMD EPYC; the matrix units of an Intel Xeon sum in another order, and end up to 0.003 nats away.

python -m tests.training.golden      # recomputes them, for a change that is meant to change them
"""

import json
import tempfile
from pathlib import Path

import pytest

from model.score import Score
from tests.support import ATTENTIONS, call
from training.metrics_file import read_metrics

FILE = Path(__file__).with_name("golden.json")
OPTIONS = ["steps=30", "batch_tokens=512", "eval_every=1000", "save_every=1000", "tune_malloc=false"]
OPTIONS += ["model.n_layers=2", "model.d_model=64", "model.context_length=64", "sample_prompt=def "]
OPTIONS += ["tokenizer.cut=line_ends"]  # as they were recorded
CASES = [("adamw", "fp32", attention) for attention in ATTENTIONS]
CASES += [("muon", precision, attention) for precision in ("fp32", "bf16") for attention in ("mha", "mla")]
CASES += [("muon", "bf16", attention, "v1") for attention in ("mha", "mla")]


def losses(case: tuple[str, ...], folder: Path, monkeypatch) -> list[float]:
    """Of `python train.py *OPTIONS optim=... precision=... attention=...`, and experiment=... where the case has one,
    in a folder; the evaluation, which takes longest, is left out."""
    optim, precision, attention, *experiments = case
    name = " ".join(case)
    monkeypatch.setattr("training.session.evaluate", lambda *_, **__: Score(1.0, 1, 1))
    monkeypatch.chdir(folder)
    choice = [f"optim={optim}", f"precision={precision}", f"attention={attention}", f"run_dir={name}"]
    choice += [f"experiment={experiment}" for experiment in experiments]
    assert call("train", [*OPTIONS, *choice], monkeypatch) == 0
    return [row["train_loss"] for row in read_metrics(folder / name / "metrics.jsonl")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        recorded = {" ".join(case): losses(case, Path(name), patch) for case in CASES}
        patch.undo()
        FILE.write_text(json.dumps(recorded, indent=1) + "\n")
