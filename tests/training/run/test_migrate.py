"""Stored settings of older formats, as this program names them."""

from common.suggestions import RENAMED
from tests.support import load_composed
from training.run.config import dump, load
from training.run.migrate import FORMAT, PART_RENAMED_4, RUN_RENAMED_4, migrate


def test_migrate_format_3_gives_settings_their_new_names():
    run = load_composed("optim=muon", "optim.per_head=false", "max_skipped_updates=7", "activation_checkpointing=true")
    old = {key: value for key, value in dump(run).items() if key != "threads"}
    old["most_skipped"] = old.pop("max_skipped_updates")
    old["checkpoint_activations"] = old.pop("activation_checkpointing")
    old["optim"] |= {"_target_": "training.muon.MuonConfig", "logical_blocks": False}
    del old["optim"]["per_head"]
    assert load(migrate(old, 3)) == run
    assert migrate(dump(run), FORMAT) == dump(run)


def test_renamed_settings_are_the_migrated_ones():
    (optim,) = PART_RENAMED_4.values()
    assert RUN_RENAMED_4 | {f"optim.{old}": f"optim.{new}" for old, new in optim.items()} == RENAMED
