"""Sweeps: the same command continues one, whatever ended it, and the runs are those of an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ablation.outcome import outcome_of
from ablation.sweep.launch import Interrupted
from ablation.sweep.pace import Pace
from ablation.sweep.run import run_sweep
from ablation.sweep.stored import SWEEPS, newest_sweep, read_outcomes, read_sweep
from common.errors import UserError
from tests.ablation.quick_sweeps import composing_once, without_pictures, without_timing
from tests.support import ROOT, SMOKE, TINY, call, changed
from training.metrics_file import read_metrics
from training.run.checkpoint import PICTURE
from training.run.config import compose


@pytest.fixture
def launcher(workplace, monkeypatch):
    """Runs the cells in this process, which saves seconds for each; the overrides of each are kept."""
    without_pictures(monkeypatch)
    composing_once(monkeypatch)
    launched = []

    def launch(overrides):
        launched.append(list(overrides))
        return call("train", overrides, monkeypatch, drawn=True)

    launch.launched = launched
    return launch


@pytest.fixture
def quick(monkeypatch):
    """Without timing steps, where the time does not matter."""
    without_timing(monkeypatch)


def curves(folder: Path) -> dict[str, list]:
    """The losses of each cell; speeds are no two times the same."""
    return {
        path.parent.name: [(row["step"], row["train_loss"], row.get("val_loss")) for row in read_metrics(path)]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    }


def test_sweep_stopped_within_a_cell_is_continued_by_the_same_command(launcher, quick, workplace, monkeypatch, capsys):
    typed = [*TINY, "attention=mha,mla", "seed=1"]
    assert run_sweep([*typed, "sweep=whole"], launcher) == 0
    assert "2 of 2 runs finished" in capsys.readouterr().err

    def stopped(overrides):
        if len(launcher.launched) == 3:  # within the second cell: as a signal would, after its first checkpoint
            with monkeypatch.context() as patch:
                patch.setattr("training.session.Session.save", _stop_after(patch))
                launcher(overrides)
            raise Interrupted(signal.SIGINT)
        return launcher(overrides)

    assert run_sweep(typed, stopped) == 130
    err = capsys.readouterr().err
    assert "1 of 2: attention=mha seed=1, about" in err and "the sweep stopped (SIGINT); continue it with: " in err
    (folder,) = [path for path in SWEEPS.iterdir() if path.name.startswith("attention-seed-")]
    assert outcome_of(folder / "attention=mla,seed=1").state == "unfinished"
    assert run_sweep(list(reversed(typed)), launcher) == 0  # the order of words makes no other sweep
    assert launcher.launched[-1][0].startswith("resume=") and len(launcher.launched) == 5
    assert curves(folder) == curves(SWEEPS / "whole") and len(curves(folder)) == 2
    assert run_sweep([*typed, "max_minutes=1"], launcher) == 0 and len(launcher.launched) == 5  # nothing is run again
    assert newest_sweep() == folder
    sweep = read_sweep(folder)
    assert len(sweep.cells) == 2 and len({cell.name for cell in sweep.cells}) == 2 and sweep.commands == [typed]


def _stop_after(patch):
    from training.session import Session

    save = Session.save

    def saved(self):
        save(self)
        raise KeyboardInterrupt

    return saved


def test_sweep_more_seeds_and_variants_join_one_that_is_there(launcher, quick, workplace):
    assert run_sweep([*TINY, "attention=mha,gqa", "seed=1", "sweep=heads", "match=params"], launcher) == 0
    first = read_sweep(SWEEPS / "heads")
    assert run_sweep([*TINY, "attention=gqa,mla", "seed=1,2", "sweep=heads", "match=params"], launcher) == 0
    sweep = read_sweep(SWEEPS / "heads")
    assert [cell.name for cell in sweep.cells][:2] == [cell.name for cell in first.cells]
    assert len(sweep.cells) == 5 and len(launcher.launched) == 5 and sweep.reference == "attention=mha"
    assert sweep.added["attention=gqa"] == first.added["attention=gqa"] and sweep.added["attention=mla"]
    with pytest.raises(UserError, match="is another sweep, hypothesis: None, now more"):
        run_sweep([*TINY, "attention=mha", "seed=1,2", "sweep=heads", "match=params", "hypothesis=more"], launcher)
    with pytest.raises(UserError, match=r"is another sweep, settings: .*steps=4.*, now .*steps=5.*: give this one"):
        run_sweep([*changed(TINY, "steps=5"), "attention=mha,gqa", "seed=1", "sweep=heads", "match=params"], launcher)
    assert run_sweep([*TINY, "attention=gqa", "seed=5", "sweep=heads", "match=params"], launcher) == 0
    assert read_sweep(SWEEPS / "heads").cells[-1].name == "attention=gqa,seed=5"
    with pytest.raises(UserError, match="is another sweep, match: params, now none"):
        run_sweep([*TINY, "attention=mha,gqa", "seed=1", "sweep=heads"], launcher)


def test_sweep_of_other_settings_in_conf_is_refused_whatever_variant_is_added(launcher, quick, workplace, monkeypatch):
    assert run_sweep([*TINY, "attention=mha", "seed=1,2", "sweep=conf"], launcher) == 0
    monkeypatch.setattr("ablation.sweep.plan.compose_start", lambda *words: compose(*words, "clip_norm=0.5"))
    with pytest.raises(UserError, match=r"was begun with clip_norm=1.0 in .*, now that is 0.5: runs of both could not"):
        run_sweep([*TINY, "attention=mha", "seed=3", "sweep=conf"], launcher)


def test_sweep_of_format_1_whose_document_mask_was_the_corpuss_continues(launcher, quick, workplace):
    typed = [*TINY, "attention=mha", "seed=1,2", "document_mask=true", "sweep=old"]
    assert run_sweep(typed, launcher) == 0
    path = SWEEPS / "old/sweep.json"
    content = json.loads(path.read_text().replace("document_mask=true", "data.document_mask=true")) | {"format": 1}
    for tree in content["settings"].values():
        tree["data"]["document_mask"] = tree.pop("document_mask")
    path.write_text(json.dumps(content))
    assert run_sweep([*typed[:-3], "seed=1,2,3", *typed[-2:]], launcher) == 0 and len(launcher.launched) == 3
    assert run_sweep(typed, launcher) == 0 and len(launcher.launched) == 3
    for damaged in (5, {"attention=mha": 5}):
        path.write_text(json.dumps(content | {"settings": damaged}))
        with pytest.raises(UserError, match=r"sweep\.json is damaged \(it is not what a sweep writes\)"):
            read_sweep(path.parent)


@pytest.mark.slow  # tests/test_floors.py says which files import it
def test_sweep_imports_no_scipy(workplace):
    code = "import sys, ablation.sweep.run; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_sweep_failed_and_diverged_cells_end_nothing_else(launcher, quick, workplace, capsys):
    typed = [*TINY, "optim.lr=1e-3,1e30,2e-3", "clip_norm=0", "max_skipped_updates=1", "sweep=rates"]

    def failing(overrides):
        return -9 if "optim.lr=0.002" in overrides else launcher(overrides)

    assert run_sweep(typed, failing) == 2
    err = capsys.readouterr().err
    assert "1 of 3 runs finished" in err
    assert re.search(r"optim.lr=10+ diverged: at step", err) and "optim.lr=0.002 failed: killed by SIGKILL" in err
    assert read_outcomes(SWEEPS / "rates")["optim.lr=0.002"].startswith("killed by SIGKILL")
    assert run_sweep(typed, launcher) == 2  # what failed is tried again, what diverged is not
    assert len(launcher.launched) == 3 and len(read_outcomes(SWEEPS / "rates")) == 1
    assert "passed over" in capsys.readouterr().err


def test_sweep_minutes_are_the_same_steps_for_all_seeds_and_stay(launcher, monkeypatch, workplace):
    seconds = {"attention=mha": 0.5, "attention=mqa": 0.25}
    paces = {variant: Pace(each, 1000) for variant, each in seconds.items()}
    monkeypatch.setattr("ablation.sweep.plan.paces_of", lambda variants: {name: paces[name] for name in variants})
    typed = [*SMOKE, "data.size=40", "eval_every=0", "attention=mha,mqa", "minutes=0.025", "sweep=minutes"]
    assert run_sweep([*typed, "seed=1"], launcher) == 0
    paces |= dict.fromkeys(paces, Pace(7.0, 1000))  # what is measured later changes nothing
    assert run_sweep([*typed, "seed=2"], launcher) == 0
    steps = {path.parent.name: read_metrics(path)[-1]["step"] for path in SWEEPS.glob("minutes/*/metrics.jsonl")}
    assert steps == {f"attention={name},seed={seed}": n for name, n in (("mha", 3), ("mqa", 6)) for seed in (1, 2)}


def test_sweep_writes_choices_and_overrides_into_each_run(launcher, quick, workplace):
    import yaml

    assert run_sweep([*TINY, "attention=mha,mla", "sweep=named"], launcher) == 0
    known = yaml.safe_load((SWEEPS / "named/attention=mla/environment.yaml").read_text())
    assert known["choices"]["attention"] == "mla" and known["choices"]["experiment"] == "smoke"
    assert "attention=mla" in known["command"]


REFUSED = {
    "a later value": (["optim.lr=0.01,fast"], "optim.lr=fast: give a number"),
    "a later seed": (["seed=1,-1"], "seed=-1: give at least 0"),
    "a file for data": (["data=a.txt,b.txt"], "data=a.txt,b.txt: did you mean data=files data.path=a.txt,b.txt?"),
    "no such choice": (["attention=mha,nope"], "attention=mha,nope: choose one of"),
    "a folder of one run": (["seed=1,2", "run_dir=here"], "run_dir= is the folder of one run: name the sweep instead"),
    "a run to go on": (["seed=1,2", "resume=latest"], "resume= continues one run: leave it out"),
    "no base for a seed": (["seed=1,2", "init_from=sweeps/none/seed=${seed}"], "sweeps/none/seed=1 is not a run"),
    "what is of the whole": (["match=none,params"], "match is of the whole sweep"),
    "another launcher": (["seed=1,2", "hydra/launcher=joblib"], "hydra/launcher=joblib does nothing in a sweep"),
    "no budget": (
        ["seed=1,2", "match=all"],
        "match=all: choose none, params, flops, cache, or a list of these, as [cache,params]",
    ),
    "a name with a slash": (["seed=1,2", "sweep=a/b"], "sweep=a/b cannot be a folder's name: give letters, digits"),
    "a name that is too long": (["seed=1,2", f"sweep={'x' * 300}"], "100 at most, the first a letter"),
    "nothing to match": (["seed=1,2", "match=params"], "match=params compares variants"),
    "steps and minutes": (["seed=1,2", "minutes=1"], "minutes= is in the place of steps="),
    "minutes and less": (["seed=1,2", "max_minutes=-1"], "max_minutes=-1: give more than 0"),
    "too long": (["seed=1,2", "max_minutes=0.001"], "this sweep would take about"),
}


@pytest.mark.parametrize(("typed", "complaint"), REFUSED.values(), ids=REFUSED)
def test_sweep_refuses_before_anything_is_run(launcher, quick, workplace, typed, complaint, monkeypatch, capsys):
    assert call("train", ["-m", *TINY, *typed], monkeypatch) == 2
    err = capsys.readouterr().err
    assert complaint in err.splitlines()[-1] and err.count("error: ") == 1
    assert not launcher.launched and not list(Path.cwd().glob("sweeps/*"))


def test_train_dash_m_stands_anywhere_and_with_no_other_flag(workplace, quick, monkeypatch, capsys):
    assert call("train", [*TINY, "-m", "seed=1,2", "dry_run=true"], monkeypatch) == 0
    err = capsys.readouterr().err
    assert "2 runs of 1 variant over seeds 1, 2" in err and "nothing was trained" in err
    assert call("train", ["seed=1,2", "--multirun", "--cfg", "job"], monkeypatch) == 2
    assert "--cfg does not go with -m" in capsys.readouterr().err
    assert call("train", ["if:steps=3"], monkeypatch) == 2
    assert "if: is for a sweep over several choices" in capsys.readouterr().err


def test_train_settings_of_a_sweep_are_refused_without_one(workplace, monkeypatch, capsys):
    for word in ("match=params", "sweep=heads", "max_minutes=5", "hypothesis=more"):
        assert call("train", [*SMOKE, word], monkeypatch) == 2
        assert f"{word} is of a sweep: add -m" in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_train_minutes_of_one_run_are_steps(workplace, monkeypatch, capsys):
    monkeypatch.setattr("training.minutes.seconds_per_step", lambda run, corpus: 0.5)
    assert call("train", [*SMOKE, "minutes=0.05", "run_dir=run"], monkeypatch) == 0
    assert read_metrics(Path("run/metrics.jsonl"))[-1]["step"] == 6
    assert "steps: 6\n" in Path("run/config.yaml").read_text()
    for words, complaint in {
        ("minutes=1", "steps=3"): "minutes=1 is in the place of steps=3",
        ("minutes=1", "resume=run"): "minutes=1 is in the place of resume=run",
        ("minutes=0",): "minutes=0: give a number of more than 0",
        ("minutes=soon",): "minutes=soon: give a number",
        ("minutes=1e-9",): "one step takes 0.5 s here: give more minutes",
    }.items():
        assert call("train", [*SMOKE, *words], monkeypatch) == 2
        assert complaint in capsys.readouterr().err


# As `quick` does, in a process of its own.
QUICK = f"""
import runpy, sys
import ablation.sweep.plan
from ablation.sweep.pace import Pace

ablation.sweep.plan.paces_of = lambda variants: dict.fromkeys(variants, Pace(0.01, 10_000))
sys.argv[0] = "train.py"
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.slow  # the first test of this file stops one without processes; of a run, tests/training has real kills
def test_sweep_killed_by_signals_ends_like_an_undisturbed_one(workplace, monkeypatch):
    """Real processes: Ctrl-C reaches the cell, which saves; so does a cell whose sweep is killed by SIGKILL."""
    steps_of_all = 200  # more than a fast machine takes between two looks at them
    typed = ["experiment=smoke", f"steps={steps_of_all}", "eval_every=0", "save_every=1000", "seed=1,2", "sweep=killed"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first = workplace / "sweeps/killed/seed=1"

    def begun(steps: int) -> subprocess.Popen:
        command = [sys.executable, "-c", QUICK, "-m", *typed]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while time.monotonic() < end and len(read_metrics(first / "metrics.jsonl")) < steps:
            time.sleep(0.05)
        return process

    process = begun(steps=3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the sweep stopped (SIGINT); continue it with: " in err and "saved" in err
    for both in (False, True):  # the sweep alone, and with its run, which saves nothing then
        process = begun(steps=len(read_metrics(first / "metrics.jsonl")) + 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(read_metrics(first / "metrics.jsonl")) < steps_of_all  # there is something left to lose
        process.kill()
        for child in children if both else ():
            os.kill(int(child), signal.SIGKILL)
        process.communicate(timeout=120)
    command = [sys.executable, str(ROOT / "train.py"), "-m", *typed]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert call("train", [*typed[:-2], "seed=1", "run_dir=whole"], monkeypatch) == 0
    assert curves(workplace / "sweeps/killed")["seed=1"] == curves(workplace)["whole"]
    assert len(curves(workplace / "sweeps/killed")["seed=2"]) == steps_of_all  # which nothing disturbed
    assert json.loads((workplace / "sweeps/killed/outcomes.json").read_text()) == {}
    assert os.path.isfile(first / PICTURE)
