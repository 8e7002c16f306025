"""Runs that older versions made go on and write as they did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from generation.sampler import Sampler
from tests.compatibility.make import CASES, HERE, TOKENS, losses_after, machine, sampled, texts, train
from training.run.migrate import FORMAT, UNSTATED

RUNS = sorted((path.parent for path in HERE.glob("*/*/expected.json")), key=lambda run: (int(run.parent.name[7:]), run))
# Without these, too, every attention is there with every optimizer, and every optimizer in every precision.
SELDOM = {
    f"{attention}_{rest}"
    for attention, rest in (
        *(("mha", rest) for rest in ("adamw_bf16", "adamw_fp16", "muon_fp16")),
        *(("mla", rest) for rest in ("adamw_fp32", "muon_bf16", "muon_fp16")),
        *(("stack", rest) for rest in ("adamw_bf16", "adamw_fp16", "muon_bf16", "muon_fp32")),
    )
}
FP32, REST = 1e-5, 0.1  # nats, on another machine; Muon multiplies in bfloat16 where the processor can, else in float32


def often() -> set[Path]:
    """The newest run of each case, and one of each format; the others are slow."""
    common = [run for run in RUNS if run.name not in SELDOM]  # from the oldest format to the newest
    return {*{run.name: run for run in common}.values(), *{run.parent: run for run in common}.values()}


@pytest.fixture
def run(request, workplace) -> Path:
    """A copy of a stored run, beside the texts that some were trained on."""
    texts(Path("texts"))
    return Path(shutil.copytree(request.param, "run"))


@pytest.mark.parametrize(
    "run",
    [pytest.param(path, marks=[] if path in often() else pytest.mark.slow) for path in RUNS],
    indirect=True,
    ids=[f"{path.parent.name}-{path.name}" for path in RUNS],
)
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
    train(["resume=run", *repeated], monkeypatch, case)
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
