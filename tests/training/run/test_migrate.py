"""Stored settings of older formats, as this program names them."""

import pytest

from common.suggestions import RENAMED
from tests.support import ATTENTIONS, composed_run
from training.run.config import Run, dump
from training.run.migrate import FORMAT, PART_RENAMED_4, RUN_RENAMED_4, migrate


def test_migrate_format_3_gives_settings_their_new_names():
    run = composed_run("optim=muon", "optim.per_head=false", "max_skipped_updates=7", "activation_checkpointing=true")
    old = {key: value for key, value in dump(run).items() if key != "threads"}
    old["most_skipped"] = old.pop("max_skipped_updates")
    old["checkpoint_activations"] = old.pop("activation_checkpointing")
    old["optim"] |= {"_target_": "training.muon.MuonConfig", "logical_blocks": False}
    del old["optim"]["per_head"]
    assert Run.from_tree(migrate(old, 3)) == run
    assert migrate(dump(run), FORMAT) == dump(run)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_migrate_format_2_gives_settings_of_later_versions_the_behaviour_of_its_day(attention):
    run = composed_run("experiment=v1", f"attention={attention}")
    later = {"position", "rope_dim", "rope_scaling", "rope_factor", "rope_original_context", "dropout", "k_rope_from"}
    later |= {
        "position_embedding",
        "norm",
        "bias",
        "logit_softcap",
        "zero_init",
        "own_logit_init",
        "qk_norm_groups",
        "approximate",
    }

    def older(tree):
        return (
            {key: older(value) for key, value in tree.items() if key not in later} if isinstance(tree, dict) else tree
        )

    assert Run.from_tree(migrate(older(dump(run)), 2)) == run


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_migrate_keeps_the_rate_that_biases_had(optim):
    run = composed_run(f"optim={optim}", "optim.lr=0.01")
    older = dump(run)
    del older["optim"]["bias_lr"]
    for format in (4, 5):
        assert Run.from_tree(migrate(older, format)).optim.bias_lr == 0.01
    stated = composed_run(f"optim={optim}", "optim.lr=0.01", "optim.bias_lr=0.02")
    assert Run.from_tree(migrate(dump(stated), 6)) == stated


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_migrate_format_7_gives_optimizers_no_groups(optim):
    run = composed_run(f"optim={optim}")
    older = dump(run)
    del older["optim"]["groups"]
    assert Run.from_tree(migrate(older, 7)) == run
    grouped = composed_run(f"optim={optim}", "optim.groups=[{match: '*.mlp.*', lr: 0.1}]")
    assert migrate(dump(grouped), FORMAT) == dump(grouped)
    assert Run.from_tree(dump(grouped)) == grouped


def test_migrate_format_8_gives_models_neither_indexer_nor_multi_token_prediction():
    run = composed_run("attention=gqa")
    older = dump(run)
    del older["model"]["mtp_depth"], older["model"]["mtp_weight"], older["attention"]["indexer"]
    assert Run.from_tree(migrate(older, 8)) == run
    later = composed_run("attention=dsa", "model.mtp_depth=1", "model.mtp_weight=0.1")
    assert migrate(dump(later), FORMAT) == dump(later)


def test_migrate_format_9_gives_kernel_auto_no_tiles():
    older = dump(composed_run("attention.window=8"))
    del older["kernel"]["tiles"]
    assert Run.from_tree(migrate(older, 9)) == composed_run("attention.window=8", "kernel.tiles=false")
    assert Run.from_tree(migrate(older, FORMAT)) == composed_run("attention.window=8")


def test_migrate_format_10_gives_norms_their_eps_and_values_the_bias_that_they_had():
    run = composed_run("attention=gqa", "model.bias=true")
    older = dump(run)
    del older["model"]["norm_eps"], older["attention"]["v_bias"]
    assert Run.from_tree(migrate(older, 10)) == run
    later = composed_run("attention=gqa", "attention.v_bias=true", "model.norm_eps=1e-5")
    assert migrate(dump(later), FORMAT) == dump(later)


@pytest.mark.parametrize("mlp", ["gelu", "relu", "relu2", "swiglu", "moe"])
@pytest.mark.parametrize("bias", [False, True])
def test_migrate_format_11_gives_mlps_the_biases_of_their_model(mlp, bias):
    run = composed_run(f"mlp={mlp}", f"model.bias={bias}")
    older = dump(run)
    assert older["mlp"].pop("bias") is bias
    assert Run.from_tree(migrate(older, 11)) == run
    later = composed_run(f"mlp={mlp}", f"model.bias={bias}", f"mlp.bias={not bias}")
    assert migrate(dump(later), 11) == dump(later)


def test_migrate_format_10_gives_files_no_prompts():
    data = "data.parts={files: {quota: 1, path: a.csv}, sympy: 1}"
    for run in (composed_run("data=files", "data.path=a.csv"), composed_run("data=mix", data)):
        older = dump(run)
        files = older["data"]["parts"]["files"]["corpus"] if "parts" in older["data"] else older["data"]
        del files["prompt"], files["prompt_end"]
        assert Run.from_tree(migrate(older, 10)) == run


def test_renamed_settings_are_the_migrated_ones():
    (optim,) = PART_RENAMED_4.values()
    moved = {"data.document_mask": "document_mask"}  # format 7
    assert RUN_RENAMED_4 | {f"optim.{old}": f"optim.{new}" for old, new in optim.items()} | moved == RENAMED


def test_migrate_moves_the_document_mask_of_a_corpus_and_of_parts_to_the_run():
    parts = {"a": {"quota": 1, "corpus": {"_target_": "x", "size": 3, "document_mask": False}}}
    old = {"data": {"_target_": "y", "parts": parts, "document_mask": True}}
    expected = {"a": {"quota": 1, "corpus": {"_target_": "x", "size": 3}}}
    since = {"parallel": {"_target_": "training.parallel.config.OneProcess"}}  # of format 10
    assert migrate(old, 6) == {"document_mask": True, "data": {"_target_": "y", "parts": expected}} | since


def test_migrate_format_7_keeps_the_first_loss_that_a_run_had():
    run = composed_run("model.own_logit_init=null")
    older = dump(run)
    del older["model"]["own_logit_init"]
    assert Run.from_tree(migrate(older, 7)) == run
    stated = composed_run("model.own_logit_init=1")
    assert stated == composed_run(), "the default, filled in"
    assert Run.from_tree(migrate(dump(stated), 7)) == stated
