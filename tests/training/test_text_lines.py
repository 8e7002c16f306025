"""What a dry run says of the text: all of it where it is here, what is prepared where it is not."""

import json

import numpy as np

from data.shards.prepare import prepare
from data.sources import hub
from data.sources.files import FilesCorpus
from data.sources.hub import HubCorpus
from data.sources.tokens import TokensCorpus
from data.tokenizers.byte import ByteConfig
from tests.support import configured
from training import text_lines as module
from training.text_lines import text_lines


def lines(corpus, folder) -> list[str]:
    return [*text_lines(corpus, prepare(corpus, configured(ByteConfig), folder / "cache"))]


def test_text_lines_describe_files(workplace, monkeypatch):
    rows = [{"q": "1234567", "a": f"ab{i % 40:02}\x07"} for i in range(50)]
    (workplace / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = configured(FilesCorpus, path="a.jsonl", column="a", held_out_by="index")
    text, documents, characters = lines(corpus, workplace)
    assert text == "text         300 tokens of 0.83 bytes on average: 250 B"
    assert documents.startswith(
        "documents    50 documents, 10 of them identical to an earlier one; the longest has 5 B: a"
    )
    assert characters.startswith("characters   50 of 250 are no text: ")
    monkeypatch.setattr(module, "examine", lambda data, examine=module.examine: examine(data, 100))
    text, documents, _ = lines(corpus, workplace)
    assert text.endswith(": about 250 B") and documents.startswith(
        "documents    of the first 100 B: 20 documents, 0 of"
    )
    pairs = corpus.model_copy(update={"prompt": "q"})
    assert (
        "700 tokens of 0.93 bytes on average, 43% of them counted, the others of prompts" in lines(pairs, workplace)[0]
    )


def test_text_lines_of_what_is_not_here_tell_what_is_prepared(workplace, monkeypatch):
    np.full(300, 97, "<u2").tofile(workplace / "a.bin")
    (line,) = lines(configured(TokensCorpus, path="a.bin"), workplace)
    assert line == "text         1 file, 0 ends of text; 300 tokens of 1.00 bytes on average: about 300 B"
    (workplace / "rows").mkdir()
    (workplace / "rows" / "a.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(90)))
    corpus = configured(HubCorpus, path="rows", val_fraction=0.2)
    made = prepare(corpus, configured(ByteConfig), workplace / "cache")
    monkeypatch.setattr(hub.HubCorpus, "remote", True)
    monkeypatch.setattr(hub.HubCorpus, "read", None)
    (line,) = text_lines(corpus, made)
    assert line.startswith("text         1 file, 90 documents; ")
