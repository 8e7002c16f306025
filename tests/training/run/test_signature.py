"""Signed configurations: stored settings that reach out of the run's folder need a signature, or to be repeated."""

import shutil

import pytest
import yaml

from common.errors import UserError
from common.overrides import with_stored_choices
from tests.support import SMOKE, composed_run, composed_tree
from training.run.folder import write_config
from training.run.resume import open_run


@pytest.fixture
def made(workplace):
    """made(*overrides) writes the config.yaml of such a run into the folder `run`."""

    def make(*overrides):
        (workplace / "run").mkdir(exist_ok=True)
        write_config(workplace / "run", composed_run(*SMOKE, *overrides))

    return make


def resume(*typed: str, folder: str = "run"):
    typed = with_stored_choices([f"resume={folder}", *typed])
    return open_run(folder, composed_tree(*typed[1:]), typed)[0]


FILES = ("data=files", "data.path=a.txt")
# How a run was made, what a stranger who resumes it is told to repeat, and what may be typed instead.
FOREIGN = {
    "files": (FILES, "data.path=a.txt", ["data=files", "data.path=a.txt"]),
    "hub": (("data=hub", "data.path=owner/name"), "data.path=owner/name", ["data.path=owner/name"]),
    "mix": (
        ("data=mix", "data.parts={a: {quota: 1, data: files, path: 'my text.txt'}, sympy: 1}"),
        "'data.parts.a.corpus.path=\"my text.txt\"'",
        ["data=mix", "data.parts={a: {quota: 1, data: files, path: 'my text.txt'}, sympy: 1}"],
    ),
    "strange": (
        ("data=files", 'data.path="C:\\\\\\${x}\x1b"'),
        "$'data.path=\"C:\\\\\\\\\\\\${x}\\x1b\"'",
        ["data=files", 'data.path="C:\\\\\\${x}\x1b"'],
    ),
    "cache": (("cache_dir=/elsewhere",), "cache_dir=/elsewhere", ["cache_dir=here"]),
    "vocabulary": (("tokenizer=gpt2", "tokenizer.folder=/v"), "tokenizer.folder=/v", ["tokenizer.folder=/v"]),
    "online": (
        ("logger=wandb", "logger.mode=online"),
        "logger.project=headroom logger=wandb logger.mode=online",
        ["logger=none"],
    ),
}


def test_resuming_a_foreign_run_with_links_is_refused(made, workplace):
    made()
    (workplace / "mine").mkdir()
    (workplace / "run/checkpoints").symlink_to(workplace / "mine")
    assert resume().seed == 0  # signed: this user's own
    config = yaml.safe_load((workplace / "run/config.yaml").read_text())
    (workplace / "run/config.yaml").write_text(yaml.safe_dump(config | {"signature": None}))
    with pytest.raises(UserError, match=r"run/checkpoints is a link, where the run would write and remove"):
        resume()


@pytest.mark.parametrize(("made_with", "repeat", "instead"), FOREIGN.values(), ids=FOREIGN)
def test_resuming_a_foreign_run_asks_once_to_repeat_external_settings(
    made, monkeypatch, tmp_path, made_with, repeat, instead
):
    made(*made_with)
    shutil.copytree("run", "copied")
    assert resume("steps=99", folder="copied").steps == 99  # the user's own, wherever it lies
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    with pytest.raises(UserError, match="not signed by this user") as refused:
        resume("steps=99")
    assert str(refused.value).endswith(f"repeat what you agree to: {repeat}")
    run = resume("steps=99", *instead)
    write_config(tmp_path / "run", run)  # as a run that goes on does
    assert resume() == run


@pytest.mark.parametrize("made_with", [(), ("logger=wandb",), ("tokenizer=gpt2",), ("attention=mla", "data=stdlib")])
def test_resuming_a_foreign_run_with_default_settings_needs_no_signature(made, monkeypatch, tmp_path, made_with):
    made(*made_with)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    assert resume() == composed_run(*SMOKE, *made_with)


def test_resuming_an_edited_or_unsigned_run_is_refused(made, tmp_path):
    made(*FILES)
    tree = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for edited in (
        tree | {"data": tree["data"] | {"path": "/etc/passwd"}},
        tree | {"cache_dir": "/etc"},
        tree | {"signature": None},
        tree | {"signature": "é"},
        tree | {"signature": "\ud800"},
        tree | {"signature": tree["signature"].upper()},
        {key: value for key, value in tree.items() if key != "signature"},  # as runs had none once
    ):
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(edited))
        with pytest.raises(UserError, match="not signed by this user"):
            resume()
    assert resume("data.path=a.txt").data.path == "a.txt"


@pytest.mark.parametrize("state", ["a file", "nowhere/\0"])
def test_resuming_without_a_lasting_key_asks_to_repeat(made, monkeypatch, tmp_path, state):
    (tmp_path / "a file").touch()
    monkeypatch.setattr("training.run.signature._key_file", lambda: tmp_path / state / "key")
    made(*FILES)
    with pytest.raises(UserError, match=r"set XDG_STATE_HOME .*repeat what you agree to: data.path=a.txt"):
        resume()
    resume("data.path=a.txt")


def test_resuming_a_foreign_run_without_checkpoint_refuses_init_from(made, monkeypatch, tmp_path):
    made("init_from=base")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    with pytest.raises(UserError, match=r"begins with the weights of base: begin a run of your own with init_from="):
        resume()
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    resume()


def test_resuming_with_another_setting_names_the_locations_that_may_change(made):
    for made_with, named in (
        (FOREIGN["mix"][0], "has moved to (data.parts.a.corpus.path)"),
        (("tokenizer=gpt2", *FILES), "has moved to (data.path, tokenizer.folder)"),
        ((), " may; the rest is the run's own, so leave it out, or write init_from= in place of resume= for a new run"),
    ):
        made(*made_with)
        with pytest.raises(UserError, match="cannot change on resume") as refused:
            resume("data.val_fraction=0.3")
        assert named in str(refused.value)


def test_resuming_with_moved_data_changes_its_location_only(made):
    made(*FILES, "data.val_fraction=0.2")
    assert resume("data.path=new/b.txt").data.path == "new/b.txt"
    assert resume("data=files", "data.path=b.txt", "data.val_fraction=0.2").data.path == "b.txt"
    for change in (["data=files", "data.path=b.txt"], ["data.val_fraction=0.1"], ["data=stdlib"], ["data.pth=b.txt"]):
        with pytest.raises(UserError, match="cannot change on resume"):
            resume(*change)
