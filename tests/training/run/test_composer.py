"""train.py, `compose` and the parts of stacks and mixes see what Hydra composes, and complain in the same words."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import train
from common.conf_files import choices, content, groups, hydra_initialized
from common.errors import UserError
from tests import composition
from tests.support import NEEDS, ROOT, call, composed_run, composed_tree
from training.run.composer import choice, compose_request, compose_tree, merged, request_of
from training.run.config import Run, compose, dump, pop_command_settings
from training.run.experiments import experiment_named
from training.run.migrate import migrate
from training.run.parts import MODEL_PARTS, RUN_PARTS

MODELS_OWN = ("qk_norm", "qk_bias", "attention_dropout")  # since format 5
GROUPS = groups()
TYPED = [
    (),
    ("attention=mla", "steps=300", "optim.lr=1e-3"),
    (
        "model=classic_gpt",
        "attention=stack",
        "attention.parts.global.attention=mla",
        "attention.parts.local.dilation=2",
    ),
    ("model=gpt2_medium", "attention=mla"),
    ("experiment=baseline", "optim=muon"),
    ("experiment=shakespeare_char", "data.path='*.txt'", "tokenizer=bpe"),
    ("position=learned", "attention=gqa", "model.norm=layer"),
    ("+attention=gqa", "data=files", "data.path=a b.txt", "run_dir=~/x"),
    ("data=mix", "data.parts={sympy: 0.7, texts: {quota: 0.5, data: files, path: '*.txt'}}"),
    ("tokenizer=gpt2", "cache_dir=elsewhere"),
    ("init_from=latest", "sample_prompt=7"),
]


def asked(words: Sequence[str], monkeypatch) -> dict:
    """The tree that a command line asks to train."""
    found = []
    monkeypatch.setattr(train, "train", lambda tree, typed, choices: found.append(tree))
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    GlobalHydra.instance().clear()
    train.main()
    assert GlobalHydra.instance().hydra is None
    return found[0]


@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_compose_equals_the_command_line(typed, monkeypatch):
    assert asked(typed, monkeypatch) == compose_tree(*typed)


PLAIN = ("steps=300", "optim.lr=1e-3", "optim.beta2=0.25", "attention.dropout=0", "optim.momentum_warmup=-1")
PLAIN += ("compile=false", "minutes=null", "device=cpu", "run_dir=runs/a.b", "eval_tokens=x")
# Of settings or in words that only Hydra knows.
SPARSE = ("attention.window=5", "attention.dilation=2", "attention.mask_diagonal=true")  # no settings of gqa's file
NOT_PLAIN = (
    "steps=1e3",
    "peak_flops=inf",
    "compile=True",
    "cache_dir=x",
    "attention.window=5",
    "sample_prompt='a b'",
    "device=07",
)


def whole_composition(*words: str) -> Any:
    """All that Hydra composes, its own settings too, or how it refuses."""
    try:
        with hydra_initialized():
            composed = OmegaConf.to_container(hydra_compose("train", list(words), return_hydra_config=True))
        return repr(sorted(composed.items()))
    except ConfigCompositionException as error:
        return str(error), str(error.__cause__)


def test_composition_for_tests_sets_plain_values_as_hydra_does():
    """What most tests compose by, which takes Hydra once per set of choices."""
    chosen = ["attention=mla", "experiment=smoke", "data=sympy"]
    # An experiment with settings of Hydra's, and choices and values of them.
    hydras = ["experiment=study/attention", "hydra/job_logging=default", "hydra.verbose=true", "hydra.run.dir=x"]
    composition.compose_fast(False)
    try:
        read_again = compose_tree(*chosen, *PLAIN)
        whole = [whole_composition(*words) for words in ((), hydras, ["hydra.run.dirr=x"])]
    finally:
        composition.compose_fast()
    assert repr(compose_tree(*chosen, *PLAIN)) == repr(read_again)
    assert [whole_composition(*words) for words in ((), hydras, ["hydra.run.dirr=x"])] == whole
    assert [word for word in PLAIN if composition.composed_by_hydra([word])] == []
    assert composition.composed_by_hydra([*chosen, *PLAIN]) == chosen
    assert repr(composition.tree_of(*chosen, *PLAIN)) == repr(compose_tree(*chosen, *PLAIN))
    assert composition.request_of([*PLAIN, *chosen]) == compose_request([*PLAIN, *chosen])
    for words in (NOT_PLAIN, SPARSE):
        assert repr(composition.tree_of("attention=gqa", *words)) == repr(compose_tree("attention=gqa", *words))
    before = composition._tree.cache_info().misses
    composition.tree_of("attention=gqa", *SPARSE)
    assert composition._tree.cache_info().misses == before
    with pytest.raises(UserError, match="did you mean steps"):
        composition.tree_of("stepz=3")


def test_compose_request_of_a_value_of_hydras_own_is_the_same_with_a_flag(monkeypatch):
    word = "run_dir='runs/${hydra:job.name}'"
    assert asked([word], monkeypatch) == asked([word, "--run"], monkeypatch)


def test_compose_within_hydra_and_without_equals_the_command_line_with_a_flag(monkeypatch):
    typed, within = TYPED[2], []

    def asked_within(cfg):
        outer = GlobalHydra.instance().hydra
        within.append(compose_tree(*typed))
        assert outer is not None and GlobalHydra.instance().hydra is outer
        return request_of(cfg)

    monkeypatch.setattr(train, "request_of", asked_within)
    tree = asked([*typed, "--run"], monkeypatch)
    assert tree == within[0] == compose_tree(*typed)
    pop_command_settings(tree)
    assert compose(*typed) == Run.from_tree(tree)


MISTAKES = {
    "no choice": ("attention=nope",),
    "null for a choice": ("attention=null",),
    "a list for a choice": ("optim=[1]",),
    "a null in a list for a choice": ("model=[null]",),
    "no choice in two groups": ("model=gpt2", "data=nope"),
    "a setting of another choice": ("attention=mla", "attention.n_kv_heads=3"),
    "a slip": ("attention=mla", "attention.kv_lora=3"),
    "a slip of an added setting": ("+attention.n_kv_head=3",),
    "a setting of no one": ("foo=1",),
    "a setting of no one taken away": ("~foo",),
    "a name of another program": ("learning_rate=1",),
    "a setting twice": ("steps=3", "steps=4"),
    "no setting": ("foo",),
    "a flag": ("--steps", "3"),
    "several values": ("attention=mha,mla",),
    "an unreadable value": ("attention.pattern=[~,~]",),
    "an unset one": ("data=files",),
    "an interpolation": ("steps=${nope}",),
    "a wrong type": ("steps=abc",),
    "a name of no part": ("attention=stack", "attention.parts.lokal.window=2"),
}


@pytest.mark.parametrize("typed", MISTAKES.values(), ids=MISTAKES)
def test_compose_mistake_gives_the_line_of_the_command_line(typed, workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest", "model=nope"])  # not what is composed
    with pytest.raises(UserError) as refused:
        compose(*typed)
    assert "\n" not in str(refused.value)
    assert call("train", list(typed), monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {refused.value}"


def test_compose_resume_is_refused():
    with pytest.raises(UserError, match="resume= goes on with a run's own settings"):
        compose("resume=latest")


@pytest.mark.parametrize("group", MODEL_PARTS | RUN_PARTS)
def test_choice_alone_is_what_hydra_composes_of_it(group):
    """Those too whose file is read without Hydra; of the others nothing but Hydra is asked."""
    for name in choices(group):
        found = choice(group, name)
        if "defaults" not in content(group, name):
            GlobalHydra.instance().clear()
            with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
                assert found == OmegaConf.to_container(hydra_compose(f"{group}/{name}")[group])
        if group not in ("attention", "tokenizer"):  # which position= and cache_dir have a say in
            whole = composed_tree(f"{group}={name}", *NEEDS.get((group, name), ()))[group]
            assert found.keys() == whole.keys()
            changed = {key: value for key, value in whole.items() if value != found[key]}
            assert changed.keys() <= {"path", "parts", "name"}, name


ROPE = {"position": "rope", "qk_bias": True, "dropout": 0.0}
CLASSIC = {"position": "none", "qk_bias": False, "dropout": 0.1}
# Key heads of gqa, heads, width of a head; of mla the widths of the latent, without rotation, with; what all have.
DERIVED = {
    "classic_gpt": (2, 4, 32, (32, 32, 0), CLASSIC, False),
    "gpt2": (3, 12, 64, (192, 16, 48), ROPE, True),
    "gpt2_medium": (4, 16, 64, (208, 16, 48), ROPE, True),
    "mini": (2, 4, 16, (16, 4, 12), ROPE, True),
    "small": (2, 6, 64, (96, 16, 48), ROPE, True),
    "tiny": (2, 4, 32, (32, 8, 24), ROPE, True),
}
ALONE = ["gqa", "mha", "mla", "mqa"]  # that ship


def expected_of(model: str, attention: str) -> dict[str, Any]:
    key_heads, heads, width, (latent, nope, rope), common, qk_norm = DERIVED[model]
    expected = common | {"window": None}
    if attention == "mla":
        expected |= {"kv_lora_rank": latent, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": width}
        return expected | {"qk_norm": "whole" if qk_norm else "latent", "q_lora_rank": 0}
    n_kv_heads = {"mha": heads, "gqa": key_heads, "mqa": 1}[attention]
    expected |= {"n_kv_heads": n_kv_heads, "head_dim": width, "qk_norm": qk_norm}
    return expected | {"rope_dim": width if common is ROPE else None}


@pytest.mark.parametrize("model", choices("model"))
def test_attention_setting_that_is_unset_derives_from_the_model_alone_and_in_a_stack(model):
    alone = {name: composed_run(f"model={model}", f"attention={name}").model.attention for name in ALONE}
    for name, attention in alone.items():
        expected = expected_of(model, name)
        assert {key: getattr(attention, key) for key in expected} == expected
    for pair in zip(ALONE[::2], (ALONE[1:] + ALONE[:1])[::2], strict=True):
        two = dict(zip(("global", "local"), pair, strict=True))
        stacked = [f"attention.parts.{part}.attention={name}" for part, name in two.items()]
        parts = composed_run(f"model={model}", "attention=stack", *stacked).model.attention.parts
        windowed = alone[two["local"]].model_copy(update={"window": 64})
        assert parts == {"global": alone[two["global"]], "local": windowed}


@pytest.mark.parametrize("attention", choices("attention"))
def test_composed_attention_fits_every_model_and_is_what_is_built(attention):
    """But for what is unset there, which is derived."""
    for model in choices("model"):
        typed = f"model={model}", f"attention={attention}"
        tree, config = composed_tree(*typed), composed_run(*typed).model
        run = dump(composed_run(*typed))
        assert all(config.attention.of_layer(i).cache_elements > 0 for i in range(config.n_layers))
        stated = {key: value for key, value in tree["model"].items() if value != "auto"}
        assert {key: run["model"][key] for key in stated} == stated
        set_there = {key: value for key, value in tree["attention"].items() if value not in (None, "all")}
        indexer = {key: value for key, value in set_there.pop("indexer", {}).items() if value is not None}
        assert run["attention"].get("indexer", {}).items() >= indexer.items()
        set_there.pop("parts", None)
        assert {key: run["attention"][key] for key in set_there} == set_there
        switches = choice("mask", "sparse").keys() if attention != "stack" else set()
        assert tree["attention"].keys() | switches == run["attention"].keys()


@pytest.mark.parametrize("group", GROUPS)
def test_config_of_every_choice_loads_and_survives_storage(group):
    for name in choices(group):
        run = composed_run(f"{group}={name}", *NEEDS.get((group, name), ()), "document_mask=true")
        again = Run.from_tree(yaml.safe_load(yaml.safe_dump(dump(run))))  # what config.yaml will hold
        assert again == run and again.document_mask, name


def kind(group: str, name: str) -> Any:
    """What the choices of a group have in common of which one stands for all: their class, their folder, or the groups
    in which they choose."""
    found, folder = content(group, name), name.rpartition("/")[0]
    chosen = tuple(key for default in found.get("defaults", ()) if isinstance(default, dict) for key in default)
    return found.get("_target_") or folder or (chosen if group == "experiment" else name)


def one_of_each_kind(group: str) -> list[str]:
    return list({kind(group, name): name for name in reversed(choices(group))}.values())


def covering(offered: Callable[[str], list[str]]) -> Iterator[dict[str, str]]:
    """Choices in every group, so that any two offered in different groups are together in one of these."""
    # A published shape states a whole model.
    offers = {group: [(group, name) for name in offered(group) if not name.startswith("shape/")] for group in GROUPS}
    pairs = itertools.combinations(GROUPS, 2)
    missing = {frozenset(two) for a, b in pairs for two in itertools.product(offers[a], offers[b])}
    while missing:
        row = sorted(min(missing, key=sorted))
        for group in [group for group in GROUPS if group not in dict(row)]:
            row.append(max(offers[group], key=lambda one: sum(frozenset((one, other)) in missing for other in row)))
        missing -= {frozenset(two) for two in itertools.combinations(row, 2)}
        yield dict(row)


# Why two choices may not go together, and what is typed instead.
WAYS_OUT = {
    "kernel=flex cannot attend to what an indexer chooses: choose kernel=auto": "kernel=auto",
    "kernel=flex compiles itself: choose compile=false, or kernel=auto": "compile=false",
    "mask=sparse does not go with a stack, whose parts have their own masks: set it there, as "
    "attention.parts.local.dilation=": "mask=causal",
    **{
        f"data={name} is written in numbers, a token each: choose tokenizer=numbers": "tokenizer=numbers"
        for name in ("mqar", "needle", "copy")
    },
    "data=tokens has no text to train a tokenizer on: name the one that its tokens were made with, as tokenizer=gpt2": (
        "tokenizer=gpt2"
    ),
    "tokenizer=numbers needs tokenizer.size= with text, or data that is written in numbers, as data=mqar": (
        "tokenizer.size=100"
    ),
}


def refusal(tree: dict[str, Any], typed: list[str]) -> str | None:
    pop_command_settings(tree)
    try:
        with experiment_named(typed):
            Run.from_tree(tree)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("offered", [one_of_each_kind, pytest.param(choices, marks=pytest.mark.slow)])
def test_compose_any_two_choices_go_together_or_are_refused_by_name(offered):
    """As kernel=flex by experiment=gpt2_124m, which compiles. What the command line chooses goes before what an
    experiment does, and whole: nothing that the experiment would have chosen instead is left in it. What an experiment
    sets itself holds of whichever is chosen; where that has no such key, or does not go with it, the experiment is
    named."""
    refused = set()
    for row in covering(offered):
        typed = [f"{group}={name}" for group, name in row.items()]
        needs = [need for group in ("data", "optim") for need in NEEDS.get((group, row[group]), ())]
        needs = [need for need in needs if need.partition("=")[0] not in row]  # of what is chosen here
        tree, ways_out = composed_tree(*typed, *needs), []
        for group in ("model", "data", "tokenizer", "optim", "schedule"):
            alone = composed_tree(f"{group}={row[group]}", *NEEDS.get((group, row[group]), ()))[group]
            by_position = {"position_embedding": tree[group]["position_embedding"]} if group == "model" else {}
            assert tree[group] == alone | content("experiment", row["experiment"]).get(group, {}) | by_position, typed
        while problem := refusal(tree, typed):
            _, blames, name = problem.rstrip(")").partition(f" (experiment={row['experiment']} sets ")
            if blames:
                group, _, key = name.rpartition(".")
                assert problem.startswith((f"{name}=", f"{key}=")) and not any(f"{name}=" in word for word in typed)
                assert key in content("experiment", row["experiment"])[group]
                break
            assert problem.split()[0] in typed and WAYS_OUT[problem] not in ways_out
            ways_out.append(WAYS_OUT[problem])
            tree = composed_tree(*merged(*typed, *ways_out), *needs)
            refused.add(problem)
    assert refused == WAYS_OUT.keys()


def test_kv_lora_rank_by_default_leaves_room_for_the_widest_key_of_flash_kernels():
    def found(*typed: str) -> int:
        return composed_run("attention=mla", *typed).model.attention.kv_lora_rank

    assert found("model=gpt2_medium") == 208 and found("model=gpt2_medium", "attention.qk_rope_head_dim=32") == 224
    assert found("model=gpt2_medium", "position=none") == 256 and found("model=gpt2_medium", "position=alibi") == 248
    assert found("model=gpt2_medium", "attention.kv_lora_rank=300") == 300
    assert [found("model.d_model=2048", f"model.n_heads={heads}") for heads in (16, 8, 2)] == [192, 192, 192]
    assert found("model.d_model=4096", "model.n_heads=8", "attention.qk_rope_head_dim=384") == 1


def test_migrate_run_without_the_models_attention_settings_is_still_that_model():
    for model in choices("model"):
        stored = dump(composed_run(f"model={model}", "attention=gqa"))
        older = {key: value for key, value in stored["model"].items() if key not in MODELS_OWN}
        found = Run.from_tree(migrate(stored | {"model": older}, 4))
        assert dump(found) == stored


def test_compose_setting_of_a_mask_needs_no_mask_sparse():
    with_it = compose("attention=gqa", "mask=sparse", "attention.dilation=2")
    assert with_it == compose("attention=gqa", "attention.dilation=2") != compose("attention=gqa")
    assert "dilation" not in compose_tree("attention=gqa")["attention"]
    with pytest.raises(UserError, match=r"^attention\.dilation=2 does not .* attention\.parts\.local\.dilation=$"):
        compose("attention=stack", "attention.dilation=2")
