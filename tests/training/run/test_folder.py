"""Folders of new runs."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import UserError
from tests.support import composed_run
from training.run import folder
from training.run.folder import create


class NoTokenizer:
    def save(self, path):
        path.write_text("{}")


def test_create_runs_begun_at_once_never_share_a_folder(workplace, monkeypatch):
    monkeypatch.setattr(folder.time, "strftime", lambda format: "20260101-000000")
    monkeypatch.setattr(folder, "environment", dict)
    run = composed_run("experiment=smoke")
    with ThreadPoolExecutor(8) as threads, ExitStack() as held:
        made = list(threads.map(lambda _: create(run, NoTokenizer(), {}, held), range(200)))  # of 132 names
    assert len(set(made)) == 200 and all((path / "config.yaml").is_file() for path in made)


@pytest.mark.parametrize("typed", ["20260101-000000-brave-otter", "runs/20260101-000000-brave-oter"])
def test_check_is_run_of_a_slip_names_the_run_that_is_meant(workplace, typed):
    (workplace / "runs/20260101-000000-brave-otter").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean runs/20260101-000000-brave-otter\?"):
        folder.check_is_run(Path(typed))


def test_check_is_run_of_another_name_says_where_runs_are(workplace):
    with pytest.raises(UserError, match="runs are made in runs/"):
        folder.check_is_run(Path("zz"))


def test_check_is_run_of_a_sweeps_folder_names_a_run_within(workplace):
    (workplace / "sweeps/a/one").mkdir(parents=True)
    (workplace / "sweeps/a/one/config.yaml").touch()
    with pytest.raises(
        UserError, match="sweeps/a is not a run, but has some within: give one of them, as sweeps/a/one"
    ):
        folder.check_is_run(Path("sweeps/a"))
    with pytest.raises(UserError, match="sweeps/b is not a run: there is no such folder"):
        folder.check_is_run(Path("sweeps/b"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"step":1,"train_loss":2.0}\n{"step":2,"train_loss":null,"skipped":true}\n', True),
        ('{"step":1,"train_loss":null,"skipped":true}\n{"step":2,"train_loss":2.0}\n', False),
        ('{"step":1,"train_loss":null,"skipped":true}\n{"step":2,"tr', True),  # a line that a kill cut short
        ("", False),
        (None, False),
    ],
)
def test_warn_if_it_diverged_speaks_of_a_run_whose_last_update_was_skipped(workplace, caplog, rows, said):
    if rows is not None:
        (workplace / "metrics.jsonl").write_text(rows)
    folder.warn_if_it_diverged(workplace)
    assert ("diverged: its last update was skipped" in caplog.text) is said
