"""Faults of the machine during a run: full disks, read-only folders, files that change. One line, nothing lost."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.prefetch import Prefetch
from tests.support import ROOT, SMOKE, call, changed
from tests.training.runs import assert_same_run, losses, rewind
from training.run import checkpoint

OPTIONS = [*SMOKE, "batch_tokens=256", "steps=10", "save_every=5", "eval_every=10", "eval_tokens=256"]
OPTIONS += ["keep_last=9"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it no file can grow beyond so many bytes, as on a disk that is full."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call it with a command line of train.py, and the one line that it must end in -> all that was said."""

    def run(*arguments: str, complaint: str) -> str:
        capsys.readouterr()
        assert call("train", arguments, monkeypatch) == 2
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and complaint in errors[0] and "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize(
    ("size", "complaint"),
    [(500, "cannot be written"), (2300, "metrics.jsonl cannot be written"), (300_000, "checkpoint")],
    ids=["config", "metrics", "weights"],
)
def test_full_disk_while_training_costs_nothing_that_was_saved(whole, workplace, monkeypatch, refused, size, complaint):
    rewind(whole, workplace / "full", step=5)
    before = {path: path.read_bytes() for path in (workplace / "full/checkpoints").rglob("*") if path.is_file()}
    with largest_file(size):
        assert "File too large" in refused("resume=full", complaint=complaint)
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not list((workplace / "full").rglob(".writing-*"))
    assert call("train", ["resume=full"], monkeypatch) == 0
    assert_same_run(whole, workplace / "full", step=10)


def test_full_disk_while_preparing_leaves_nothing_half_built(workplace, refused):
    with largest_file(10_000):
        refused(*OPTIONS, "run_dir=run", complaint="the shards cannot be written")
    assert not [path for path in workplace.rglob("*") if path.is_file() and path.name[0] != "."]


@pytest.fixture
def closed():
    """A folder in which nothing can be made."""
    folder = Path("/sys") if os.geteuid() == 0 else Path("/")
    with pytest.raises(OSError):
        (folder / "headroom").mkdir()
    return folder


def test_train_into_a_folder_that_cannot_be_written_is_refused_in_one_line(workplace, monkeypatch, capsys, closed):
    assert call("train", [*OPTIONS, f"run_dir={closed}/run"], monkeypatch) == 2
    assert f"run_dir={closed}/run cannot be made" in capsys.readouterr().err
    assert not (workplace / "cache").exists()  # it is reported before the corpus is prepared
    assert call("train", [*OPTIONS, f"cache_dir={closed}/cache", "run_dir=run"], monkeypatch) == 2
    assert f"cache_dir={closed}/cache cannot be written" in capsys.readouterr().err
    assert not (workplace / "run").exists()


@pytest.fixture
def around_saving(monkeypatch):
    """Call it with what is to happen before and after each checkpoint is saved."""

    def arrange(before=lambda folder: None, after=lambda: None) -> None:
        save = checkpoint.save

        def spied(folder, *rest):
            before(folder)
            save(folder, *rest)
            after()

        monkeypatch.setattr(checkpoint, "save", spied)

    return arrange


def test_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(workplace, refused, around_saving):
    def replace_by_file(run: Path) -> None:
        if (run / "checkpoints").exists():
            (run / "checkpoints").rename("kept")
            (run / "checkpoints").touch()

    around_saving(before=replace_by_file)
    refused(*OPTIONS, "run_dir=other", complaint="checkpoint other/checkpoints/step_00000010 cannot be written")
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
        assert "matches no file" in err or "are not those that run was trained on" in err
    Path("a.txt").write_text(TEXT)
    assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "run", step=10)


@pytest.fixture
def without_a_clock(monkeypatch):
    """The next step's text is read before this step computes, not beside it, and a row is written at once: how far a
    run has come where it ends hangs on no clock."""
    monkeypatch.setattr("training.monitor.monitor.FLUSH_SECONDS", 0)
    begin = Prefetch._begin

    def read(prefetch: Prefetch, step: int) -> None:
        begin(prefetch, step)
        wait(prefetch.ahead.values())

    monkeypatch.setattr(Prefetch, "_begin", read)


def overwrite(shard: Path) -> None:
    with open(shard, "r+b") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "change", [lambda shard: os.truncate(shard, 5000), overwrite, os.unlink], ids=["cut", "edit", "delete"]
)
def test_shard_that_changes_during_a_run_is_one_line_or_harmless(
    whole, workplace, monkeypatch, refused, around_saving, without_a_clock, change
):
    """Cut short or edited, one line and a run that resumes; deleted, it is still there for whoever has opened it."""
    (shard,) = workplace.glob("cache/*/train_00000.tokens")
    once = [change]
    around_saving(after=lambda: once and once.pop()(shard))
    if change is os.unlink:
        assert call("train", [*OPTIONS, "run_dir=run"], monkeypatch) == 0
    else:
        refused(*OPTIONS, "run_dir=run", complaint="train_00000.tokens has changed while it was in use")
        assert len(losses(workplace / "run")) == 6  # whose text was read before
        shutil.rmtree(shard.parent)
        assert call("train", ["resume=run"], monkeypatch) == 0
    assert_same_run(whole, workplace / "run", step=10)


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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = str(ROOT / "train.py")
    main = f"import runpy, sys\n{code}\nsys.argv[0] = {program!r}\nrunpy.run_path({program!r}, None, '__main__')"
    denied = subprocess.run(
        [sys.executable, "-c", main, "logger=wandb", "logger.mode=online", *changed(OPTIONS, "steps=1")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "all was local" in denied.stdout, denied.stderr
    assert denied.returncode != 0, "the hook should have noticed this one"
