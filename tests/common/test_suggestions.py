"""Which setting is suggested for a name that does not exist."""

import pytest

from common import conf_files
from common.conf_files import choices, groups
from common.errors import UserError
from common.suggestions import ALIASES, known_settings, no_such_choice, no_such_setting
from training.run.config import compose

ALL = {f"{group}.{key}" for group in groups() for name in choices(group) for key in conf_files.keys(group, name)}
GUESSES = {
    "attn": "attn: no such setting; did you mean attention?",
    "run": "run: no such setting; did you mean resume?",
    "epochs": "epochs: no such setting; did you mean steps?",
    "attention.heads": "attention.heads: no such setting; did you mean model.n_heads?",
    "learning_rate": "learning_rate: no such setting; did you mean optim.lr?",
    "optim.learning_rate": "optim.learning_rate: no such setting; did you mean optim.lr?",
    "grad_accum": "grad_accum: no such setting; did you mean batch_tokens or micro_batch_size?",
    "batch_size": "batch_size: no such setting; did you mean batch_tokens or micro_batch_size?",
    "setps": "setps: no such setting; did you mean steps?",
    "eval_evry": "eval_evry: no such setting; did you mean eval_every?",
    "optm.lr": "optm.lr: no such setting; did you mean optim.lr?",
    "n_layer": "n_layer: no such setting; did you mean model.n_layers?",
    "dropout": "dropout: no such setting; did you mean attention.dropout or model.dropout?",
    "atention": "atention: no such setting; did you mean attention?",
    "experimnt": "experimnt: no such setting; did you mean experiment?",
    "model.attention.n_kv_heads": "model.attention.n_kv_heads: no such setting; did you mean attention.n_kv_heads?",
    "vocab": "vocab: no such setting; did you mean tokenizer.vocab_size?",
    "lr": "lr: no such setting; did you mean optim.lr?",
    "attention.local.window": "attention.local.window: no such setting; did you mean attention.parts.local.window? It "
    "belongs to attention=stack",
    "data.sympy.val_fraction": "data.sympy.val_fraction: no such setting; did you mean data.parts.sympy.val_fraction? "
    "It belongs to data=mix",
    "attention.n_kv_head": "attention.n_kv_head: no such setting of attention=mha; did you mean n_kv_heads?",
    "attention.rope_teta": "attention.rope_teta: no such setting of attention=mha; did you mean rope_theta?",
    "attention.top_k": "attention.top_k: no such setting of attention=mha; did you mean indexer.top_k?",
    "data.pth": "data.pth: no such setting of data=sympy; did you mean path? It belongs to data=files",
    "data.path": "data.path: no such setting of data=sympy; it belongs to data=files",
    "model.d_modl": "model.d_modl: no such setting of model=tiny; did you mean d_model?",
    "optim.lrr": "optim.lrr: no such setting of optim=muon; did you mean lr?",
    "most_skipped": "most_skipped is called max_skipped_updates now: write max_skipped_updates=",
    "optim.logical_blocks": "optim.logical_blocks is called optim.per_head now: write optim.per_head=",
}
# Beside an override that chooses: the setting is looked for in that choice.
BESIDE_A_CHOICE = {
    ("attention.kv_lora", "attention=mla"): "of attention=mla; did you mean kv_lora_rank?",
    ("attention.n_kv_head", "attention=mla"): "did you mean n_kv_heads? It belongs to attention=gqa or mha or mqa",
    ("model.norn", "model=classic_gpt"): "of model=classic_gpt; did you mean norm?",
    ("mlp.aproximate", "model=classic_gpt"): "of mlp=gelu; did you mean approximate?",
    ("data.sise", "experiment=smoke"): "of data=synthetic; did you mean size?",
    ("data.prompt", "data=hub"): "of data=hub; it belongs to data=files",
}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a.txt", "did you mean data=files data.path=a.txt? Or choose one of copy, files, "),
        ("books/*.txt", "did you mean data=files 'data.path=books/*.txt'? Or choose one of copy, files, "),
        ("folder/there", "did you mean data=files data.path=folder/there? Or choose one of copy, files, "),
        ("owner/name", "did you mean data=hub data.path=owner/name? Or choose one of copy, files, "),
        ("sympi", "choose one of copy, files, "),
    ],
)
def test_no_such_choice_place_of_text_names_the_corpus_that_reads_it(workplace, typed, meant):
    (workplace / "folder/there").mkdir(parents=True)
    assert no_such_choice("data", typed).startswith(f"data={typed}: {meant}")


def test_no_such_setting_common_guess_names_what_is_meant():
    for key, line in GUESSES.items():
        assert no_such_setting(key).startswith(line)


def test_no_such_setting_beside_a_choice_names_what_that_choice_has():
    for (key, chosen), line in BESIDE_A_CHOICE.items():
        assert line in no_such_setting(key, [chosen, "steps=3"])
    assert "of attention=mha; it belongs to attention=dsa or mla" in no_such_setting("attention.kv_lora_rank")


def test_no_such_setting_nothing_near_points_to_the_lists_of_all():
    for key in ("foo", "attention.local.foo", "optim.foo.bar", "experiment.foo"):
        line = no_such_setting(key)
        assert line.startswith(f"{key}: no such setting; ") and "did you mean" not in line and len(line) < 300
        assert "train.py --help lists them" in line and "settings.md explains them" in line


def test_no_such_setting_of_a_part_names_the_part():
    stack = ["attention=stack"]
    assert no_such_setting("attention.local.window", stack).endswith("did you mean attention.parts.local.window?")
    line = no_such_setting("attention.window", stack)
    assert "it belongs to attention=dsa or gqa or mha or mla or mqa" in line
    assert line.endswith("so set it in a part, as attention.parts.local.window=")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "optim.groups={a: 1}",
            "optim.groups is a list: .*, as 'optim.groups=\\[{match: \"layers.*\", lr: 0.001}\\]'$",
        ),
        ("optim.groups.0.lr=1", "optim.groups is a list"),
        ("optim.groups.match=norm.weight", "optim.groups is a list"),
        ("attention.pattern={a: 1}", r"list: give it as a whole, as 'attention.pattern=\[local, global\]'$"),
        ("attention.pattern.2=local", "attention.pattern is a list"),
        ("attention.parts=[1]", "attention.parts=.*: give a dict, as 'attention.parts={name: value}'$"),
    ],
)
def test_compose_value_that_fits_no_list_or_dict_is_refused_with_an_example(override, line):
    """Hydra itself says that it cannot merge it, or raises what it did not mean to."""
    with pytest.raises(UserError, match=line) as refused:
        compose("attention=stack", "attention.pattern.0=global", override)
    assert str(refused.value).startswith(f"{override}: ")


def test_aliases_are_no_settings_and_name_some():
    known = {*known_settings([]).settings, *groups(), *ALL}
    assert {one for meant in ALIASES.values() for one in meant} <= known
    assert not ALIASES.keys() & {*known_settings([]).at_the_top(), *groups()}
    assert {key.partition(".")[2] for key in ALL} & ALIASES.keys() <= {
        "block_size",
        "name",
    }  # of sparse masks, of an optimizer
