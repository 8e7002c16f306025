"""init_from: another run's weights, model and tokenizer; new data, a fresh optimizer."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.invocation import command
from model.score import Score
from tests.support import QUICK, SMOKE, TINY, call, changed, composed_run
from tests.training.runs import assert_same_run, losses, rewind
from training.epochs import repetition_warnings
from training.run import checkpoint
from training.run.load import load_run
from training.run.start import first_state

TEXT = "".join(f"The {i}th line of quite another text, with words such as zeppelin.\n" for i in range(900))
BASE = [*changed(QUICK, "batch_tokens=512"), "attention=mla", "tokenizer=bpe", "tokenizer.vocab_size=300"]
BASE += ["run_dir=base"]
TUNED = [*SMOKE, "init_from=base", "data=files", "data.path=a.txt", "steps=12", "save_every=5", "eval_every=6"]
TUNED += ["batch_tokens=256"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run to begin from, what it read, and other texts."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("a.txt").write_text(TEXT)
        assert call("train", BASE, patch) == 0
    return folder


@pytest.fixture
def base(trained, workplace):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    return workplace / "base"


def test_fine_tuning_begins_with_the_weights_of_the_base(base, workplace, monkeypatch, capsys):
    assert call("train", [*TUNED, "optim.lr=1e-30", "optim.muon_lr=1e-30", "run_dir=still"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "loaded the weights of base/checkpoints/step_00000030" in err
    first, *_, last = losses(workplace / "still")
    assert first[0] == 0 and first[4] == pytest.approx(last[4], rel=1e-3)  # it was scored before the first step
    assert f"\nbefore step 1: validation {first[4]:.4f} nats per token" in err
    assert re.search(
        rf"\nbefore +{first[4]:.4f} nats per token, .*; now {first[4]:.4f} and .*, which is no better "
        r"\(both on the first 4,096 tokens of the validation set\)\n",
        out,
    )
    (before, tokenizer), (after, its) = load_run("base"), load_run("still")
    assert tokenizer.hash == its.hash
    for name, tensor in after.state_dict().items():
        assert torch.allclose(tensor, before.state_dict()[name], atol=1e-6), name


def test_best_checkpoint_that_is_not_the_last_is_kept_and_named(workplace, monkeypatch, capsys):
    scores = iter([Score(nats, 1, 1) for nats in (5.0, 3.0, 1.0, 2.0, 2.0)])  # before, at 2, 4, 6, and the rest
    monkeypatch.setattr("training.session.evaluate", lambda *_, **__: next(scores))
    options = changed(TINY, "steps=6", "eval_before=true", "keep_last=1", "run_dir='a run'")
    assert call("train", options, monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        "before       5.0000 nats per token, 7.2135 bits per byte; now 2.0000 and 2.8854, which is better (both on the "
        in out
    )
    assert "best         step 4, 1.0000 nats per token (on the first 1 token of the validation set): " in out
    assert f"{command('sample.py', '--checkpoint', 'best', '--run', 'a run')}\n" in out
    kept = [path.name for path in checkpoint.checkpoint_paths(workplace / "a run")]
    assert kept == ["step_00000004", "step_00000006"]
    assert [row[4] for row in losses(workplace / "a run") if row[4]] == [5.0, 3.0, 1.0, 2.0]


def test_repetition_warnings_name_the_steps_that_are_enough():
    def reported(*overrides: str, tokens: int = 100_000, done: int = 0) -> list[str]:
        return list(repetition_warnings(composed_run(*overrides), SimpleNamespace(train=range(tokens)), done))

    assert reported("steps=390") == []  # windows of 256: 99,840 tokens, of which 4 epochs are 390 steps
    (line,) = reported("steps=25_000")
    assert "is read 256 times" in line and "give steps=390, which makes 4 epochs, or more text" in line
    (line,) = reported("steps=25_000", done=390)
    assert line.endswith("gets worse: give more text")
    batch, often = reported("steps=4", "batch_tokens=131072")
    assert "batch_tokens=131072 is more than the 99840 tokens of the training text" in batch
    assert "is read 5.25 times" in often and "steps=3," in often


def test_fine_tuning_starts_with_a_lower_loss_than_the_base(base, workplace, monkeypatch):
    tuned = [*QUICK, "init_from=base", "data.seed=7", "steps=3", "run_dir=tuned"]
    assert call("train", tuned, monkeypatch) == 0
    first = losses(workplace / "tuned")[1][1]
    assert first < losses(base)[0][1] / 2


def test_fine_tuning_with_or_without_checkpoint_resumes_bit_for_bit(base, workplace, monkeypatch):
    assert call("train", [*TUNED, "run_dir=whole", "model.dropout=0.1"], monkeypatch) == 0
    for step in (5, 0):
        rewind(workplace / "whole", workplace / f"killed{step}", step)
        assert call("train", [f"resume=killed{step}"], monkeypatch) == 0
        assert_same_run(workplace / "whole", workplace / f"killed{step}", step=12)


def test_fine_tuning_with_a_shorter_context_is_allowed(base, workplace, monkeypatch):
    assert call("train", [*TUNED, "model.context_length=32", "run_dir=short"], monkeypatch) == 0
    assert load_run("short")[0].config.context_length == 32


def test_fine_tuning_with_a_longer_context_stretches_the_rotation(base, workplace, monkeypatch):
    longer = ["model.context_length=128", "attention.rope_scaling=yarn", "attention.rope_factor=2"]
    assert call("train", [*TUNED, *longer, "run_dir=long"], monkeypatch) == 0
    attention = load_run("long")[0].config.attention
    assert (attention.rope_scaling, attention.rope_factor, attention.rope_original_context) == ("yarn", 2.0, 64)


def test_fine_tuning_with_learned_positions_refuses_another_context(workplace, monkeypatch, capsys):
    Path("a.txt").write_text(TEXT)
    assert call("train", [*BASE, "position=learned", "steps=1"], monkeypatch) == 0
    assert call("train", [*TUNED, "model.context_length=32", "run_dir=no"], monkeypatch) == 2
    assert "its learned positions are the 64 of its context" in capsys.readouterr().err.splitlines()[-1]
    assert call("train", changed(TUNED, "steps=1", "run_dir=yes"), monkeypatch) == 0


def test_fine_tuning_resumes_without_its_base(base, workplace, monkeypatch):
    assert call("train", [*TUNED, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", 5)
    shutil.rmtree("base")
    shutil.rmtree("cache")
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=12)


def test_warming_up_an_indexer_of_a_new_model_warns_that_nothing_else_learns(caplog):
    warm = composed_run("model=mini", "precision=fp32", "attention=dsa", "attention.indexer.stage=warmup")
    first_state(warm, 100, torch.device("cpu"))
    line = "stage=warmup trains the indexer alone, and all other weights stay random: give init_from="
    assert sum(line in record.message for record in caplog.records) == 1


REFUSED = {
    "init_from=5": "5 is not a run",
    "tokenizer=byte": "tokenizer cannot be chosen with init_from=base: its weights know the 300 tokens",
    "tokenizer=bpe": "tokenizer cannot be chosen",
    "attention=gqa": "attention cannot be chosen with init_from=base: the model is that run's",
    "model.d_model=128": "model.d_model cannot be chosen",
    "position=alibi": "position cannot be chosen",
    "init_from=nowhere": "nowhere is not a run",
    "init_from=base/checkpoints/step_00000030": "is no run, but lies within one: give the run's folder, base",
    "init_from=base/checkpoints": "give the run's folder, base",
    "init_from=''": "init_from= names no run",
}


def test_fine_tuning_on_examples_needs_a_vocabulary_of_numbers(base, workplace, monkeypatch, capsys):
    options = [*SMOKE, "init_from=base", "data=mqar", "run_dir=no"]
    assert call("train", options, monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: data=mqar is written in 25 numbers, which are not a token each in " in error
    assert not (workplace / "no").exists()


def test_fine_tuning_with_another_model_or_vocabulary_is_refused(base, workplace, monkeypatch, capsys):
    for change, complaint in REFUSED.items():
        assert call("train", changed(TUNED, change, "run_dir=no"), monkeypatch) == 2
        err = capsys.readouterr().err
        assert complaint in err.splitlines()[-1] and err.count("error:") == 1
        assert not (workplace / "no").exists()


def test_indexer_added_to_a_base_of_mla_is_warmed_up_alone_and_then_trained_with_all(workplace, monkeypatch, capsys):
    short = [*QUICK, "steps=2", "save_every=2"]
    add = ["init_from=dense", "attention=dsa", "attention.indexer.n_heads=2", "attention.indexer.stage=warmup"]
    sparse = ["init_from=warm", "attention.indexer.stage=sparse", "attention.indexer.top_k=16"]
    assert call("train", [*short, "attention=mla", "attention.q_lora_rank=8", "run_dir=dense"], monkeypatch) == 0
    assert call("train", [*short, *add, "run_dir=warm"], monkeypatch) == 0
    error = capsys.readouterr().err
    assert "freshly initialised: layers.0.attention.indexer.q_proj.weight, " in error and "stay random" not in error
    assert call("train", [*short, *sparse, "run_dir=sparse"], monkeypatch) == 0
    before, warm, after = (load_run(workplace / name)[0].state_dict() for name in ("dense", "warm", "sparse"))
    assert {name for name in warm if name not in before} == {name for name in warm if ".indexer." in name}
    assert all(torch.equal(warm[name], weight) for name, weight in before.items())
    moved = {name for name in warm if not torch.equal(warm[name], after[name])}
    assert any(".indexer." in name for name in moved) and "embedding.weight" in moved
    refusals = {
        "attention.indexer.n_heads=4": "attention.indexer.n_heads cannot be chosen with init_from=warm",
        "attention.indexer.top_k=null": "attention.indexer.top_k cannot be unset with init_from=warm, whose weights",
        "attention=gqa": "attention cannot be chosen with init_from=warm",
    }
    capsys.readouterr()
    for typed, line in refusals.items():
        assert call("train", [*short, "init_from=warm", typed, "run_dir=refused"], monkeypatch) == 2
        assert f"error: {line}" in capsys.readouterr().err
