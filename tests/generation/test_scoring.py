"""A text's score, and that of each token, against its definition."""

import math

import pytest
import torch

from common.errors import UserError
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteTokenizer
from generation import scoring
from generation.scoring import TokenScore, score_text
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
    for first in range(0, len(tokens) - 1, 64):  # one window after the other
        following = torch.tensor(tokens[first + 1 : first + 65])
        with torch.no_grad():
            shares = logits_of(model, torch.tensor([tokens[first : first + len(following)]]))[0].log_softmax(-1)
        nats -= float(shares.gather(-1, following[:, None]).sum())
    score = score_text(model, tokenizer, text, 64)
    text_bytes = len(text.encode()) - len(tokenizer.tokens[tokens[0]])
    assert (score.tokens, score.text_bytes) == (len(tokens) - 1, text_bytes)
    assert score.loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert score.bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("text", ["", "x"])
def test_score_text_with_nothing_to_predict_is_refused(text):
    with pytest.raises(UserError, match="nothing to predict"):
        score_text(small_model("attention=mha", vocab_size=257), ByteTokenizer(), text, 64)


def watched(model, tokenizer, text: str) -> tuple[scoring.Score, list[TokenScore]]:
    found = []
    return score_text(model, tokenizer, text, 64, [found.extend]), found


@pytest.mark.parametrize("softcap", ["null", "5"])
def test_score_text_watchers_see_the_nats_rank_and_likeliest_others_of_every_token(monkeypatch, softcap):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 7 * 257)  # seven tokens at a time
    tokenizer, text = ByteTokenizer(), TEXT[:150]
    model = small_model("attention=gqa", f"model.logit_softcap={softcap}", vocab_size=257)
    _, (first, *found) = watched(model, tokenizer, text)
    tokens = tokenizer.encode(text).tolist()
    assert first == TokenScore(tokens[0]) and first.probability is None
    for i, one in enumerate(found, 1):
        with torch.no_grad():
            shares = logits_of(model, torch.tensor([tokens[(i - 1) // 64 * 64 : i]]))[0, -1].softmax(-1)
        order = shares.argsort(descending=True).tolist()
        assert one.token == tokens[i] and one.rank == 1 + order.index(tokens[i])
        assert one.probability == pytest.approx(float(shares[tokens[i]]), rel=1e-4)
        likeliest = [token for token in order if token != tokens[i]][:3]
        assert [token for token, _ in one.others] == likeliest
        assert [share for _, share in one.others] == pytest.approx(shares[likeliest].tolist(), rel=1e-4)


@pytest.mark.parametrize("length", [2, 30, 64, 65, 66, 700])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_score_text_watched_tokens_are_the_whole_text_and_add_up_to_the_same_score(length, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else configured(BPEConfig, vocab_size=270).train([TEXT])
    model = small_model("attention=mla", vocab_size=tokenizer.vocab_size)
    score, found = watched(model, tokenizer, TEXT[:length])
    assert score == score_text(model, tokenizer, TEXT[:length], 64)  # to the last bit
    assert sum(one.nats for one in found[1:]) == pytest.approx(score.nats, rel=1e-12)
    assert tokenizer.decode_bytes(one.token for one in found) == TEXT[:length].encode()


def test_score_text_watched_logits_exist_for_a_part_of_the_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 10 * 257)
    model = small_model("attention=mha", vocab_size=257)
    sizes = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: sizes.append(len(x)) or logits(x))
    _, found = watched(model, ByteTokenizer(), TEXT[:400])
    assert max(sizes) == 10 and sum(sizes) == len(found) - 1


def test_score_text_watched_tokens_that_are_not_finite_have_no_rank():
    model = small_model("attention=mha", vocab_size=257)
    with torch.no_grad():
        model.embedding.weight[ord("y")] = math.nan
    _, found = watched(model, ByteTokenizer(), "xy")
    assert math.isnan(found[1].nats) and found[1].rank is found[1].probability is None and not found[1].others


def test_score_text_others_of_a_tiny_vocabulary_are_all_but_the_token():
    tokenizer = ByteTokenizer()
    tokenizer.tokens = tokenizer.tokens[:2]
    _, found = watched(small_model("attention=mha", vocab_size=3), tokenizer, "\0\1\0")
    assert [sorted([one.token, *(token for token, _ in one.others)]) for one in found[1:]] == [[0, 1, 2]] * 2


def test_score_text_of_a_long_text_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(scoring, "SECONDS_OF_SILENCE", 0)
    model = small_model("attention=mha", "model.n_layers=1", vocab_size=257)
    score_text(model, ByteTokenizer(), "a" * 64 * 8 * 4, 64)
    assert "[40% of the text is scored]" in capsys.readouterr().err
