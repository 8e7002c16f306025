"""Tokenizers: every text round-trips, training is deterministic, and stored files are verified."""

import base64
import json
import os
import time
from base64 import b64encode
from random import Random

import numpy as np
import pytest

from common.checksummed_json import digest, with_checksum
from common.errors import UserError
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteConfig
from data.tokenizers.load import MAX_JSON_BYTES, load_tokenizer
from data.tokenizers.patterns import GPT2, PATTERN, PIECE
from data.tokenizers.vocabulary import END_OF_TEXT
from tests.data.opening import assert_opened
from tests.support import assert_one_line, configured
from training.run.migrate import migrate

TEXTS = [document.text for document in configured(SyntheticCorpus, size=20).documents("train")]
BPE = configured(BPEConfig, vocab_size=400).train([*TEXTS, "',\n\nx" * 200])
AWKWARD = [
    "",
    "def f(x):\r\n\treturn x  # ½ of é, 漢字, 🙂🏽\n\n\n    done\n",
    "\0\x01\x7f\u0085\u2028\u200b",
    " " * 1_000_000,
    "a" * 200_000 + "\n" + "7" * 60_000,
    END_OF_TEXT * 3,
    "".join(chr(i) for i in range(0x3000)),
]


@pytest.fixture(
    scope="module", params=[configured(ByteConfig), configured(BPEConfig, vocab_size=400)], ids=["byte", "bpe"]
)
def tokenizer(request):
    return request.param.train(TEXTS)


def test_tokenizer_any_text_round_trips(tokenizer):
    for text in AWKWARD:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode_bytes(tokens.tolist()).decode() == text
        assert tokens.dtype == np.uint16
        assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())


def test_encode_spelled_end_of_text_gives_no_special_token(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode_bytes([tokenizer.end_of_text]) == b""
    assert tokenizer.byte_lengths[tokenizer.end_of_text] == 0


def test_bpe_training_is_deterministic_and_compresses():
    first, second = (
        configured(BPEConfig, vocab_size=400).train(TEXTS),
        configured(BPEConfig, vocab_size=400).train(iter(TEXTS)),
    )
    assert first.hash == second.hash
    assert first.hash != configured(BPEConfig, vocab_size=300).train(TEXTS).hash
    text = TEXTS[0]
    assert len(first.encode(text)) < len(text) / 2.5
    assert first.vocab_size <= 400


def test_load_tokenizer_gives_saved_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.hash == tokenizer.hash
    assert again.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


OLDER_FILES = [{"kind": "byte"}] + [
    {"kind": kind, "pattern": pattern, "tokens": [b64encode(token).decode() for token in BPE.tokens]}
    for kind, pattern in (("bpe", PATTERN), ("published", GPT2))
]


@pytest.mark.parametrize("described", OLDER_FILES, ids=["byte", "bpe", "published"])
def test_load_tokenizer_of_older_run_keeps_hash_and_cut(described, tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_checksum(described))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert found.hash == digest(described)
    found.save(tmp_path / "again.json")
    again = load_tokenizer(tmp_path / "again.json")
    text = "x" * (PIECE - 3) + "',\n\nx"
    assert again.hash == found.hash
    assert again.encode(text).tolist() == found.encode(text).tolist()
    if described["kind"] == "bpe":  # cut between the line ends, which one token holds
        assert found.decode(found.encode(text)[-4:]) == "',\n\nx"
        assert found.encode(text).tolist() != BPE.encode(text).tolist() == BPE.encoding.encode_ordinary(text)


def test_bpe_settings_of_older_runs_give_same_tokenizer_and_cache_key():
    older = configured(BPEConfig, vocab_size=400, cut="line_ends")
    assert older.cache_key() == {"vocab_size": 400, "train_bytes": 100_000_000}  # as recorded before there was a cut
    assert older.train(TEXTS).hash == "a276b2b55160ffcfd5df22c50663a1535c9d269f1f87b7fac2cc9b3544f9d68f"
    assert configured(BPEConfig, vocab_size=400).cache_key() == older.cache_key() | {"cut": "exact"}


@pytest.mark.parametrize(
    ("target", "cut"),
    [("data.tokenizer.BPEConfig", "line_ends"), ("data.published.GPT2Config", "words")],
)
def test_migrate_tokenizer_of_older_run_sets_older_cut(target, cut):
    assert migrate({"tokenizer": {"_target_": target}}, 2)["tokenizer"]["cut"] == cut
    assert "cut" not in migrate({"tokenizer": {"_target_": "data.tokenizer.ByteConfig"}}, 2)["tokenizer"]


def test_tokenizer_json_opens_in_hugging_face_with_same_tokens(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert_opened(path, tokenizer, [TEXTS[0], *AWKWARD[:3], AWKWARD[4], AWKWARD[6], "x\n  y \r\n\n  "])


def test_bpe_training_on_long_words_is_fast():
    """Training time grows by the square of a word's length: a text of one word would take minutes."""
    text = "".join(Random(0).choices("abcdefgh", k=300_000)) + "7" * 100_000 + " " * 200_000
    began = time.monotonic()
    trained = configured(BPEConfig, vocab_size=1000).train([text])
    assert time.monotonic() - began < 10
    assert trained.decode(trained.encode(text)) == text


def test_bpe_training_on_lone_surrogate_raises_error():
    with pytest.raises(UserError, match="surrogate at character 2"):
        configured(BPEConfig, vocab_size=300).train(["ab\ud800"])


def older(**changes) -> str:
    return with_checksum(OLDER_FILES[1] | changes)


def newer(change) -> str:
    """A changed tokenizer.json with a valid hash."""
    content = BPE.content()
    del content["model"]["headroom"]["hash"]
    change(content["model"])
    content["model"]["headroom"]["hash"] = digest(content)
    return json.dumps(content)


OLDER_TOKENS = OLDER_FILES[1]["tokens"]
FOREIGN = {
    "no JSON": [
        "",  # empty
        newer(lambda model: None)[:-40],  # cut
        "[]",  # list
        "1" * 5000,  # number
        "[" * 50_000,  # deep
        '{"a":' * 50_000 + "1" + "}" * 50_000,  # deep object
        '{"hash": "0", "kind": ' + "[" * 900 + "]" * 900 + "}",  # deep within
        b"\xff\xfe{}",  # not UTF-8
        " " * (MAX_JSON_BYTES + 1),  # too large
    ],
    "another hash": [
        json.dumps(OLDER_FILES[1]),  # no hash
        json.dumps(OLDER_FILES[1] | {"hash": "0" * 64}),  # hash of another
        newer(lambda model: None).replace('"ignore_merges": true', '"ignore_merges": false'),  # edited
        '{"hash": "\\ud800"}',  # surrogate
    ],
    "another kind or cut": [
        older(kind="unigram"),  # another kind
        older(cut="anywhere"),  # another cut
        older(kind=["bpe"]),  # kind is a list
        newer(lambda model: model.update(headroom={"kind": "byte"})),  # bytes of another kind
        '{"model": {"headroom": "bpe"}}',  # facts are text
        '{"model": []}',  # model is a list
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',  # somebody else's
    ],
    "pattern": [
        older(pattern="(?!)"),  # pattern matches nothing
        older(pattern="a"),  # pattern of one letter
        older(pattern="(["),  # pattern does not compile
        older(pattern="(a+)+$"),  # pattern takes forever
        older(pattern=3),  # pattern is a number
        with_checksum({"kind": "bpe", "tokens": OLDER_TOKENS}),  # no pattern
    ],
    "tokens": [
        with_checksum(
            OLDER_FILES[1] | {"tokens": [*OLDER_TOKENS, base64.b64encode(b"ab" * 100_000).decode()]}
        ),  # endless token
        older(tokens=[]),  # no tokens
        older(tokens=OLDER_TOKENS[1:]),  # a byte lacking
        older(tokens=[*OLDER_TOKENS, OLDER_TOKENS[-1]]),  # a token twice
        older(tokens=[*OLDER_TOKENS, "*"]),  # no base64
        older(tokens=[*OLDER_TOKENS, ""]),  # token of no bytes
        older(tokens=[*range(256)]),  # tokens are numbers
        older(tokens=[["QQ=="]]),  # tokens are lists
        older(tokens=None),  # tokens are null
        older(tokens=[*OLDER_TOKENS, b64encode(END_OF_TEXT.encode()).decode()]),  # text that ends the text
    ],
    "merges": [
        newer(lambda model: model["merges"].append(["a", "漢"])),  # a merge of nothing
        newer(lambda model: model["merges"].append(["~", "~"])),  # a merge to nothing
        newer(lambda model: model["merges"].append(["a", "b", "c"])),  # a merge of three
        newer(lambda model: model["merges"].append([[], []])),  # merges of lists
        newer(lambda model: model.update(merges=1)),  # merges are a number
    ],
    "ranks": [
        newer(lambda model: model["vocab"].update(zzzz=10**9)),  # a gap in the ranks
        newer(lambda model: model["vocab"].update(zzzz=5)),  # a rank twice
        newer(lambda model: model["vocab"].update(a="5")),  # ranks of text
        newer(lambda model: model["vocab"].update(a=True)),  # a rank that is true
        newer(lambda model: model["vocab"].update({"漢": len(BPE.tokens)})),  # a character of no byte
        newer(lambda model: model.update(vocab=[])),  # vocab is a list
        newer(lambda model: model.update(vocab={}, merges=[])),  # vocab is empty
    ],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_load_tokenizer_foreign_or_damaged_file_raises_user_error(what, tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in FOREIGN[what]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 500, content[:200]
        assert_one_line(caught.value)


def test_load_tokenizer_of_what_is_no_file_raises_user_error(tmp_path):
    for kind, make in {"missing": lambda path: None, "folder": os.mkdir, "pipe": os.mkfifo}.items():
        make(tmp_path / kind)
        with pytest.raises(UserError, match=f"{kind} cannot be read"):
            load_tokenizer(tmp_path / kind)


def test_encode_lone_surrogate_raises_error(tokenizer):
    with pytest.raises(UserError, match="surrogate at character 2"):
        tokenizer.encode("ab\ud800")
