"""Rates that no run survives are warned of, the usual ones and what is not known are not."""

import logging

import pytest

from tests.support import SMOKE, call, composed_run
from training.large_rates import warn_large_rates

TYPED = {
    "muon": (["optim.lr=1e9"], "optim.lr=1e+09 is 32,000,000,000 times the 0.0312 that optim=muon has unset"),
    "muon's own": (["optim.muon_lr=3"], "optim.muon_lr=3 is 150 times the 0.02 that optim=muon has unset"),
    "sgd": (["optim=sgd", "optim.lr=1e9"], "optim.lr=1e+09 is 10,000,000,000 times the 0.1 that optim=sgd has unset"),
    "biases": (["optim=adamw", "optim.bias_lr=1"], "optim.bias_lr=1 is 128 times the 0.00781"),
    "usual": (["optim=adamw", "optim.lr=0.5"], None),
    "unset": ([], None),
    "no usual one": (["optim=torch", "optim.name=Adadelta", "optim.lr=1"], None),
}


@pytest.mark.parametrize(("typed", "warning"), TYPED.values(), ids=TYPED)
def test_warn_large_rates_names_the_rate_and_the_usual_one(caplog, typed, warning):
    chosen = next((word.removeprefix("optim=") for word in typed if word.startswith("optim=")), "muon")
    with caplog.at_level(logging.WARNING, "headroom"):
        warn_large_rates(composed_run(*SMOKE, *typed), typed, chosen)
    assert len(caplog.messages) == (warning is not None)
    assert not warning or caplog.messages[0].startswith(warning)


def test_train_with_a_large_rate_warns_and_goes_on(workplace, monkeypatch, capsys):
    assert call("train", [*SMOKE, "optim=sgd", "optim.lr=1e9", "dry_run=true"], monkeypatch) == 0
    assert "optim.lr=1e+09 is 10,000,000,000 times the 0.1 that optim=sgd has unset" in capsys.readouterr().err
