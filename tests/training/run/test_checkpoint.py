"""Checkpoints: saved tensors load bit for bit; damaged or foreign files are refused in one line."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from common.checksummed_json import digest, parse_verified
from common.errors import UserError
from model.kernels.sdpa import SDPA
from runtime.world import ONE
from tests.composition import request_of
from tests.support import QUICK, SMOKE, call, relative_error, some_tokens, training_state
from tests.training.runs import assert_same_run, losses, rewind
from train import train
from training.metrics_file import read_metrics
from training.run import checkpoint, tensor_files
from training.run import folder as run_folder
from training.run.checkpoint import MODEL, OPTIMIZER, newest
from training.run.config import Run
from training.run.load import load_run
from training.run.migrate import FORMAT
from training.run.resume import open_run
from training.run.tensor_files import Share

TRAINED = [*QUICK, "attention=mla", "steps=6", "eval_every=3", "save_every=3"]

ON_FILES = [*SMOKE, "data=files", "batch_tokens=256", "eval_tokens=256"]


def last(run):
    """The folder of its newest checkpoint."""
    return max((run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 6 steps, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.chdir(folder)
        assert call("train", [*TRAINED, "run_dir=run"], patch, drawn=True) == 0
    return folder / "run"


@pytest.fixture
def run(trained, workplace):
    """A copy of it, to damage; the cache of shards beside it."""
    shutil.copytree(trained.parent, workplace, dirs_exist_ok=True)
    return workplace / "run"


def test_run_folder_after_training_has_all_files_and_rows(run):
    names = {path.name for path in run.iterdir()}
    assert names - {".lock"} == {
        *("config.yaml", "environment.yaml", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints")
    }
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"tokens", "train_loss", "lr", "tokens_per_second"} <= row.keys() for row in rows)
    optim = yaml.safe_load((run / "config.yaml").read_text())["optim"]
    assert [row["muon_lr"] / optim["muon_lr"] for row in rows] == pytest.approx([r["lr"] / optim["lr"] for r in rows])
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert rows[-1]["val_bpb"] > 0 and rows[-1]["tokens"] == 6 * 256
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_load_run_weights_equal_saved_ones_in_any_execution(run):
    model, tokenizer = load_run(run)
    assert tokenizer.vocab_size == 257
    saved = load_file(last(run) / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    tokens = some_tokens(1, 20)
    for execution in ("naive", "expanded", "absorbed"):
        other, _ = load_run(run, kernel=SDPA(), execution=execution)
        with torch.no_grad():
            assert relative_error(other(tokens).x, model(tokens).x) <= 1e-4


def test_resume_refused_leaves_config_unchanged(run, monkeypatch):
    before = (run / "config.yaml").read_text()
    assert call("train", ["resume=run", "steps=3"], monkeypatch) == 2
    for path in (run / "checkpoints").iterdir():
        cut(path / "optimizer.safetensors")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert (run / "config.yaml").read_text() == before


def test_resume_latest_takes_the_run_modified_last(run, monkeypatch, capsys):
    shutil.copytree(run, "runs/older")
    shutil.copytree(run, "runs/newer")
    for name, when in (("older", 1), ("newer", 2)):
        os.utime(f"runs/{name}/config.yaml", (when, when))
    assert call("train", ["resume=latest", "steps=7"], monkeypatch) == 0
    assert "resuming runs/newer after step 6" in capsys.readouterr().err


def test_resume_optimizer_state_without_a_tensor_is_refused(run, monkeypatch, capsys):
    path = last(run) / "optimizer.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != "norm.weight/exp_avg"}, path)
    reseal(last(run), "optimizer.safetensors")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "does not fit this run's optimizer: it lacks norm.weight/exp_avg" in capsys.readouterr().err


# A change to one tensor of the optimizer's state, and the error.
STATES = {
    "shorter": ("norm.weight/exp_avg", lambda x: x[:-1], r"has shape \(63,\), not \(64,\)"),
    "a number": ("norm.weight/exp_avg", lambda x: x.sum(), r"has shape \(\), not \(64,\)"),
    "of other numbers": ("norm.weight/exp_avg", lambda x: x.half(), "is torch.float16, not torch.float32"),
    "whole numbers": ("norm.weight/exp_avg_sq", lambda x: x.long(), "is torch.int64, not torch.float32"),
    "not numbers": ("norm.weight/exp_avg", lambda x: x * torch.nan, "not at least -inf"),
    "negative squares": ("norm.weight/exp_avg_sq", lambda x: x - 1, "not at least 0.0"),
    "many counts": ("norm.weight/updates", lambda x: x.repeat(64), r"has shape \(64,\), not \(\)"),
    "too large a count": ("norm.weight/updates", lambda x: x + 1, "is 7, in a checkpoint of 6 steps"),
    "half a count": ("norm.weight/updates", lambda x: x - 0.5, "is 5.5, in a checkpoint of 6 steps"),
    "no count": ("norm.weight/updates", lambda x: x * torch.nan, "not at least 0.0"),
    "unknown": ("norm.weight/other", lambda _: torch.zeros(3), "it holds norm.weight/other, which this optimizer"),
    "nameless": ("other", lambda _: torch.zeros(3), "it holds other, which this optimizer"),
}


def test_load_optimizer_wrong_tensor_raises_user_error(trained):
    found = newest(trained, (MODEL, OPTIMIZER))
    settings = checkpoint.settings_of(found.path, found.manifest)
    model = checkpoint.load_model(found, settings.model, 257)
    training = training_state(model, settings.optim.build(model))
    checkpoint.load_optimizer(found, training)
    whole = found.tensors[OPTIMIZER]
    for name, change, complaint in STATES.values():
        found.tensors[OPTIMIZER] = whole | {name: change(whole.get(name))}
        with pytest.raises(UserError, match=complaint):
            checkpoint.load_optimizer(found, training)


WEIGHTS = {
    "of half precision": (
        lambda tensors: {name: x.half() for name, x in tensors.items()},
        "float16, not torch.float32",
    ),
    "one more": (lambda tensors: tensors | {"other": torch.zeros(3)}, "it holds other, which this model does not have"),
    "one fewer": (lambda tensors: {name: tensors[name] for name in list(tensors)[1:]}, "does not fit|it lacks"),
    "padded": (lambda tensors: tensors | {"embedding.weight": torch.zeros(320, 64)}, r"\(320, 64\), not \(257, 64\)"),
    "none": (lambda tensors: {}, "it holds 0 layers"),
}


def test_load_run_wrong_weights_raise_user_error(run):
    path = last(run) / MODEL
    whole = load_file(path)
    config, _ = run_folder.read_config(run)
    for change, complaint in WEIGHTS.values():
        save_file(change(whole), path)
        reseal(last(run), MODEL)
        with pytest.raises(UserError, match=complaint):
            load_run(run)
        with pytest.raises(UserError, match=complaint):
            checkpoint.check_fits(run, Run.from_tree(config))


def test_load_run_claimed_huge_size_raises_before_building(run):
    """What is claimed would take minutes and all memory."""
    config, _ = run_folder.read_config(run)
    batches = {"batch_tokens": 2**20, "eval_tokens": 2**20, "micro_batch_size": 1}
    for setting, size in {"n_layers": 2**16, "d_model": 2**20, "context_length": 2**20}.items():
        model = config["model"] | {setting: size} | ({"position_embedding": "learned"} if "context" in setting else {})
        claimed = config | {"model": model} | (batches if "context" in setting else {})
        reseal(last(run), config=config)
        with pytest.raises(UserError, match=r"config.yaml says .*, the run was trained with"):
            checkpoint.check_fits(run, Run.from_tree(claimed))
        reseal(last(run), config=claimed)
        for look in (lambda: load_run(run), lambda claimed=claimed: checkpoint.check_fits(run, Run.from_tree(claimed))):
            with pytest.raises(UserError, match=r"does not fit the run's settings: it (holds 2 layers|lacks position)"):
                look()


MANIFESTS = [{"step": step} for step in (-6, 0, True, 5, 6.5, 10**30, 10**400, math.nan, None, "6")]
MANIFESTS += [{"val_loss": loss} for loss in (-1.0, math.nan, math.inf, 10**400, True, "low", [1])]
MANIFESTS += [{"loss_scale": {"scale": scale, "good_steps": 0}} for scale in (0.0, -1.0, math.nan, 1e300)]
MANIFESTS += [{"loss_scale": {"scale": 1.0, "good_steps": steps}} for steps in (-1, 2000, 1.5)]
MANIFESTS += [{"config": config} for config in (None, [1], json.loads("[" * 500 + "]" * 500))]
MANIFESTS += [{"config": {"model": json.loads('{"a":' * 500 + "1" + "}" * 500)}}, {"other": 1}]


def test_newest_invalid_manifest_takes_older_checkpoint(run, caplog):
    manifest = last(run) / "manifest.json"
    whole = manifest.read_text()
    for change in MANIFESTS:
        manifest.write_text(whole)
        reseal(last(run), **change)
        caplog.clear()
        assert newest(run, (MODEL,)).manifest.step == 3, str(change)[:40]
        assert "step_00000006/manifest.json is damaged" in caplog.text


# Each file, and each kind of what is no file. A pipe would block whoever reads it, a device has no end.
IRREGULAR = [
    *((name, "pipe") for name in ("config.yaml", "metrics.jsonl", "tokenizer.json", MODEL, "manifest.json")),
    *(("checkpoints", "pipe"), ("config.yaml", "device"), (MODEL, "device"), ("tokenizer.json", "folder")),
    *(("manifest.json", "folder"), ("checkpoints", "device")),
]


@pytest.mark.parametrize(("name", "kind"), IRREGULAR)
def test_load_run_irregular_file_raises_without_blocking(run, name, kind):
    path = next(run.rglob(name)) if name not in (MODEL, "manifest.json") else last(run) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    stand = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}
    stand[kind](path)
    if name in (MODEL, "manifest.json"):
        assert newest(run, (MODEL,)).manifest.step == 3
        return
    looks = {"config.yaml": run_folder.read_config, "metrics.jsonl": lambda run: read_metrics(run / name)}
    with pytest.raises(UserError, match=f"{name} .*(no regular file|a folder|Not a directory)"):
        looks.get(name, load_run)(run)


UNREADABLE = [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE]


@pytest.fixture
def unreadable(monkeypatch):
    """unreadable(path, number) makes all reading of that file fail with this error."""

    def arrange(path, number):
        def fails(found, limit, real=checkpoint.read_regular):
            check(found)
            return real(found, limit)

        def opened(found, real=tensor_files.open_regular):
            check(found)
            return real(found)

        def check(found):
            if found == path:
                raise OSError(number, os.strerror(number), str(found))

        monkeypatch.setattr(checkpoint, "read_regular", fails)
        monkeypatch.setattr(tensor_files, "open_regular", opened)

    return arrange


def test_checkpoints_to_remove_unreadable_manifest_is_kept(run, unreadable, caplog):
    for step in (1, 2, 4, 5):
        shutil.copytree(run / "checkpoints/step_00000003", run / f"checkpoints/step_{step:08d}")
        reseal(run / f"checkpoints/step_{step:08d}", step=step, val_loss=step / 100)
    names = [path.name[-1] for path in checkpoint.checkpoints_to_remove(run, 6, 1)]
    assert names == ["2", "3", "4", "5"]  # the first is the best
    for number in UNREADABLE:
        caplog.clear()
        unreadable(run / "checkpoints/step_00000001/manifest.json", number)
        names = [path.name[-1] for path in checkpoint.checkpoints_to_remove(run, 6, 1)]
        assert "1" not in names and len(names) == 3  # of the others, the best is kept as well
        assert "step_00000001/manifest.json cannot be read" in caplog.text and "so it is kept" in caplog.text


def test_save_unlistable_checkpoints_removes_none(run, monkeypatch, caplog):
    before = sorted((run / "checkpoints").iterdir())
    monkeypatch.setattr(checkpoint, "write", lambda *_: None)
    for tensors in ("model_tensors", "_optimizer_tensors"):
        monkeypatch.setattr(checkpoint, tensors, lambda _: {})
    monkeypatch.setattr(run_folder, "names_in", lambda _: os.listdir("/nowhere"))
    state = SimpleNamespace(world=ONE, step=9)
    checkpoint.save(run, SimpleNamespace(keep_last=1), None, state, None)
    assert "so none is removed" in caplog.text and sorted((run / "checkpoints").iterdir()) == before
    with pytest.raises(UserError, match="run/checkpoints cannot be read"):  # and no run starts from step 0
        newest(run, (MODEL,))


@pytest.mark.parametrize("name", [MODEL, "manifest.json"])
def test_newest_and_best_unreadable_file_raise_user_error(run, unreadable, name):
    """It may be whole: an older one would be trained on, and take its place."""
    for number in UNREADABLE:
        unreadable(last(run) / name, number)
        for choose in (newest, checkpoint.best):
            with pytest.raises(UserError, match=f"step_00000006/{name} cannot be read: .*: make it readable, or move"):
                choose(run, (MODEL,))


@pytest.mark.parametrize("choose", [newest, checkpoint.best])
def test_newest_and_best_checkpoint_removed_meanwhile_retry(run, monkeypatch, choose):
    """With keep_last=1, each that is listed may be gone when it is read."""
    older, removed = run / "checkpoints/step_00000003", []

    def removes_first(path, *asked, real=checkpoint.read):
        if not removed:
            removed.append(path)
            shutil.copytree(path, older, dirs_exist_ok=True)
            reseal(older, step=3)
            shutil.rmtree(path)
        return real(path, *asked)

    shutil.rmtree(older)
    monkeypatch.setattr(checkpoint, "read", removes_first)
    assert choose(run, (MODEL,)).manifest.step == 3
    monkeypatch.setattr(checkpoint, "read_regular", lambda path, _: (run / "gone/a").read_bytes())
    monkeypatch.setattr("os.path.lexists", lambda _: False)
    with pytest.raises(UserError, match="cannot be read: No such file"):  # not for ever
        choose(run, (MODEL,))


def test_check_is_run_forbidden_folder_raises_user_error(run, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("os.stat", denied)
    with pytest.raises(UserError, match="run cannot be entered: Permission denied"):
        run_folder.check_is_run(run)


def test_newest_run_forbidden_folder_is_skipped_with_a_warning(run, monkeypatch, caplog):
    for name in ("older", "newer"):
        shutil.copytree(run, f"runs/{name}")
    Path("runs/notes.txt").touch()  # which is no run
    assert str(run_folder.newest(with_checkpoint=True)).startswith("runs/") and not caplog.text
    stat = os.stat

    def denied(path, **how):
        if "newer/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, **how)

    monkeypatch.setattr("os.stat", denied)
    assert str(run_folder.newest()) == "runs/older"
    assert "runs/newer is passed over: Permission denied" in caplog.text


def test_resume_complete_run_without_picture_prints_final_lines(run, monkeypatch, capsys):
    (run / "loss.png").unlink()
    before = (last(run) / MODEL).read_bytes()
    reseal(run / "checkpoints/step_00000003", format=FORMAT + 1)  # which costs it nothing but its place among the best
    assert call("train", ["resume=run"], monkeypatch, drawn=True) == 0
    out, err = capsys.readouterr()
    score = read_metrics(run / "metrics.jsonl")[-1]["val_loss"]
    assert f"validation   {score:.4f} nats" in out and "sample.py " in out and "speed" not in out
    assert "so which checkpoint is the best is not known" in err
    assert "run is complete at step 6" in err and (run / "loss.png").exists()
    assert (last(run) / MODEL).read_bytes() == before
    assert call("train", ["resume=run"], monkeypatch) == 2
    assert "complete at step 6 of steps=6: give a larger steps=" in capsys.readouterr().err


def reseal(checkpoint, *names, **changes):
    """Rewrite the manifest with valid checksums, as an attacker would."""
    manifest = parse_verified((checkpoint / "manifest.json").read_text()) | changes
    for name in names:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"hash": digest(manifest)}))  # NaN and all


def test_resume_edited_config_is_refused(run, monkeypatch, capsys):
    edit(run / "config.yaml", "batch_tokens: 256", "batch_tokens: 512")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "config.yaml says batch_tokens: 512, the run was trained with 256" in capsys.readouterr().err


def test_save_keeps_last_checkpoints_and_the_best(workplace, monkeypatch, capsys):
    """On a text that is not the validation text, where the best comes early."""
    (workplace / "a.txt").write_text("".join(f"{i} " for i in range(3000)) + "\n" + "abcdefgh " * 150)
    options = [*SMOKE, "data=files", "data.path=a.txt", "steps=12", "eval_every=2", "save_every=2", "keep_last=2"]
    options += ["optim.lr=1e-2", "eval_tokens=512"]
    assert call("train", [*options, "run_dir=run"], monkeypatch) == 0
    capsys.readouterr()
    scores = {
        row["step"]: row["val_loss"] for row in read_metrics(workplace / "run/metrics.jsonl") if "val_loss" in row
    }
    lowest = min(list(scores)[:-1], key=scores.get)
    assert lowest < 10, "the text should have made the best checkpoint an early one"
    kept = {path.name for path in (workplace / "run/checkpoints").iterdir()}
    assert kept == {f"step_{step:08d}" for step in (lowest, 10, 12)}
    best, _ = load_run("run", which="best")
    expected = load_file(workplace / f"run/checkpoints/step_{lowest:08d}/model.safetensors")
    assert all(torch.equal(best.state_dict()[name], expected[name]) for name in expected)
    texts = []
    for which in ("latest", "best"):
        assert call("sample", ["12 13", "--checkpoint", which, "--run", "run"], monkeypatch) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_save_folders_of_other_names_are_left_alone(run, monkeypatch):
    shutil.copytree(run / "checkpoints/step_00000003", run / "checkpoints/step_00000003_mine")
    shutil.copytree(run / "checkpoints/step_00000003", run / "checkpoints/step_9_of_mine")
    assert newest(run, (MODEL,)).manifest.step == 6
    assert call("train", ["resume=run", "steps=9", "save_every=1", "keep_last=1"], monkeypatch) == 0
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step_00000003_mine", "step_9_of_mine", "step_00000009"} <= kept and "step_00000008" not in kept


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "manifest.json"])
def test_newest_damaged_file_takes_older_checkpoint_with_a_warning(run, caplog, name):
    flip(last(run) / name)
    assert newest(run, (MODEL, OPTIMIZER)).manifest.step == 3
    assert f"step_00000006/{name} is damaged" in caplog.text and "taking step_00000003" in caplog.text


def test_resume_damaged_checkpoint_repeats_the_steps_after_the_older_one(run, trained, monkeypatch, capsys):
    flip(last(run) / OPTIMIZER)
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 0
    err = capsys.readouterr().err
    assert f"step_00000006/{OPTIMIZER} is damaged" in err and "resuming run after step 3" in err
    rows = [[row[:3] for row in losses(folder)][:4] for folder in (run, trained)]
    assert rows[0] == rows[1]  # from step 5 on the rate is that of a run of 9 steps
    assert not list(run.rglob(".writing-*"))


def test_sample_without_optimizer_state_works(run, monkeypatch, capsys):
    flip(last(run) / "optimizer.safetensors")
    load_run(run)
    assert capsys.readouterr().err == ""


def test_read_tensors_survive_overwritten_files(run):
    model, _ = load_run(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = newest(run, (MODEL, OPTIMIZER))
    for name in (MODEL, OPTIMIZER):
        path = found.path / name
        with open(path, "r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
            file.truncate(10)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for file in found.tensors.values() for tensor in file.values())


def test_processes_take_the_newest_checkpoint_that_the_first_of_them_sees(run):
    """One that is just being written may be there for some."""
    *older, _ = run_folder.checkpoint_paths(run)

    second = SimpleNamespace(size=2, rank=1, from_first=lambda paths: older, gathered=lambda fault: [None, fault])
    assert newest(run, (MODEL,)).path == last(run)
    assert newest(run, (MODEL,), Share(second)).path == older[-1]


def test_tensors_that_memory_does_not_hold_are_refused_with_their_bytes(run, monkeypatch):
    """Of those that a process keeps, as often as there are processes on its machine."""
    whole = sum(tensor.nbytes for tensor in newest(run, (OPTIMIZER,)).tensors[OPTIMIZER].values())
    some = Share(divided={"embedding.weight": slice(0, 10)})
    kept = newest(run, (OPTIMIZER,), some).tensors[OPTIMIZER]
    part = sum(tensor.nbytes for tensor in kept.values())
    assert part < whole and any(tensor.ndim == 0 for tensor in kept.values())
    for share, local, size in ((Share(), 2, whole), (some, 1, part), (some, 2, 2 * part)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setattr("training.run.checkpoint.free_memory", lambda device, size=size: size)
        newest(run, (OPTIMIZER,), share)
        monkeypatch.setattr("training.run.checkpoint.free_memory", lambda device, size=size: size - 1)
        with pytest.raises(UserError, match=f"takes {size:,} bytes of memory, {size - 1:,} are free: take a machine"):
            newest(run, (OPTIMIZER,), share)


class Marker:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_load_crafted_checkpoint_executes_nothing(run, monkeypatch, capsys):
    for content in (pickle.dumps(Marker()), b"PK\x03\x04" + pickle.dumps(Marker())):
        for path in (run / "checkpoints").iterdir():
            for name in (MODEL, OPTIMIZER):
                (path / name).write_bytes(content)
            reseal(path, MODEL, OPTIMIZER)
        assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
        assert "is damaged" in capsys.readouterr().err
    torch.save({"weight": Marker()}, last(run) / MODEL)
    reseal(last(run), MODEL)
    with pytest.raises(UserError, match="is damaged"):
        load_run(run)
    assert not (run.parent / "executed").exists()


TARGETS = [
    "os.system",
    "model.attention.mla.logging.os.system",
    "model.attention.mla.torch.load",
    "training.run.config.compose",
    "model.attention.base.AttentionConfig",
    "model.attention.gqa.AttentionConfig",
    "model.attention.__init__.os",
    "",
    3,
]


def test_load_run_foreign_target_raises_user_error(run):
    """In a checkpoint's manifest, as in config.yaml."""
    for target in TARGETS:
        config = parse_verified((last(run) / "manifest.json").read_text())["config"]
        config["attention"] |= {"_target_": target}
        reseal(last(run), config=config)
        with pytest.raises(UserError, match="names no AttentionChoice"):
            load_run(run)
        (run / "config.yaml").write_text(json.dumps(config))
        with pytest.raises(UserError, match="names no AttentionChoice"):
            open_run("run", {}, [])


def test_resume_yaml_with_python_tag_is_refused(run, monkeypatch, capsys):
    with open(run / "config.yaml", "a") as file:
        file.write("seed: !!python/object/apply:os.system ['touch executed']\n")
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert not (run.parent / "executed").exists()


def test_resume_locked_folder_is_refused(run, monkeypatch, capsys):
    with run_folder.acquire_run_lock(run):
        assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
        assert "another process is training in run" in capsys.readouterr().err
        assert newest(run, (MODEL,)).manifest.step == 6  # reading is free
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 0


@pytest.mark.parametrize("typed", [[], ["dry_run=true"], ["steps=9", "device=nowhere"]])
def test_refused_resume_lets_the_folder_go_while_its_exception_is_kept(run, typed):
    with pytest.raises(UserError) as kept:  # and with it the frames that took the lock
        train(**request_of(["resume=run", *typed]))
    assert kept.value.__traceback__ is not None
    with run_folder.acquire_run_lock(run):
        pass


def test_save_rows_are_on_disk_before_the_checkpoint(workplace, monkeypatch):
    """A kill right after saving must find every row up to there."""
    seen = []

    def spy(folder, run, corpus, training, *rest):
        seen.append((training.step, [row["step"] for row in read_metrics(folder / "metrics.jsonl")]))

    monkeypatch.setattr("training.monitor.monitor.FLUSH_SECONDS", 1e9)
    monkeypatch.setattr("training.run.checkpoint.save", spy)
    assert call("train", [*QUICK, "steps=7", "save_every=3", "eval_every=100", "run_dir=run"], monkeypatch) == 0
    assert seen == [(3, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (7, [1, 2, 3, 4, 5, 6, 7])]


def test_previews_leave_the_run_unchanged(run, monkeypatch):
    assert call("train", [*TRAINED, "sample_every=2", "run_dir=watched"], monkeypatch) == 0
    assert_same_run(run, run.parent / "watched", step=6)


def test_resume_more_steps_drops_rows_after_the_checkpoint(run, monkeypatch):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "train_loss": 9.9}) + '\n{"step": 8, "tr')
    assert call("train", ["resume=run", "steps=8"], monkeypatch) == 0
    assert [row[0] for row in losses(run)] == list(range(1, 9))
    assert losses(run)[6][1] != 9.9
    assert "steps: 8" in (run / "config.yaml").read_text()


def test_resume_without_checkpoint_starts_at_step_0(run, monkeypatch, capsys):
    rewind(run, run.with_name("killed"), step=2)  # before the first checkpoint
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert "starting at step 0" in capsys.readouterr().err
    assert [row[0] for row in losses(run.with_name("killed"))] == [1, 2, 3, 4, 5, 6]


def test_resume_dangling_checkpoint_link_raises_user_error(run, monkeypatch, capsys):
    (run / "checkpoints").rename("disk")
    (run / "checkpoints").symlink_to("nowhere")
    before = (run / "metrics.jsonl").read_bytes()
    assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
    assert "run/checkpoints cannot be read: it is a link that leads nowhere" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoints").unlink()
    Path("disk").rename(run / "checkpoints")
    for path in (last(run) / MODEL, last(run)):
        path.rename("away")
        path.symlink_to("nowhere")
        with pytest.raises(UserError, match=r"cannot be read: .*: make it readable, or move .* away"):
            newest(run, (MODEL,))
        path.unlink()
        Path("away").rename(path)


def spoil(run, how, name="model.safetensors"):
    """Damages one file of every checkpoint."""
    for path in (run / "checkpoints").iterdir():
        how(path / name)


FAULTS = {
    "weights cut short": (lambda run: spoil(run, cut), "model.safetensors is damaged"),
    "weights altered": (lambda run: spoil(run, flip), "model.safetensors is damaged"),
    "no weights": (lambda run: spoil(run, Path.unlink), "model.safetensors cannot be read"),
    "no manifest": (lambda run: spoil(run, Path.unlink, "manifest.json"), "manifest.json cannot be read"),
    "manifest of nothing": (
        lambda run: spoil(run, lambda path: path.write_text(json.dumps({"hash": digest({})})), "manifest.json"),
        "its config holds no settings",
    ),
    "manifest cut short": (lambda run: spoil(run, cut, "manifest.json"), "manifest.json is damaged"),
    "newer format": (
        lambda run: reseal(last(run), format=FORMAT + 1),
        f"has format {FORMAT + 1}, this program reads 2 to {FORMAT}",
    ),
    "tokenizer edited": (
        lambda run: (run / "tokenizer.json").write_text('{"kind": "byte", "hash": "0"}'),
        "tokenizer.json is damaged",
    ),
    "other tokenizer": (lambda run: reseal(last(run), tokenizer="f"), "is not the tokenizer of its tokens"),
    "other shape": (lambda run: reshape(last(run)), "does not fit"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet: train it on with"),
    "not a run": (lambda run: [shutil.rmtree(run / "checkpoints"), (run / "config.yaml").unlink()], "is not a run"),
}
RESUME_FAULTS = {
    "config cut short": ("model: [1,", "config.yaml cannot be read"),
    "config of a list": ("[1, 2]", "holds no settings"),
    "config of deep lists": ("a: " + "[" * 50_000, "is nested too deeply"),
    "config of less deep lists": ("a: " + "[" * 100 + "]" * 100, "is nested too deeply"),
    "config of deep settings": ("a: " + "{a: " * 100 + "1" + "}" * 100, "is nested too deeply"),
    "config of aliases": ("a: &a [1]\nb: [*a, *a]", "holds an alias, in line 2"),
    "config of a huge number": ("steps: 0x" + "f" * 9000, "which is too long for a number"),
    "config of a long number": ("steps: " + "1:" * 9000 + "1", "which is too long for a number"),
    "config of any length": ("a: 1\n" * 100_000, "is larger than 262,144 bytes"),
    "config of two words": ("tokenizer: path\nmodel: 3", "config.yaml"),
    "config of nothing": ("", "holds no settings"),
    "config of binary": ("\0\1", "config.yaml cannot be read"),
}


def test_resume_without_a_whole_config_names_what_can_be_done(run, monkeypatch, capsys):
    config = (run / "config.yaml").read_text()
    for damage, fault in (
        (lambda: (run / "config.yaml").write_text("seed: ["), "config.yaml cannot be read: "),
        (lambda: (run / "config.yaml").unlink(), "run has no config.yaml: bring it back"),
    ):
        damage()
        assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
        error = capsys.readouterr().err
        assert fault in error
        assert error.endswith(
            "manifest.json holds the same settings), or begin a new run with its weights: init_from=run\n"
        )
    assert call("train", [*QUICK, "init_from=run", "steps=1", "run_dir=new"], monkeypatch) == 0
    capsys.readouterr()
    (run / "config.yaml").write_text(config.replace("\nseed: ", "\n#seed: "))
    assert call("train", ["resume=run", "steps=9", "seed=0"], monkeypatch) == 2
    assert capsys.readouterr().err.endswith("(in run/config.yaml: bring the run's own file back)\n")


def test_resume_damaged_config_exits_with_one_line(run, monkeypatch, capsys):
    for content, complaint in RESUME_FAULTS.values():
        (run / "config.yaml").write_text(content)
        assert call("train", ["resume=run", "steps=9"], monkeypatch) == 2
        assert complaint in capsys.readouterr().err


def reshape(checkpoint):
    config = parse_verified((checkpoint / "manifest.json").read_text())["config"]
    config["model"]["d_model"] = 32
    reseal(checkpoint, config=config)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("damage", "complaint"), FAULTS.values(), ids=FAULTS)
def test_load_run_damaged_files_raise_user_error(run, damage, complaint, monkeypatch, capsys):
    damage(run)
    with pytest.raises(UserError, match=complaint):
        load_run(run)
    assert call("sample", ["x", "--run", "run"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_resume_changed_documents_are_refused_and_moved_ones_accepted(workplace, monkeypatch, capsys):
    (workplace / "a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    options = [*ON_FILES, "data.path=a.txt", "steps=4", "save_every=2", "run_dir=run"]
    assert call("train", options, monkeypatch) == 0
    shutil.copytree("run", "whole")
    assert call("train", ["resume=whole", "steps=6"], monkeypatch) == 0
    shutil.move("a.txt", "moved.md")
    (workplace / "a.txt").write_text("".join(f"row {i}\n" for i in range(3000)))
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=6"], monkeypatch) == 2
    assert "are not those that run was trained on" in capsys.readouterr().err
    shutil.copy("moved.md", "moved.jsonl")
    assert call("train", ["resume=run", "steps=6", "data.path=moved.jsonl"], monkeypatch) == 2
    assert "data.path=moved.jsonl is read in another way than a.txt" in capsys.readouterr().err
    assert call("train", ["resume=run", "steps=6", "data.path=moved.md"], monkeypatch) == 0
    assert_same_run(workplace / "run", workplace / "whole", step=6)
    assert "path: moved.md" in (workplace / "run/config.yaml").read_text()
    assert call("train", ["resume=run", "steps=7"], monkeypatch) == 0


def test_resume_on_another_text_says_so_before_it_is_prepared_and_names_fine_tuning(workplace, monkeypatch, capsys):
    """The tokenizer would be another, too: it is trained on the text."""
    (workplace / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(3000)))
    (workplace / "b.txt").write_text("".join(f"{i} rows are in another\n" for i in range(3000)))
    options = [*ON_FILES, "tokenizer=bpe", "tokenizer.vocab_size=300", "data.path=a.txt", "steps=2"]
    assert call("train", [*options, "run_dir=run"], monkeypatch) == 0
    prepared = sorted((workplace / "cache").iterdir())
    capsys.readouterr()
    assert call("train", ["resume=run", "steps=4", "data.path=b.txt"], monkeypatch) == 2
    err = capsys.readouterr().err
    assert "error: the documents of data=files are not those that run was trained on (fingerprint " in err
    assert (
        "say with data.path= where they are, or train its weights on others, in a new run: write init_from=run" in err
    )
    assert sorted((workplace / "cache").iterdir()) == prepared
    shutil.copy("b.txt", "a.txt")  # the same file, edited
    assert call("train", ["resume=run", "steps=4"], monkeypatch) == 2
    assert err.splitlines()[-1] in capsys.readouterr().err


def test_resume_changed_settings_are_refused_and_repeated_ones_accepted(run, monkeypatch, capsys):
    for change in ("~steps", "seed=3", "optim.lr=1", "attention=mha", "batch_tokens=64"):
        assert call("train", ["resume=run", change], monkeypatch) == 2
        assert "cannot change on resume" in capsys.readouterr().err
    for same in ([], ["compile=false", "attention=mla", "optim.beta1=0.9", "micro_batch_size=null", "run_dir=run"]):
        assert call("train", ["resume=run", *same], monkeypatch) == 2
        assert "complete at step 6 of steps=6: give a larger steps=" in capsys.readouterr().err
    assert call("train", ["resume=elsewhere"], monkeypatch) == 2
    assert "elsewhere is not a run" in capsys.readouterr().err


def test_resume_lost_checkpoints_is_refused_and_keeps_metrics(run, monkeypatch, capsys):
    rows = (run / "metrics.jsonl").read_text()
    assert len(read_metrics(run / "metrics.jsonl")) > 3
    shutil.rmtree(run / "checkpoints")
    assert call("train", ["resume=run"], monkeypatch) == 2
    assert "bring run/checkpoints back, or start a new run" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == rows
    edit(run / "config.yaml", "save_every: 3", "save_every: 30")
    edit(run / "config.yaml", "steps: 6\n", "steps: 8\n")  # killed before its first checkpoint
    assert call("train", ["resume=run", "save_every=2"], monkeypatch) == 0


@pytest.mark.parametrize("how", [["resume=run", "steps=9"], ["init_from=run", "data=synthetic"]])
def test_resume_and_init_from_nan_weights_are_refused(run, monkeypatch, capsys, how):
    weights = load_file(last(run) / MODEL)
    weights["embedding.weight"][0, 0] = torch.nan
    save_file(weights, last(run) / MODEL)
    reseal(last(run), MODEL)
    assert call("train", how, monkeypatch) == 2
    assert "holds numbers in embedding.weight that are not finite" in capsys.readouterr().err


def test_resume_odd_row_of_step_0_still_prints_final_lines(run, monkeypatch, capsys):
    (run / "loss.png").unlink()  # a complete run that lacks it prints them again
    metrics = run / "metrics.jsonl"
    rows = metrics.read_text()
    for odd in ({"val_loss": 2.0}, {"val_loss": 2.0, "val_bpb": None}, {"val_loss": 1e300}):
        metrics.write_text(json.dumps({"step": 0, "train_loss": None, **odd}) + "\n" + rows)
        assert call("train", ["resume=run"], monkeypatch) == 0
        assert "validation   " in capsys.readouterr().out
