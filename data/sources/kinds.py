"""Detect the kind of a file by its name and first bytes, and refuse files whose format would be trained on as text."""

import codecs
from pathlib import Path

from common.errors import UserError
from data.sources.compression import CODECS, content_name
from data.sources.tables import FORMATS

HEAD_BYTES = 2**12  # that are checked
MARK = codecs.BOM_UTF8  # the byte order mark, which is not part of the text
MAGIC = {  # first bytes of files that may look like text, or whose kind explains more than "not UTF-8" does
    b"%PDF-": "a PDF",
    b"{\\rtf": "RTF",
    b"PK\x03\x04": "a zip archive (as .docx and .epub are)",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
MARKUP = {
    ".html": "HTML",
    ".htm": "HTML",
    ".xhtml": "HTML",
    ".ipynb": "a Jupyter notebook",
}
WAY_OUT = (
    f"convert or exclude it; what is read is UTF-8 text, and tables named {' '.join(FORMATS)}, "
    f"also compressed as {' '.join(CODECS)}"
)
AS_IT_IS = "to train on it as it is, give data.document=file"


def check_is_text(path: str, head: bytes) -> None:
    """Raises UserError where the first bytes show that a file is not text. head: its first HEAD_BYTES bytes."""
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {kind}, as its first bytes say: {WAY_OUT}")
    check_no_nul(path, 0, head)


def check_no_nul(path: str, start: int, content: bytes) -> None:
    """Raises UserError for NUL bytes. start: the offset of the content in the file."""
    if b"\0" in content:
        place = start + content.index(b"\0")
        raise UserError(
            f"{path} holds NUL bytes (the first at byte {place}), as UTF-16, UTF-32 and binary files do, so it is not "
            f"UTF-8 text: {WAY_OUT}"
        )


def check_no_markup(path: str, head: bytes) -> None:
    """Raises UserError for pages and notebooks: a model would learn their tags and braces."""
    kind = MARKUP.get(Path(content_name(path)).suffix.lower())
    if kind is None and head.removeprefix(MARK).lstrip().lower().startswith((b"<!doctype html", b"<html")):
        kind = "an HTML page, as it begins"
    if kind is not None:
        raise UserError(f"{path} is {kind}: convert it to text or exclude it; {AS_IT_IS}")
