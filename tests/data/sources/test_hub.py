"""Hub datasets, here through the library from a local folder; and the errors where there is no hub."""

import json
import urllib.request

import pytest

from common.errors import UserError
from data.sources import hub
from data.sources.contents import Contents
from data.sources.files import FilesCorpus
from data.sources.hub import HubCorpus
from data.sources.mix import MixCorpus, Part
from tests.support import configured

TEXTS = [f"row {i}" for i in range(50)]


@pytest.fixture
def folder(tmp_path):
    for split, texts in (("train", TEXTS), ("test", ["x"])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts))
    return tmp_path


def test_hub_rows_are_documents_and_a_fraction_is_held_out(folder):
    found = list(configured(HubCorpus, path=str(folder), val_fraction=0.2).read())
    assert [d.text for d in found] == TEXTS
    assert [d.name for d in found] == [f"{folder}:{i}" for i in range(1, 51)]
    assert 3 < sum(d.held_out for d in found) < 20
    assert [d.text for d in configured(HubCorpus, path=str(folder), split="test").read()] == ["x"]
    assert [d.text for d in configured(HubCorpus, path=str(folder), limit=7).read()] == TEXTS[:7]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"config": "x"}, "data.config=x: {folder} has default"),
        ({"split": "x"}, "data.split=x: {folder} has train, test"),
        ({"column": "x"}, "{folder} has no column x, it has text, n: give one as data.column="),
        ({"column": "n"}, "{folder}:1 holds int in column n, not text: choose a column of strings"),
    ],
    ids=["config", "split", "column", "type"],
)
def test_hub_missing_choice_raises_error_with_choices(folder, settings, complaint):
    with pytest.raises(UserError) as caught:
        list(configured(HubCorpus, path=str(folder), **settings).read())
    assert complaint.format(folder=folder) in str(caught.value)


def test_hub_several_configs_without_choice_raises_error(folder):
    head = (
        "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n- config_name: b\n  data_files: test.jsonl\n---\n"
    )
    (folder / "README.md").write_text(head)
    with pytest.raises(UserError, match=r"data\.config is not set: .* has a, b"):
        list(configured(HubCorpus, path=str(folder)).read())
    assert [d.text for d in configured(HubCorpus, path=str(folder), config="b").read()] == ["x"]


def test_hub_folder_fingerprint_changes_with_files(folder):
    corpus = configured(HubCorpus, path=str(folder))
    before = corpus.fingerprint()
    (folder / "test.jsonl").touch()
    assert corpus.fingerprint() == before
    (folder / "test.jsonl").write_text('{"text": "y"}\n')
    assert corpus.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("train.jsonl", b'{"text": "x"}\n{oops\n', r"train\.jsonl:2 is not JSON"),
        ("train_2.jsonl", b'{"text": "x"}\n{"text": \xff}\n', r"train_2\.jsonl:2 is not JSON"),
        ("train_2.jsonl", b'{"tekst": "x"}\n', r"train_2\.jsonl has no column text, it has tekst"),
        ("train_2.parquet", b"PAR1 and no more", r"several formats, such as train\.jsonl and train_2\.parquet"),
    ],
    ids=["JSON", "bytes", "columns", "formats"],
)
def test_hub_folder_with_bad_file_raises_error_with_name(folder, caplog, name, content, complaint):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        list(configured(HubCorpus, path=str(folder)).read())
    assert "\n" not in str(caught.value) and not caplog.records


def test_hub_csv_not_utf8_far_down_raises_error_with_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"words\n" * 30_000 + b"\xff\n")
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8 text \(it holds the byte 0xff\): convert or exclude it"):
        list(configured(HubCorpus, path=str(tmp_path)).read())


def test_hub_rows_without_text_are_skipped_and_counted_as_by_files(folder):
    rows = [{"text": None}, {"text": "x"}, {"n": 2}, {"text": "y"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for corpus in (configured(HubCorpus, path=str(folder)), configured(FilesCorpus, path=f"{folder}/train.jsonl")):
        found = Contents()
        assert [d.text for d in found.documents_of(corpus)] == ["x", "y"]
        assert found.rows.lines() == ["2 of 4 rows have no text (column text)"]
    assert [d.text for d in configured(HubCorpus, path=str(folder), limit=2).read()] == ["x"]
    (folder / "train_2.jsonl").write_text('{"n": 3}\n')  # which a limit of 4 does not reach
    assert [d.text for d in configured(HubCorpus, path=str(folder), limit=4).read()] == ["x", "y"]
    with pytest.raises(UserError, match=r"train_2\.jsonl has no column text, it has n"):
        list(configured(HubCorpus, path=str(folder), limit=5).read())


def test_hub_folder_in_home_with_links_to_itself_is_read(folder, monkeypatch):
    (folder / "self").symlink_to(".")
    monkeypatch.setenv("HOME", str(folder.parent))
    corpus = configured(HubCorpus, path=f"~/{folder.name}")
    assert corpus.fingerprint() and not corpus.remote and [d.text for d in corpus.read()] == TEXTS
    assert [path.rpartition("/")[2] for path in corpus.sources()] == ["test.jsonl", "train.jsonl"]


def test_hub_damaged_file_in_library_format_raises_user_error(folder):
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    (folder / "train.json").write_text("[{oops")
    with pytest.raises(UserError, match=r"data\.path=.* cannot be read") as caught:
        list(configured(HubCorpus, path=str(folder)).read())
    assert "\n" not in str(caught.value)


def test_hub_empty_folder_raises_user_error(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="is an empty folder"):
        configured(HubCorpus, path=str(folder / "empty")).fingerprint()


@pytest.mark.parametrize("offline", [True, False], ids=["forbidden", "unreachable"])
def test_hub_unreachable_raises_user_error_after_one_request(monkeypatch, offline):
    """The library alone would retry for half a minute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    asked, urlopen = [], urllib.request.urlopen
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda what, timeout: asked.append(timeout) or urlopen(what, None, timeout)
    )
    for corpus in (configured(HubCorpus, path="owner/name"), configured(HubCorpus, path="owner/name", revision="main")):
        expected = "HF_HUB_OFFLINE" if offline else r"127\.0\.0\.1:9 does not answer: Connection refused: give"
        with pytest.raises(UserError, match=expected):
            corpus.fingerprint()
    assert asked == [] if offline else asked == [hub.TIMEOUT] * 2
    with pytest.raises(
        UserError, match=r"^data\.path='nonsense' is no folder \(a dataset .* is named owner/name\), and "
    ):
        configured(HubCorpus, path="nonsense").fingerprint()


def test_hub_invalid_name_raises_without_request(folder, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    for path, complaint in {
        "a/b/c": "nor named owner/name",
        "two words": "nor named owner/name",
        str(folder / "train.jsonl"): "is a file: data=files reads it",
    }.items():
        with pytest.raises(UserError, match=complaint):
            configured(HubCorpus, path=path).fingerprint()


def test_hub_full_commit_needs_no_request_for_fingerprint(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first, second = (configured(HubCorpus, path="owner/name", revision=digit * 40) for digit in "ab")
    assert first.fingerprint() != second.fingerprint()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        list(first.read())


def test_hub_branch_is_resolved_and_read_at_its_commit(folder, monkeypatch):
    """With a fake hub: the commit of a name is resolved once, and a failure midway is a one-line error."""
    import datasets

    asked, commit = [], "c" * 40
    rows = datasets.IterableDataset.from_generator(failing_rows)
    monkeypatch.setattr(hub, "_check_reachable", lambda path: None)
    monkeypatch.setattr(hub, "_commit_of", lambda path, revision: commit)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda **how: asked.append(how) or ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda **how: asked.append(how) or ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda **how: asked.append(how) or rows)
    corpus = configured(HubCorpus, path="owner/name")
    found = corpus.read()
    assert [next(found).text for _ in range(3)] == ["a", "b", "c"]
    assert {(how["path"], how["revision"]) for how in asked} == {("owner/name", commit)} and corpus.remote
    with pytest.raises(UserError, match=r"cannot be read \(after 3 documents\): the line is dead"):
        next(found)


def failing_rows():
    for text in "abc":
        yield {"text": text}
    raise ConnectionError("the line is dead")


def test_with_fixed_revision_keeps_commit_and_fingerprint(monkeypatch):
    """A branch moves on; the documents of a run do not. Both names find the same shards."""
    heads = {None: "a" * 40, "main": "a" * 40}
    commit_of = hub._commit_of
    monkeypatch.setattr(hub, "_commit_of", lambda path, revision: heads.get(revision, revision))
    corpus = configured(HubCorpus, path="owner/name")
    pinned, fingerprint = corpus.with_fixed_revision(), corpus.fingerprint()
    assert pinned.revision == "a" * 40 and pinned.cache_key() == corpus.cache_key()
    mix = configured(MixCorpus, parts={"web": Part(quota=1, corpus=corpus)})
    assert (
        mix.with_fixed_revision().parts["web"].corpus == pinned
        and mix.with_fixed_revision().cache_key() == mix.cache_key()
    )
    heads[None] = "b" * 40
    assert corpus.fingerprint() != fingerprint
    monkeypatch.setattr(hub, "_commit_of", commit_of)  # which asks nobody about a whole commit
    assert pinned.fingerprint() == fingerprint
