"""No document is in both splits: identical documents are in the same one, in a file, in several, in a mix; and older
runs keep their held-out documents."""

import hashlib
import json
from pathlib import Path

import pytest

from common.errors import UserError
from data.shards.prepare import prepare
from data.sources.corpus import hash_sample
from data.sources.files import FilesCorpus
from data.sources.hub import HubCorpus
from data.sources.mix import MixCorpus, Part
from data.sources.python_source import StdlibCorpus, SympyCorpus
from data.tokenizers.byte import ByteConfig
from tests.support import configured
from training.run.migrate import migrate

TEXTS = [f"text {i % 150}" for i in range(600)]


@pytest.fixture
def folder(workplace):
    (workplace / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    for name in ("a.jsonl", "b.jsonl", "rows/train.jsonl"):
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return workplace


def sides(corpus) -> tuple[set[str], set[str]]:
    found = list(corpus.read())
    return {d.text for d in found if not d.held_out}, {d.text for d in found if d.held_out}


@pytest.mark.parametrize(
    "corpus",
    [
        configured(FilesCorpus, path="*.jsonl"),
        configured(FilesCorpus, path="a.txt", document="line"),
        configured(FilesCorpus, path="a.txt", document="\\n"),
        configured(HubCorpus, path="rows", val_fraction=0.1),
        configured(
            MixCorpus,
            parts={
                "files": Part(quota=1, corpus=configured(FilesCorpus, path="a.jsonl")),
                "again": Part(quota=1, corpus=configured(FilesCorpus, path="*.jsonl")),
                "hub": Part(quota=1, corpus=configured(HubCorpus, path="rows", val_fraction=0.1)),
            },
        ),
    ],
    ids=["rows", "lines", "separated", "hub", "mix"],
)
def test_split_identical_documents_are_in_one_split(folder, corpus):
    corpus.fingerprint()
    train, val = sides(corpus)
    assert not train & val and train | val == set(TEXTS) and 5 < len(val) < 30


def test_split_default_corpora_share_no_text():
    """Files are split by a hash of their path, so texts could be in both; only empty ones are."""
    for corpus in (configured(SympyCorpus), configured(StdlibCorpus)):
        train, val = sides(corpus)
        assert train & val <= {""}


def older(**settings) -> FilesCorpus | HubCorpus:
    """The corpus of settings that a run of format 2 stored."""
    hub = settings.pop("hub", False)
    kind = "data.hub.HubCorpus" if hub else "data.files.FilesCorpus"
    stored = migrate({"data": {"_target_": kind, "document_mask": False} | settings}, 2)["data"]
    cls = HubCorpus if hub else FilesCorpus
    assert stored.pop("_target_") == f"{cls.__module__}.{cls.__name__}"
    return configured(cls, **stored)


def test_split_settings_of_older_runs_give_same_documents(folder):
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfa\rb\r\n\nc\n")
    (folder / "rows.json").write_text('[{"text": "x"}]\n')
    (folder / "page.html").write_text("<html>\n</html>\n")
    for corpus in (older(path="a.jsonl"), older(path="rows", val_fraction=0.1, hub=True)):
        assert [d.held_out for d in corpus.read()] == [hash_sample(i, 0.1) for i in range(600)]
    for name in ("bom.txt", "rows.json", "page.html"):
        corpus = older(path=name)
        content = Path(name).read_bytes()
        assert "".join(d.text for d in corpus.read()).encode() == content
        assert corpus.fingerprint() == hashlib.sha256(b"2" + hashlib.sha256(content).digest()).hexdigest()
    assert [d.text for d in older(path="bom.txt", document="line").read()] == ["\ufeffa\rb", "c"]


def test_cache_key_settings_of_older_runs_is_unchanged(folder):
    """The name of prepared shards contains a hash of them."""
    assert older(path="a.txt", document="line").cache_key() == {
        "path": "a.txt",
        "column": None,
        "document": "line",
        "val_fraction": 0.1,
    }
    assert older(path="rows", hub=True).cache_key() == {
        "path": "rows",
        "config": None,
        "split": "train",
        "column": "text",
        "limit": None,
        "val_fraction": 0.01,
    }
    made = prepare(older(path="a.jsonl"), configured(ByteConfig), folder / "cache")
    assert made.folder.name == "files-byte-8ea3c2293727"
    assert (
        prepare(configured(FilesCorpus, path="a.jsonl"), configured(ByteConfig), folder / "cache").folder != made.folder
    )


def mix(**parts) -> MixCorpus:
    return configured(MixCorpus, parts={name: Part(quota=1, corpus=corpus) for name, corpus in parts.items()})


CLASHES = {
    "two units of one file": (
        {"a": configured(FilesCorpus, path="a.txt"), "b": configured(FilesCorpus, path="*.txt", document="line")},
        r"data\.parts\.a and data\.parts\.b both read a\.txt, .*: give one of them other files, or both the same",
    ),
    "two fractions of one file": (
        {"a": configured(FilesCorpus, path="a.txt"), "b": configured(FilesCorpus, path="a.txt", val_fraction=0.2)},
        "both read a.txt",
    ),
    "two fractions of texts": (
        {"a": configured(FilesCorpus, path="a.jsonl"), "b": configured(HubCorpus, path="rows")},
        r"data\.parts\.a\.val_fraction=0\.1 and data\.parts\.b\.val_fraction=0\.01 .*: give both the same val_fraction",
    ),
    "a link to one file": (
        {"a": configured(FilesCorpus, path="a.txt"), "b": configured(FilesCorpus, path="link.txt", document="line")},
        "both read link.txt",
    ),
    "the source of a corpus": (
        {"a": configured(SympyCorpus), "b": configured(FilesCorpus, path=f"{SympyCorpus._root()}/core/ad*.py")},
        r"both read .*core/add\.py",
    ),
}


@pytest.mark.parametrize(("parts", "complaint"), CLASHES.values(), ids=CLASHES)
def test_mix_parts_with_conflicting_splits_raise_error(folder, parts, complaint):
    (folder / "link.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match=complaint):
        mix(**parts).fingerprint()


def test_mix_parts_with_same_split_may_share_files(folder):
    same = mix(
        a=configured(FilesCorpus, path="a.txt"),
        b=configured(FilesCorpus, path="*.txt"),
        c=configured(FilesCorpus, path="a.jsonl"),
    )
    train, val = sides(same)
    assert same.fingerprint() and not train & val
    by_index = older(path="a.jsonl", val_fraction=0.2)  # of an older mix, which goes on as it began
    assert mix(
        a=configured(FilesCorpus, path="a.jsonl"), b=by_index, c=older(path="a.jsonl", document="row")
    ).fingerprint()
