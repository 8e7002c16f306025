"""Runs that older versions made go on and write as they did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from generation.sampler import Sampler
from tests.compatibility.make import CASES, HERE, TOKENS, losses_after, machine, sampled, texts
from tests.support import call
from training.run.migrate import FORMAT, UNSTATED

RUNS = sorted(path.parent for path in HERE.glob("*/*/expected.json"))
FP32, REST = 1e-5, 0.1  # nats, on another machine; Muon multiplies in bfloat16 where the processor can, else in float32


@pytest.fixture
def run(request, workplace) -> Path:
    """A copy of a stored run, beside the texts that some were trained on."""
    texts(Path("texts"))
    return Path(shutil.copytree(request.param, "run"))


@pytest.mark.parametrize("run", RUNS, indirect=True, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_stored_run_samples_and_resumes_as_recorded(run, request, monkeypatch):
    case = request.node.callspec.params["run"].name
    expected = json.loads((run / "expected.json").read_text())
    same_machine = expected["machine"] == machine() and torch.get_num_threads() == 1
    written = {
        "greedy": sampled(run, Sampler(temperature=0.0)),
        "drawn": sampled(run, Sampler(temperature=0.8, top_k=50)),
    }
    if same_machine:
        assert written == {name: expected[name] for name in written}
    assert [len(tokens) for tokens in written.values()] == [TOKENS, TOKENS]
    repeated = [override for override in CASES[case] if override.startswith("data.path=")]  # of a folder from elsewhere
    assert call("train", ["resume=run", *repeated], monkeypatch) == 0
    losses = losses_after(run)
    if same_machine:
        assert losses == expected["losses"]
    else:
        config = json.loads(next(run.glob("checkpoints/*/manifest.json")).read_text())["config"]
        exact = config["precision"] == "fp32" and "Muon" not in config["optim"]["_target_"]
        assert losses == pytest.approx(expected["losses"], abs=FP32 if exact else REST)


def test_stored_runs_cover_every_format():
    names = {f"format_{number}" for number in range(UNSTATED, FORMAT + 1)}
    assert {path.parent.name for path in RUNS} == names
    assert {path.name for path in RUNS} == CASES.keys()
