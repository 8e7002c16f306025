"""What is saved comes back, bit for bit; what is damaged or does not belong is refused in one line."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import UserError
from model.kernels.sdpa import SDPA
from tests.support import ATTENTIONS, ROOT, call, load_composed, relative_error, some_tokens
from training.checkpoint import latest, load_run
from training.log import read_metrics

SMOKE = ["experiment=smoke", "tune_malloc=false"]
TRAINED = [*SMOKE, "attention=mla", "steps=6", "eval_every=3", "save_every=3"]


def metrics(folder) -> dict[int, float]:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # every step once
    return {row["step"]: (row["train_loss"], row.get("val_loss"), row["lr"]) for row in rows}


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stopped_and_resumed_is_the_same_run(workplace, monkeypatch, attention, precision):
    options = [
        *SMOKE,
        f"attention={attention}",
        f"precision={precision}",
        "steps=12",
        "micro_batch_size=4",
        "save_every=5",
    ]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    shutil.copytree("whole", "killed")  # as a kill after step 8 would leave it
    shutil.rmtree("killed/checkpoints/step_00000010")
    shutil.rmtree("killed/checkpoints/step_00000012")
    assert call("train", ["resume=killed"], monkeypatch) == 0
    whole, killed = workplace / "whole", workplace / "killed"
    assert metrics(whole) == metrics(killed)
    expected, found = weights(whole, 12), weights(killed, 12)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 6 steps, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.chdir(folder)
        assert call("train", [*TRAINED, "run_dir=run"], patch) == 0
    return folder / "run"


@pytest.fixture
def run(trained, workplace):
    """A copy of it, to damage; the cache of shards beside it."""
    shutil.copytree(trained.parent, workplace, dirs_exist_ok=True)
    return workplace / "run"


def test_the_folder_holds_what_it_promises(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "environment.yaml", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints"}
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"tokens", "train_loss", "lr", "tokens_per_second"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert rows[-1]["val_bpb"] > 0 and rows[-1]["tokens"] == 6 * 1024
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loaded_weights_are_the_saved_ones_and_run_as_asked(run):
    model, tokenizer = load_run(run)
    assert tokenizer.vocab_size == 257
    saved = load_file(latest(run) / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    tokens = some_tokens(1, 20)
    for execution in ("naive", "expanded", "absorbed"):
        other, _ = load_run(run, kernel=SDPA(), execution=execution)
        with torch.no_grad():
            assert relative_error(other(tokens).logits, model(tokens).logits) <= 1e-4


def test_a_refused_resume_leaves_the_run_as_it_was(run, monkeypatch):
    before = (run / "config.yaml").read_text()
    assert call("train", ["resume=run", "steps=3"], monkeypatch) == 2
    cut(latest(run) / "optimizer.safetensors")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert (run / "config.yaml").read_text() == before


def test_latest_is_the_run_touched_last(run, monkeypatch, capsys):
    shutil.copytree(run, "runs/older")
    shutil.copytree(run, "runs/newer")
    for name, when in (("older", 1), ("newer", 2)):
        os.utime(f"runs/{name}/config.yaml", (when, when))
    assert call("train", ["resume=latest", "steps=7"], monkeypatch) == 0
    assert "resuming runs/newer after step 6" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_an_optimizer_that_does_not_fit_is_refused(run, monkeypatch, capsys, fault):
    path = latest(run) / "optimizer.safetensors"
    tensors = load_file(path)
    name = "norm.weight/exp_avg"
    if fault == "missing":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("norm.weight/")}
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "does not fit this run's optimizer" in capsys.readouterr().err


def test_a_config_whose_batches_are_not_the_runs_is_refused(run, monkeypatch, capsys):
    edit(run / "config.yaml", "batch_tokens: 1024", "batch_tokens: 2048")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "has seen 96 windows in 6 steps" in capsys.readouterr().err


def test_rows_are_written_before_the_checkpoint_that_follows_them(workplace, monkeypatch):
    """A kill right after saving must find every row up to there."""
    seen = []

    def spy(folder, model, optimizer, step, *rest):
        seen.append((step, [row["step"] for row in read_metrics(folder / "metrics.jsonl")]))

    monkeypatch.setattr("training.report.FLUSH_SECONDS", 1e9)
    monkeypatch.setattr("training.checkpoint.save", spy)
    assert call("train", [*SMOKE, "steps=7", "save_every=3", "eval_every=100", "run_dir=run"], monkeypatch) == 0
    assert seen == [(3, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (7, [1, 2, 3, 4, 5, 6, 7])]


def test_killed_for_real_and_resumed_it_is_the_same_run(workplace, monkeypatch):
    options = [*SMOKE, "attention=mla", "steps=120", "save_every=10", "eval_every=50", "micro_batch_size=8"]
    assert call("train", [*options, "run_dir=whole"], monkeypatch) == 0
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *options, "run_dir=killed"], stderr=subprocess.PIPE)
    while process.poll() is None and not list((workplace / "killed").glob("checkpoints/step_*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    killed, whole = workplace / "killed", workplace / "whole"
    assert 0 < len(read_metrics(killed / "metrics.jsonl")) < 120, "it should have been killed midway"
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert metrics(whole) == metrics(killed)
    expected, found = weights(whole, 120), weights(killed, 120)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_previews_do_not_change_training(run, monkeypatch):
    assert call("train", [*TRAINED, "sample_every=2", "run_dir=watched"], monkeypatch) == 0
    expected, found = weights(run, 6), weights(run.parent / "watched", 6)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_diverged_run_stops_in_one_line(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "optim.lr=1e30", "clip_norm=0", "run_dir=run"], monkeypatch) == 2
    assert "training has diverged" in capsys.readouterr().err
    assert all(row["train_loss"] < 1e9 for row in read_metrics(workplace / "run" / "metrics.jsonl"))


def test_resuming_goes_on_to_more_steps_and_drops_rows_of_a_lost_future(run, monkeypatch):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "train_loss": 9.9}) + '\n{"step": 8, "tr')
    assert call("train", ["resume=run", "steps=8"], monkeypatch) == 0
    assert list(metrics(run)) == list(range(1, 9))
    assert metrics(run)[7][0] != 9.9
    assert "steps: 8" in (run / "config.yaml").read_text()


def test_resuming_a_run_without_a_checkpoint_starts_at_step_0_and_says_so(run, monkeypatch, capsys):
    shutil.rmtree(run / "checkpoints")
    assert call("train", ["resume=run"], monkeypatch) == 0
    assert "starting at step 0" in capsys.readouterr().err
    assert list(metrics(run)) == [1, 2, 3, 4, 5, 6]


def swap_tokenizer(run):
    load_composed("tokenizer=bpe")
    (run / "tokenizer.json").write_text(json.dumps({"kind": "byte", "hash": "0"}))


FAULTS = {
    "weights cut short": (lambda run: cut(latest(run) / "model.safetensors"), "model.safetensors is damaged"),
    "no state": (lambda run: (latest(run) / "state.json").unlink(), "state.json cannot be read"),
    "state cut short": (lambda run: cut(latest(run) / "state.json"), "state.json is damaged"),
    "newer format": (lambda run: edit(latest(run) / "state.json", '"version": 1', '"version": 9'), "format version 9"),
    "tokenizer edited": (swap_tokenizer, "tokenizer.json is damaged"),
    "other tokenizer": (
        lambda run: edit(latest(run) / "state.json", '"tokenizer": "', '"tokenizer": "f'),
        "is not the tokenizer of its tokens",
    ),
    "other shape": (lambda run: edit(run / "config.yaml", "d_model: 64", "d_model: 32"), "does not fit"),
    "config cut short": (lambda run: (run / "config.yaml").write_text("model: [1,"), "config.yaml cannot be read"),
    "config of nothing": (lambda run: (run / "config.yaml").write_text(""), "holds no settings"),
    "config that calls": (
        lambda run: edit(run / "config.yaml", "model.attention.mla.MLAConfig", "os.system"),
        "does not name a AttentionConfig",
    ),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("damage", "complaint"), FAULTS.values(), ids=FAULTS)
def test_a_run_that_cannot_be_loaded_is_one_line(run, damage, complaint, monkeypatch, capsys):
    damage(run)
    with pytest.raises(UserError, match=complaint):
        load_run(run)
    assert call("sample", ["x", "--run", "run"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_run_goes_on_only_with_its_own_data(workplace, monkeypatch, capsys):
    (workplace / "a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    options = [*SMOKE, "data=files", "data.path=a.txt", "steps=4", "save_every=2", "run_dir=run"]
    assert call("train", options, monkeypatch) == 0
    (workplace / "a.txt").write_text("".join(f"row {i}\n" for i in range(3000)))
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=6"], monkeypatch) == 2
    assert "documents of run have changed" in capsys.readouterr().err


def test_only_a_few_settings_may_change_on_resume(run, monkeypatch, capsys):
    for change in ("~steps", "seed=3", "optim.lr=1", "attention=mha", "batch_tokens=64"):
        assert call("train", ["resume=run", change], monkeypatch) == 2
        assert "cannot change on resume" in capsys.readouterr().err
    assert call("train", ["resume=run"], monkeypatch) == 2
    assert "complete at step 6 of steps=6: give a larger steps=" in capsys.readouterr().err
    assert call("train", ["resume=elsewhere"], monkeypatch) == 2
    assert "elsewhere is not a run" in capsys.readouterr().err
