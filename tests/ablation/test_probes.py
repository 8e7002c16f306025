"""Probes of in-context copying: by hand, on models whose attention or predictions are given, and on a trained run."""

import math
import sys

import pytest
import torch

from ablation import probes
from data.batches import Batch
from model.kernels.naive import Naive
from model.transformer import Hidden
from tests.support import QUICK, TINY, call, logits_of, small_config, small_model, some_tokens

HEADS = 4
LAYERS = 2


class Attending:
    """A model whose attention maps are given: every head of the last layer attends as `keys` (T,) says, the others to
    the first token."""

    def __init__(self, keys: torch.Tensor):
        self.keys = keys
        self.layers = [None] * LAYERS
        self.config = small_config(kernel=Naive())

    def __call__(self, tokens, **_) -> Hidden:
        maps = torch.zeros(LAYERS, 1, HEADS, len(self.keys), len(self.keys))
        maps[:-1, ..., 0] = 1
        maps[-1, 0, :, torch.arange(len(self.keys)), self.keys] = 1
        return Hidden(tokens, {f"layers.{i}.attention_map": layer for i, layer in enumerate(maps)}, tokens)


class Copier:
    """A model that predicts, sure of it, the token that stood `distance` before the one to come."""

    def __init__(self, vocab_size: int, distance: int):
        self.vocab_size = vocab_size
        self.distance = distance

    def __call__(self, tokens) -> Hidden:
        copied = tokens.roll(self.distance - 1, 1)
        x = 50.0 * torch.nn.functional.one_hot(copied, self.vocab_size)
        return Hidden(x, {}, x)

    def logits(self, x):
        return x


def windows(*rows: list[int]) -> list:
    tokens = torch.tensor(rows)
    return [lambda: Batch(tokens[:, :-1], tokens[:, 1:])]


def test_bigram_seen_is_true_from_its_second_occurrence_on():
    tokens = torch.tensor([[1, 2, 3, 1, 2, 1, 3, 1, 2], [5, 5, 5, 5, 6, 5, 6, 6, 6]])
    found = probes.bigram_seen(tokens[:, :-1], tokens[:, 1:])
    # 12 23 31 12 21 13 31 12 and 55 55 55 56 65 56 66 66
    assert found.int().tolist() == [[0, 0, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0, 1]]


def test_losses_by_kind_are_means_over_the_tokens_of_each_kind():
    model = small_model()
    tokens = some_tokens(6, 41, vocab_size=5)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batches = [lambda: Batch(inputs[:4], targets[:4]), lambda: Batch(inputs[4:], targets[4:])]
    found = probes.losses_by_kind(model, batches)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(logits_of(model, inputs).mT, targets, reduction="none")
    seen = probes.bigram_seen(inputs, targets)
    assert 0.2 < found.share < 0.9
    assert found.share == pytest.approx(seen.float().mean().item())
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.seen == pytest.approx(losses[seen].mean().item(), rel=1e-5)
    assert found.new == pytest.approx(losses[~seen].mean().item(), rel=1e-5)


def test_losses_by_kind_of_a_kind_that_does_not_occur_are_nan():
    found = probes.losses_by_kind(small_model(), windows([1, 2, 3, 4, 5]))
    assert math.isnan(found.seen)
    assert found.share == 0
    assert found.new == found.loss


def test_repeated_tokens_are_two_equal_halves_and_the_same_for_a_seed():
    found = probes.repeated_tokens(100, 30, 3, seed=1)
    assert found.shape == (3, 60)
    assert torch.equal(found[:, :30], found[:, 30:])
    assert torch.equal(found, probes.repeated_tokens(100, 30, 3, seed=1))
    assert not torch.equal(found, probes.repeated_tokens(100, 30, 3, seed=2))


def test_copying_is_right_for_a_model_that_repeats_and_wrong_for_another():
    repeated = probes.repeated_tokens(100, 16, texts=20)  # more than a batch
    right, wrong = (probes.copying(Copier(100, distance), repeated) for distance in (16, 15))
    assert right.accuracy == 1
    assert right.loss == pytest.approx(0, abs=1e-4)
    assert wrong.accuracy < 0.1
    assert wrong.loss > 40


def test_probe_scores_are_one_for_heads_that_attend_so():
    half = 8
    repeated = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:half].repeat(3, 2)  # each token once
    index = torch.arange(2 * half)
    before = probes.previous_token_scores(Attending((index - 1).clamp(min=0)), repeated)
    after = Attending((index - half + 1).clamp(min=0))
    assert before.shape == (LAYERS, HEADS)
    assert (before[-1] == 1).all()
    assert before[0, 0] == pytest.approx(1 / (2 * half - 1))  # token 1's, of those that attend to the first token
    assert (probes.induction_scores(after, repeated)[-1] == 1).all()
    assert (probes.matching_scores(after, repeated)[-1] == 1).all()
    assert (probes.induction_scores(after, repeated)[0] == 0).all()


def test_matching_scores_count_every_earlier_occurrence():
    tokens = torch.tensor([[7, 8, 7, 9, 7]])
    keys = torch.tensor([0, 0, 1, 0, 3])  # tokens 2 and 4 have earlier occurrences, which 1, and 1 and 3, follow
    assert (probes.matching_scores(Attending(keys), tokens)[-1] == 1).all()
    keys = torch.tensor([0, 0, 0, 0, 1])
    assert (probes.matching_scores(Attending(keys), tokens)[-1] == 0.5).all()


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_probe_scores_of_uniform_attention_are_one_over_the_keys(attention):
    model = small_model(f"attention={attention}")
    for block in model.layers:
        for parameter in block.attention.q_proj.parameters():
            parameter.data.zero_()
    found = probes.previous_token_scores(model, some_tokens(2, 20))
    expected = torch.arange(2, 21).reciprocal().mean()
    torch.testing.assert_close(found, expected.expand(LAYERS, HEADS))


def run_probes(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["probes", *arguments])
    try:
        probes.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_probes_table_has_a_row_for_each_checkpoint_with_its_loss(workplace, monkeypatch, capsys):
    assert call("train", [*TINY, "run_dir=runs/one"], monkeypatch) == 0
    trained = probes.checkpoint.newest(workplace / "runs/one", ())
    capsys.readouterr()
    assert run_probes(monkeypatch, "runs/one") == 0
    newest = capsys.readouterr().out.splitlines()
    assert tuple(newest[0].split()) == probes.COLUMNS
    assert newest[1].split()[:2] == ["one", "4"]
    assert float(newest[1].split()[2]) == pytest.approx(trained.manifest.val_loss, abs=0.02)  # trained in bfloat16
    assert run_probes(monkeypatch, "runs/one", "--every-checkpoint") == 0
    every = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in every[1:]] == ["2", "4"]
    assert every[-1].split() == newest[-1].split()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/one", "--tokens=3"], ("--tokens=3", "64 or more")),
        (["runs/none"], ("runs/none",)),
        (["runs/one", "--tokens=x"], ("'x'", "whole number")),
    ],
)
def test_probes_bad_arguments_exit_with_one_line(arguments, words, workplace, monkeypatch, capsys):
    if "runs/one" in arguments:
        assert call("train", [*QUICK, "steps=1", "run_dir=runs/one"], monkeypatch) == 0
        capsys.readouterr()
    assert run_probes(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert all(word in said[0] for word in words)
