"""The report on a corpus counts its documents, what repeats, and what of it is no text."""

from data import report
from data.report import examine
from data.sources import contents, files
from data.sources.files import FilesCorpus
from tests.support import configured


def test_report_counts_what_is_in_the_text(workplace, monkeypatch):
    texts = {"a": "words é\n" * 40, "b": "words é\n" * 40, "c": "a\x00\x07\x7f\ufffd\t\r\n\x0c" * 9, "d": "x" * 999}
    texts["c"] = texts["c"].replace("\x00", "\x01")  # NUL bytes are refused
    for name, text in texts.items():
        (workplace / f"{name}.txt").write_bytes(text.encode())
    for part in (50, 2**24):
        monkeypatch.setattr(files, "PART_BYTES", part)
        found = examine(configured(FilesCorpus, path="*.txt"))
        assert (found.documents, found.identical, found.compared, found.whole) == (4, 1, True, True)
        assert found.bytes == sum(len(text.encode()) for text in texts.values())
        assert (found.no_text, found.characters) == (4 * 9, sum(map(len, texts.values())))
        assert (found.longest, found.longest_name) == (999, "d.txt")


def test_report_stops_at_its_limits_and_says_so(workplace, monkeypatch):
    (workplace / "a.txt").write_text("".join(f"line {i % 30}\n" for i in range(300)))
    corpus = configured(FilesCorpus, path="a.txt", document="line")
    monkeypatch.setattr(contents, "MAX_COMPARED", 60)
    found = examine(corpus)
    assert (found.documents, found.identical, found.compared, found.whole) == (60, 30, False, True)
    assert not examine(corpus, max_bytes=100).whole and examine(corpus, max_bytes=100).bytes < 110
    assert report.MAX_BYTES > 2**28
