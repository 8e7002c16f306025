"""A text's score against its definition, token by token."""

import math

import pytest
import torch

from common.errors import UserError
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteTokenizer
from generation.scoring import score_text
from tests.support import configured, logits_of, small_model

TEXT = "The query sees the key, é漢🙂. " * 30


@pytest.mark.parametrize("length", [2, 30, 64, 65, 66, 129, 700])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_score_text_of_any_length_predicts_every_token_but_the_first_once(length, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else configured(BPEConfig, vocab_size=270).train([TEXT])
    model = small_model("attention=mla", vocab_size=tokenizer.vocab_size)  # a context of 64
    text = TEXT[:length]
    tokens = tokenizer.encode(text).tolist()
    nats = 0.0
    for i in range(1, len(tokens)):
        window = tokens[(i - 1) // 64 * 64 : i]
        with torch.no_grad():
            nats -= float(logits_of(model, torch.tensor([window]))[0, -1].log_softmax(-1)[tokens[i]])
    score = score_text(model, tokenizer, text, 64)
    text_bytes = len(text.encode()) - len(tokenizer.tokens[tokens[0]])
    assert (score.tokens, score.text_bytes) == (len(tokens) - 1, text_bytes)
    assert score.loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert score.bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("text", ["", "x"])
def test_score_text_with_nothing_to_predict_is_refused(text):
    with pytest.raises(UserError, match="nothing to predict"):
        score_text(small_model("attention=mha", vocab_size=257), ByteTokenizer(), text, 64)
