"""conf/ has one reader: train.py, `compose` and the parts of stacks and mixes see what Hydra composes."""

import sys

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train
from common.errors import UserError
from tests.support import NEEDS, ROOT
from training.run.composer import choice, choices, compose_tree
from training.run.config import MODEL_PARTS, RUN_PARTS, Run, compose

TYPED = [
    (),
    ("attention=mla", "steps=300", "optim.lr=1e-3"),
    ("attention=stack", "attention.parts.global.attention=mla"),
    ("model=gpt2_medium", "attention=mla"),
    ("experiment=baseline", "optim=muon"),
    ("experiment=shakespeare_char", "data.path='*.txt'", "tokenizer=bpe"),
    ("position=learned", "attention=gqa", "model.norm=layer"),
    ("+attention=gqa", "data=files", "data.path=a b.txt", "run_dir=~/x"),
    ("data=mix", "data.parts={sympy: 0.7, texts: {quota: 0.5, data: files, path: '*.txt'}}"),
    ("tokenizer=gpt2", "cache_dir=elsewhere"),
    ("init_from=latest", "sample_prompt=7"),
]


@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_compose_within_hydra_and_without_equals_the_command_line(typed, monkeypatch):
    found = {}

    def trained(tree, typed_to_hydra):
        outer = GlobalHydra.instance().hydra
        found["within"] = compose_tree(*typed)
        assert outer is not None and GlobalHydra.instance().hydra is outer
        found["command line"] = tree

    monkeypatch.setattr(train, "train", lambda tree, typed: trained(tree, typed))
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    GlobalHydra.instance().clear()
    train.main()
    assert found["within"] == found["command line"] == compose_tree(*typed)
    assert GlobalHydra.instance().hydra is None
    del found["command line"]["resume"]
    assert compose(*typed) == Run.from_tree(found["command line"])


def test_compose_refuses_what_the_command_line_does():
    with pytest.raises(UserError, match="give steps twice"):
        compose("steps=3", "steps=4")
    with pytest.raises(UserError, match="resume= goes on with a run's own settings"):
        compose("resume=latest")


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in MODEL_PARTS | RUN_PARTS for name in choices(group)], ids=str
)
def test_choice_alone_is_what_hydra_composes_of_it(group, name):
    """Those too whose file is read without Hydra."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        found = OmegaConf.to_container(hydra_compose(f"{group}/{name}")[group])
    assert choice(group, name) == found
    if group not in ("attention", "tokenizer"):  # which position= and cache_dir have a say in
        whole = compose_tree(f"{group}={name}", *NEEDS.get((group, name), ()))[group]
        assert choice(group, name).keys() == whole.keys()
        assert {key: value for key, value in whole.items() if value != found[key]}.keys() <= {"path", "parts"}
