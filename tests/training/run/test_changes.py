"""Each setting says whether it may change on resume, for fine-tuning, or never."""

import pytest

from common.errors import UserError
from common.settings import Change
from tests.support import SMOKE, changed, composed_run, composed_tree
from training.run.changes import change_of, forbidden_differences
from training.run.config import Run
from training.run.folder import write_config
from training.run.resume import open_run


def test_run_fields_all_carry_one_mark():
    for name, field in Run.model_fields.items():
        assert sum(isinstance(mark, Change) for mark in field.metadata) == 1, name


CHANGE_OF = {
    "steps": Change.ON_RESUME,
    "logger.mode": Change.ON_RESUME,
    "seed": Change.FINE_TUNING,
    "data.val_fraction": Change.FINE_TUNING,
    "optim.lr": Change.FINE_TUNING,
    "kernel": Change.FINE_TUNING,
    "model.dropout": Change.FINE_TUNING,
    "model.context_length": Change.FINE_TUNING,
    "attention.rope_factor": Change.FINE_TUNING,
    "model.d_model": Change.NEVER,
    "attention": Change.NEVER,
    "attention.window": Change.FINE_TUNING,
    "mlp.d_ff": Change.NEVER,
    "mlp.bias": Change.NEVER,
    "tokenizer.vocab_size": Change.NEVER,
    "position": Change.NEVER,
    "no.such": Change.NEVER,
}


def test_change_of_a_setting_is_its_fields_or_its_groups():
    run = composed_run("attention=mla", "tokenizer=bpe")
    assert {key: change_of(run, key) for key in CHANGE_OF} == CHANGE_OF


def test_forbidden_differences_depend_on_the_change_and_pass_over_places():
    before = composed_run("data=files", "data.path=a.txt")
    changes = ["steps=9", "optim.beta2=0.5", "attention.dropout=0.1", "mlp=gelu"]
    now = composed_run("data=files", "data.path=b.txt", *changes)

    def keys(change):
        return {different.key for different in forbidden_differences(before, now, change)}

    assert keys(Change.FINE_TUNING) == {"mlp._target_", "mlp.approximate"}
    assert keys(Change.ON_RESUME) == keys(Change.FINE_TUNING) | {"optim.beta2", "attention.dropout"}


def test_resuming_reads_the_configuration_a_fixed_number_of_times(workplace, monkeypatch):
    settings = [*SMOKE, "attention=gqa", "attention.window=5", "model.d_model=64", "optim.beta2=0.9", "seed=3"]
    (workplace / "run").mkdir()
    write_config(workplace / "run", composed_run(*settings))
    loads = []
    from_tree = Run.from_tree
    monkeypatch.setattr(Run, "from_tree", lambda tree: loads.append(1) or from_tree(tree))
    typed = ["resume=run", *settings[2:], "steps=77"]
    run, _ = open_run("run", composed_tree(*settings, "steps=77"), typed)
    assert run.steps == 77 and len(loads) == 3


CHANGES = ["attention.n_kv_heads=3", "attention=mha", "position=rope", "experiment=smoke", "optim=adamw"]


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_names_the_setting_that_was_typed(workplace, change):
    settings = ["attention=gqa", "attention.window=5", "optim=muon"]
    (workplace / "run").mkdir()
    write_config(workplace / "run", composed_run(*settings))
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key} cannot change on resume: only steps, "):
        open_run("run", composed_tree(*changed(settings, change)), ["resume=run", "attention.window=5", change])
