"""Folders of new runs."""

from concurrent.futures import ThreadPoolExecutor

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
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: create(run, NoTokenizer(), {})[0], range(200)))  # of 132 names
    assert len(set(made)) == 200 and all((path / "config.yaml").is_file() for path in made)
