"""Faults of the machine during a run: full disks, read-only folders, files that change. One line, nothing lost."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, SMOKE, call, changed
from tests.training.runs import assert_same_run, losses, rewind

OPTIONS = [*SMOKE, "steps=20", "save_every=5", "eval_every=10", "keep_last=9"]


def run(program: str, *arguments: str, largest_file: int | None = None, code: str = "") -> subprocess.CompletedProcess:
    """A process of `program`, in which no file can grow beyond so many bytes, as on a disk that is full, and in which
    `code` runs first."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    main = f"import runpy, sys; sys.argv[0] = {program!r}\n{code}\n"
    main += f"runpy.run_path({str(ROOT / program)!r}, None, '__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", main, *arguments], env=environment, capture_output=True, text=True, preexec_fn=limit
    )


def train(*arguments: str, **how) -> subprocess.CompletedProcess:
    return run("train.py", *arguments, **how)


def assert_one_line(result: subprocess.CompletedProcess, complaint: str) -> None:
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and complaint in errors[0] and "Traceback" not in result.stderr


@pytest.fixture
def whole(workplace, monkeypatch):
    assert call("train", [*OPTIONS, "run_dir=whole"], monkeypatch) == 0
    return workplace / "whole"


@pytest.mark.parametrize(
    ("largest_file", "complaint"),
    [(500, "cannot be written"), (2300, "metrics.jsonl cannot be written"), (300_000, "checkpoint")],
    ids=["config", "metrics", "weights"],
)
def test_full_disk_while_training_costs_nothing_that_was_saved(whole, workplace, monkeypatch, largest_file, complaint):
    rewind(whole, workplace / "full", step=5)
    before = {path: path.read_bytes() for path in (workplace / "full/checkpoints").rglob("*") if path.is_file()}
    result = train("resume=full", largest_file=largest_file)
    assert_one_line(result, complaint)
    assert "File too large" in result.stderr
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not list((workplace / "full").rglob(".writing-*"))
    assert call("train", ["resume=full"], monkeypatch) == 0
    assert_same_run(whole, workplace / "full", step=20)


def test_full_disk_while_preparing_leaves_nothing_half_built(workplace):
    assert_one_line(train(*OPTIONS, "run_dir=run", largest_file=10_000), "the shards cannot be written")
    assert not [path for path in workplace.rglob("*") if path.is_file() and path.name[0] != "."]


@pytest.fixture
def closed():
    """A folder in which nothing can be made."""
    folder = Path("/sys") if os.geteuid() == 0 else Path("/")
    with pytest.raises(OSError):
        (folder / "headroom").mkdir()
    return folder


def test_folder_that_cannot_be_written_is_one_line(workplace, monkeypatch, capsys, closed):
    assert call("train", [*OPTIONS, f"run_dir={closed}/run"], monkeypatch) == 2
    assert f"run_dir={closed}/run cannot be made" in capsys.readouterr().err
    assert not (workplace / "cache").exists()  # it is reported before the corpus is prepared
    assert call("train", [*OPTIONS, f"cache_dir={closed}/cache", "run_dir=run"], monkeypatch) == 2
    assert f"cache_dir={closed}/cache cannot be written" in capsys.readouterr().err
    assert not (workplace / "run").exists()


def test_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(workplace):
    result = train(*OPTIONS, "run_dir=other", code="import training.run.checkpoint as c\n"
                   "was = c.save\n"
                   "def save(folder, *rest):\n"
                   "    if (folder / 'checkpoints').exists():\n"
                   "        (folder / 'checkpoints').rename('kept'); (folder / 'checkpoints').touch()\n"
                   "    was(folder, *rest)\n"
                   "c.save = save")  # fmt: skip
    assert_one_line(result, "checkpoint other/checkpoints/step_00000010 cannot be written")
    assert sorted(path.name for path in Path("kept").iterdir()) == ["step_00000005"]


TEXT = "".join(f"line {i} of a text\n" for i in range(3000))


def test_data_file_that_vanishes_is_one_line_and_the_run_resumes_when_it_is_back(workplace, monkeypatch, capsys):
    files = [*OPTIONS, "data=files", "data.path=a.txt"]
    Path("a.txt").write_text(TEXT)
    assert call("train", [*files, "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "run", step=5)
    for spoil in (lambda: Path("a.txt").unlink(), lambda: Path("a.txt").write_text(TEXT + "x")):
        spoil()
        assert call("train", ["resume=run"], monkeypatch) == 2
        err = capsys.readouterr().err
        assert "matches no file" in err or "documents of run have changed" in err
    Path("a.txt").write_text(TEXT)
    assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "run", step=20)


@pytest.mark.parametrize("change", ["cut", "edit", "delete"])
def test_shard_that_changes_during_a_run_is_one_line_or_harmless(whole, workplace, monkeypatch, change):
    """Cut short or edited, one line and a run that resumes; deleted, it is still there for whoever has opened it."""
    how = {"cut": "os.truncate(shard, 5000)", "edit": "open(shard, 'r+b').write(b'x')", "delete": "os.unlink(shard)"}
    code = (
        "import glob, os, training.run.checkpoint as c\n"
        "shard, was = glob.glob('cache/*/train_00000.tokens')[0], c.save\n"
        f"def save(*arguments):\n    was(*arguments)\n    if os.path.exists(shard): {how[change]}\n"
        "c.save = save"
    )
    result = train(*OPTIONS, "run_dir=run", code=code)
    if change == "delete":
        assert result.returncode == 0, result.stderr
    else:
        assert_one_line(result, "train_00000.tokens has changed while it was in use")
        assert len(losses(workplace / "run")) == 5
        for path in (workplace / "cache").glob("[!.]*/*"):
            path.unlink()
        for folder in (workplace / "cache").glob("[!.]*"):
            folder.rmdir()
        assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(whole, workplace / "run", step=20)


def test_training_and_sampling_on_local_data_use_no_network(workplace):
    """Neither on import, nor in training and sampling on local data."""
    blocked = (
        "def deny(event, arguments):\n"
        "    if event.startswith('socket.') and event != 'socket.gethostname':\n"
        "        raise SystemExit(f'reached for the network: {event} {arguments}')\n"
        "sys.addaudithook(deny)"
    )
    local = (
        "def go(program, *arguments):\n"
        "    sys.argv = [program, *arguments]\n"
        f"    try: runpy.run_path({str(ROOT)!r} + '/' + program, None, '__main__')\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
        "    from hydra.core.global_hydra import GlobalHydra; GlobalHydra.instance().clear()"
    )
    Path("a.txt").write_text(TEXT)
    texts = ["data=files", "data.path=a.txt", "tokenizer=bpe", "tokenizer.vocab_size=300"]
    brief = changed(OPTIONS, "steps=2")
    runs = [("train.py", *brief), ("train.py", *brief, *texts), ("sample.py", "line")]
    environment = {"HF_HUB_OFFLINE": "0", "WANDB_MODE": "online"}
    code = f"import os; os.environ |= {environment}\n{blocked}\nwas = sys.argv\n{local}\n"
    code += "\n".join(f"go(*{arguments})" for arguments in runs) + "\nsys.argv = was; print('all was local')"
    denied = train("logger=wandb", "logger.mode=online", *changed(OPTIONS, "steps=1"), code=code)
    assert "all was local" in denied.stdout, denied.stderr
    assert denied.returncode != 0, "the hook should have noticed this one"
