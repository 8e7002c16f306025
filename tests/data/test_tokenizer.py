"""Any text comes back exactly; the same text makes the same tokenizer."""

import json

import numpy as np
import pytest

from data.corpus import SyntheticCorpus
from data.errors import UserError
from data.tokenizer import END_OF_TEXT, BPEConfig, ByteConfig, load_tokenizer

TEXTS = [document.text for document in SyntheticCorpus(size=20).documents("train")]
AWKWARD = [
    "",
    "def f(x):\r\n\treturn x  # ½ of é, 漢字, 🙂🏽\n\n\n    done\n",
    "\0\x01\x7f\u0085\u2028\u200b",
    " " * 1_000_000,
    "a" * 200_000 + "\n" + "7" * 60_000,
    END_OF_TEXT * 3,
    "".join(chr(i) for i in range(0x3000)),
]


@pytest.fixture(scope="module", params=[ByteConfig(), BPEConfig(vocab_size=400)], ids=["byte", "bpe"])
def tokenizer(request):
    return request.param.train(TEXTS)


@pytest.mark.parametrize("text", AWKWARD, ids=["empty", "mixed", "control", "spaces", "runs", "special", "range"])
def test_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode_bytes(tokens.tolist()).decode() == text
    assert tokens.dtype == np.uint16
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())


def test_the_end_of_text_never_comes_out_of_plain_text(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode_bytes([tokenizer.end_of_text]) == b""
    assert tokenizer.byte_lengths[tokenizer.end_of_text] == 0


def test_bpe_is_deterministic_and_compresses():
    first, second = BPEConfig(vocab_size=400).train(TEXTS), BPEConfig(vocab_size=400).train(iter(TEXTS))
    assert first.hash == second.hash
    assert first.hash != BPEConfig(vocab_size=300).train(TEXTS).hash
    text = TEXTS[0]
    assert len(first.encode(text)) < len(text) / 2.5
    assert first.vocab_size <= 400


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.hash == tokenizer.hash
    assert again.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("damage", ["edit", "cut", "list", "missing"])
def test_a_damaged_file_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "tokenizer.json"
    BPEConfig(vocab_size=300).train(TEXTS).save(path)
    if damage == "edit":
        content = json.loads(path.read_text())
        content["tokens"][-1] = "QUFB"
        path.write_text(json.dumps(content))
    elif damage == "cut":
        path.write_text(path.read_text()[:-40])
    elif damage == "list":
        path.write_text("[]")
    else:
        path.unlink()
    with pytest.raises(UserError, match="the tokenizer") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate at character 2"):
        tokenizer.encode("ab\ud800")
