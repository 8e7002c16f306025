"""The border: everything under conf/ passes, nonsense is one line, and a configuration executes nothing."""

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from common.conf_files import choices
from common.errors import UserError
from model.attention.base import AttentionChoice
from tests.support import ATTENTIONS, NEEDS, composed_run, composed_tree
from training.run.config import Run, dump, pop_command_settings
from training.run.parts import MODEL_PARTS, RUN_PARTS, load_choice, resolve_target
from training.run.validation_errors import spelled


@pytest.mark.parametrize(
    ("typed", "expected"), [("optim=muon", 1.0), ("optim=adamw", None), ("model.tie_embeddings=false", None)]
)
def test_own_logit_init_by_default_is_what_suits_the_optimizer_and_the_head(typed, expected):
    assert composed_run(typed).model.own_logit_init == expected


def test_model_classic_gpt_chooses_in_other_groups_and_is_overridden_as_any_choice():
    def found(*overrides: str) -> tuple:
        model = composed_run("model=classic_gpt", *overrides).model
        attention = model.attention
        return attention.n_kv_heads, attention.qk_norm, attention.position, attention.dropout, type(model.mlp).__name__

    assert found() == (4, False, "none", 0.1, "GELUConfig")
    assert found("attention=gqa") == (2, False, "none", 0.1, "GELUConfig")
    assert found("attention=mqa", "attention.qk_norm=true") == (1, True, "none", 0.1, "GELUConfig")
    assert found("attention.position=rope", "attention.dropout=0") == (4, False, "rope", 0.0, "GELUConfig")
    assert found("mlp=swiglu", "experiment=smoke") == (4, False, "none", 0.1, "SwiGLUConfig")
    other = composed_run("attention=mha").model
    assert (other.attention.qk_norm, other.attention.position, type(other.mlp).__name__) == (
        True,
        "rope",
        "ReLU2Config",
    )


def test_unset_dimensions_derive_by_the_documented_rules():
    gpt2 = composed_run("model=gpt2", "attention=mla")
    mla = gpt2.model.attention
    assert (mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (192, 16, 48, 64)
    assert gpt2.model.mlp.d_ff == 3072
    assert (gpt2.optim.lr, gpt2.optim.bias_lr) == (pytest.approx(2 / 768), pytest.approx(8 / 768))
    adamw = composed_run("model=gpt2", "optim=adamw").optim
    assert (adamw.lr, adamw.bias_lr) == (pytest.approx(0.5 / 768), adamw.lr)
    kv_heads = {
        heads: composed_run("attention=gqa", f"model.n_heads={heads}", "model.d_model=768").model.attention.n_kv_heads
        for heads in (1, 2, 4, 6, 8, 12, 16)
    }
    assert kv_heads == {1: 1, 2: 2, 4: 2, 6: 2, 8: 2, 12: 3, 16: 4}
    assert composed_run("model=gpt2", "batch_tokens=65536").micro_batch_size == 8
    assert composed_run("batch_tokens=2560", "micro_batch_size=null").micro_batch_size == 10


def test_position_choice_sets_the_embedding_and_the_bias_of_every_layer():
    """Each position, and each attention, once: that any two choices go together is tested in test_composer.py."""
    expected = {
        "rope": ("rope", "none"),
        "alibi": ("alibi", "none"),
        "none": ("none", "none"),
        "learned": ("none", "learned"),
        "sinusoidal": ("none", "sinusoidal"),
    }
    for attention, (position, (bias, embedding)) in zip(ATTENTIONS, itertools.cycle(expected.items()), strict=False):
        model = composed_run(f"position={position}", f"attention={attention}").model
        assert model.position_embedding == embedding
        assert {model.attention.of_layer(i).position for i in range(model.n_layers)} == {bias}


def test_attention_position_typed_or_of_an_experiment_goes_before_the_position_choice(tmp_path):
    assert composed_run("attention.position=alibi").model.attention.position == "alibi"
    run = composed_run("position=learned", "attention.position=rope")
    assert (run.model.position_embedding, run.model.attention.position) == ("learned", "rope")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "ours.yaml").write_text("# @package _global_\nattention: {position: alibi}\n")
    run = composed_run("experiment=ours", f"hydra.searchpath=[file://{tmp_path}]")
    assert run.model.attention.position == "alibi"


def test_position_of_a_stacks_part_may_differ_from_the_stacks():
    stack = composed_run("attention=stack", "position=none", "attention.parts.local.position=rope").model.attention
    assert [stack.of_layer(i).position for i in range(2)] == ["rope", "none"]


def test_setting_of_a_part_needs_no_plus_and_may_come_from_an_experiment(tmp_path):
    def parts(*typed: str) -> dict:
        return composed_run("attention=stack", *typed).model.attention.parts

    assert parts("attention.parts.local.dilation=2") == parts("+attention.parts.local.dilation=2")
    assert parts("attention.parts.local.dilation=2")["local"].dilation == 2
    assert parts("attention.parts.global=mla") == parts("attention.parts.global.attention=mla")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "ours.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /attention: stack\n  - override /data: mix\n"
        "attention: {parts: {local: {dilation: 2}, global: {attention: mla}}}\n"
        "data: {parts: {sympy: 0.7, texts: {quota: 0.5, data: files, path: '*.txt'}}}\n"
    )
    run = composed_run("experiment=ours", f"hydra.searchpath=[file://{tmp_path}]")
    typed = "attention.parts.local.dilation=2", "attention.parts.global.attention=mla"
    assert run.model.attention.parts == parts(*typed)
    each = "data.parts.sympy=0.7", "data.parts.texts.quota=0.5", "data.parts.texts.data=files"
    assert run.data == composed_run("data=mix", *each, "data.parts.texts.path='*.txt'").data


# A value that a setting does not take, and the complaint after `setting=value: `. With attention=mla and optim=muon.
BAD_VALUES = [
    ("attention.rope_factor", 0, "give at least 1 and at most 1048576"),
    ("attention.rope_factor", -2, "give at least 1 and at most 1048576"),
    ("attention.k_rope_from", "above", "choose "),
    ("attention.execution", "fast", "choose "),
    ("attention.rope_layout", "diagonal", "choose "),
    ("attention.position", "learned", "choose "),
    ("attention.dropout", 1, "give at least 0 and less than 1"),
    ("attention.dropout", -0.1, "give at least 0 and less than 1"),
    ("attention.qk_norm", True, "choose latent, head or whole"),
    ("model.position_embedding", "rope", "choose "),
    ("model.logit_softcap", 0, "give at least 0.001 and at most 1000000"),
    ("model.logit_softcap", -30, "give at least 0.001 and at most 1000000"),
    ("model.norm", "batch", "choose "),
    ("model.bias", "maybe", "give true or false"),
    ("model.dropout", 1, "give at least 0 and less than 1"),
    ("model.dropout", 1.5, "give at least 0 and less than 1"),
    ("model.n_heads", 0, "give "),
    ("model.context_length", 1, "give "),
    ("model.own_logit_init", 0, "give more than 0, or auto, or null"),
    ("model.own_logit_init", 10_000, "give at most 1000, or auto, or null"),
    ("mlp.approximate", "erf", "choose "),
    ("steps", "abc", "give a whole number, written in digits"),
    ("steps", 1.5, "give a whole number, written in digits"),
    ("steps", 0, "give at least 1 and at most 1099511627776"),
    ("seed", -1, "give at least 0 and less than 9223372036854775808"),
    ("seed", 2**63, "give at least 0 and less than 9223372036854775808"),
    ("compile", "maybe", "give true or false"),
    ("compile", None, "give true or false"),
    ("dry_run", "maybe", "give true or false"),
    ("clip_norm", True, "give a number"),
    ("peak_flops", 0, "give at least 1"),
    ("peak_flops", "fast", "give a number"),
    ("peak_flops", math.inf, "give a finite number"),
    ("profile_steps", 1.5, "give a whole number, written in digits"),
    ("profile_steps", 1001, "give at least 0 and at most 1000"),
    ("micro_batch_size", 0, "give at least 1"),
    ("precision", "int8", "choose auto, bf16, fp16, fp32 or fp8"),
    ("device", 3, "give text"),
    ("optim.lr", 0, "give more than 0"),
    ("optim.lr", math.inf, "give a finite number"),
    ("optim.muon_lr", 0, "give more than 0"),
    ("optim.momentum", 1, "give at least 0 and less than 1"),
    ("optim.momentum_warmup", -1, "give at least 0"),
    ("optim.qk_clip", 0, "give more than 0"),
    ("optim.beta1", 1, "give at least 0 and less than 1"),
    ("schedule.warmup", 2, "give at least 0 and less than 1"),
    ("tokenizer.vocab_size", 100, "give at least "),
]


def test_config_value_of_another_kind_or_beyond_its_bounds_is_refused_in_one_line():
    tree = composed_tree("attention=mla", "mlp=gelu", "optim=muon")
    pop_command_settings(tree)
    Run.from_tree(copy.deepcopy(tree))
    for key, value, complaint in BAD_VALUES:
        spoilt, path = copy.deepcopy(tree), key.split(".")
        setting_of(spoilt, *path[:-1])[path[-1]] = value
        with pytest.raises(UserError) as caught:
            Run.from_tree(spoilt)
        assert_refused(caught.value, f"{key}={spelled(value)}: {complaint}")


# Overrides that each break another rule, and the complaint.
RULES = {
    "n_kv_heads does not divide": (
        ("attention.n_kv_heads=5", "model=gpt2", "attention=gqa"),
        "n_kv_heads=5 does not divide n_heads=12: choose one of 1, 2, 3, 4, 6, 12",
    ),
    "n_kv_heads of another kind": (
        ("attention=gqa", "attention.n_kv_heads=some"),
        "attention.n_kv_heads=some: give a whole number, written in digits, or all, or null",
    ),
    "odd rotation": (("attention=mla", "attention.qk_rope_head_dim=7"), "qk_rope_head_dim=7 is odd"),
    "odd head": (("attention.head_dim=7",), "head_dim=7 is odd"),
    "odd part of a head": (("attention.rope_dim=5",), "rope_dim=5 is odd"),
    "all rotated": (
        ("attention=mla", "attention.qk_rope_head_dim=32"),
        "qk_rope_head_dim=32 leaves nothing of head_dim=32",
    ),
    "rotation beyond the head": (("attention.rope_dim=34",), "rope_dim=34 is more than head_dim=32"),
    "empty rotation": (("attention.rope_dim=0",), "attention.rope_dim=0"),
    "rotation without rope": (
        ("attention.rope_dim=8", "position=none"),
        "rope_dim=8 rotates, and position=none does not",
    ),
    "scaling without a factor": (("attention.rope_scaling=ntk",), "rope_scaling=ntk needs a factor"),
    "factor without scaling": (("attention.rope_factor=2",), "rope_factor=2.0 does nothing with rope_scaling=none"),
    "ntk of one pair": (
        ("attention.rope_scaling=ntk", "attention.rope_factor=2", "attention.rope_dim=2"),
        "rope_dim=2 is one pair",
    ),
    "yarn without frequencies": (
        ("attention.rope_scaling=yarn", "attention.rope_factor=2", "attention.rope_theta=1"),
        "rope_theta=1 turns all",
    ),
    "original context without yarn": (
        ("attention.rope_scaling=ntk", "attention.rope_factor=2", "attention.rope_original_context=64"),
        "rope_original_context=64 is what yarn and llama3 begin from, and rope_scaling=ntk does not ask",
    ),
    "scaling without rope": (
        ("attention.rope_scaling=linear", "attention.rope_factor=2", "position=alibi"),
        "rope_scaling=linear scales a rotation, and position=alibi has none",
    ),
    "slopes without alibi": (
        ("attention.alibi_slopes=geometric",),
        "alibi_slopes=geometric is of position=alibi, and position=rope has no",
    ),
    "unknown slopes": (
        ("attention.alibi_slopes=steep", "position=alibi"),
        "alibi_slopes=steep: choose published or geometric",
    ),
    "mla: rotation with alibi": (
        ("attention=mla", "attention.qk_rope_head_dim=8", "position=alibi"),
        "position=alibi needs qk_rope_head_dim=0, not 8",
    ),
    "mla: rope without rotation": (
        ("attention=mla", "attention.qk_rope_head_dim=0"),
        "qk_rope_head_dim=0 leaves position=rope nothing to rotate",
    ),
    "mla: rope key without rope": (
        ("attention=mla", "attention.k_rope_from=latent", "position=none"),
        "position=none has no rope key",
    ),
    "mla: groups do not divide": (
        ("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=3"),
        "qk_norm_groups=3 does not divide n_heads=4: choose one of 1, 2, 4",
    ),
    "mla: groups without heads": (
        ("attention=mla", "model.qk_norm=false", "attention.qk_norm_groups=2"),
        "qk_norm_groups=2 has no heads to norm with qk_norm=latent",
    ),
    "n_heads does not divide": (("model.n_heads=7",), "d_model=128 is not a multiple of n_heads=7"),
    "batch below a window": (("model.context_length=1000000",), "batch_tokens=1024 is less than one window"),
    "batch of no whole windows": (
        ("batch_tokens=1000",),
        "batch_tokens=1000 is not a multiple of model.context_length=256: choose 768 or 1024",
    ),
    "micro-batch does not divide": (
        ("micro_batch_size=3", "batch_tokens=2048"),
        "micro_batch_size=3 does not divide the 8 sequences",
    ),
    "evaluation below a window": (("eval_tokens=10",), "eval_tokens=10 is less than"),
    "qk_clip of normed keys": (
        ("optim.qk_clip=50",),
        "optim.qk_clip=50.0: attention.qk_norm=true undoes any scaling of queries and keys: set it",
    ),
    "qk_clip of mla's normed heads": (
        ("attention=mla", "attention.qk_norm=head", "optim.qk_clip=50"),
        "attention.qk_norm=head undoes any scaling",
    ),
    "qk_clip of mla's normed wholes": (
        ("attention=mla", "attention.qk_norm=whole", "optim.qk_clip=50"),
        "attention.qk_norm=whole undoes any scaling",
    ),
    "qk_clip with alibi": (
        ("attention=gqa", "attention.qk_norm=false", "position=alibi", "optim.qk_clip=50"),
        "optim.qk_clip=50.0: position=alibi adds to the scores",
    ),
    "qk_clip of a part": (
        ("attention=stack", "optim=muon", "optim.qk_clip=50"),
        "optim.qk_clip=50.0: attention.parts.local.qk_norm=true",
    ),
    "autotune without compile": (
        ("autotune=true",),
        "autotune=true chooses among compiled kernels: set compile=true, or leave it",
    ),
    "unknown kernel version": (("kernel=sdpa", "kernel.flash=FA2"), "kernel.flash=FA2: choose FA3 or FA4"),
    "unknown kernel backend": (
        ("kernel=sdpa", "kernel.backend=math"),
        "kernel.backend=math: choose flash, efficient or cudnn",
    ),
    "unknown key": (("+foo=1",), "foo=1: no such key"),
    "misspelt key": (("+attention.n_kv_head=2",), "did you mean n_kv_heads?"),
    "key of another program": (
        ("+optim.learning_rate=2",),
        "optim.learning_rate=2: no such key; did you mean optim.lr?",
    ),
    "key of another choice": (("optim=adamw", "+optim.muon_lr=0.1"), "optim.muon_lr=0.1: no such key"),
    "key of a choice without any": (
        ("logger=tensorboard", "+logger.folder=x"),
        "logger.folder='x': no such key; valid: none",
    ),
    "unset value": (("data=files",), "data.path is not set"),
    "bound of a choice": (("data=files", "data.path=x", "data.val_fraction=1"), "data.val_fraction=1"),
    "empty text": (("run_dir=''",), "run_dir= is empty: give it a value"),
    "empty text in a group": (("data=files", "data.path=''"), "data.path= is empty: give it a value"),
    "foreign target": (("attention._target_=model.mlp.SwiGLUConfig",), "names no AttentionChoice"),
    "stack: rotation of a part with alibi": (
        (
            "attention=stack",
            "attention.parts.local.attention=mla",
            "attention.parts.local.qk_rope_head_dim=4",
            "position=alibi",
        ),
        "position=alibi needs qk_rope_head_dim=0, not 4",
    ),
    "stack: misspelt key": (
        ("attention=stack", "attention.parts.local.dilaton=2"),
        "attention.parts.local.dilaton=2: no such key; did you mean",
    ),
    "stack: misspelt part": (
        ("attention=stack", "attention.parts.lokal.window=2"),
        "attention.parts.lokal.window=2: did you mean part local?",
    ),
    "stack: part without attention": (
        ("attention=stack", "attention.parts.other.window=2"),
        "choose its attention, as attention.parts.other.attention=",
    ),
    "stack: part that is none": (("attention=stack", "attention.parts.local=3"), "local=3: choose its attention"),
    "stack: parts that are none": (("attention=stack", "attention.parts=3"), "attention.parts=3: give a dict"),
    "stack: n_heads does not divide": (
        ("attention=stack", "model.n_heads=7"),
        "d_model=128 is not a multiple of n_heads=7: choose n_heads from",
    ),
    "stack: pattern of text": (
        ("attention=stack", "attention.pattern=local"),
        "attention.pattern=local: give a list of parts",
    ),
    "stack: unknown attention": (
        ("attention=stack", "attention.parts.local.attention=gqaa"),
        "there is no attention=gqaa: choose one of dsa, gqa, mha, mla, mqa, as attention.parts.local.attention=",
    ),
    "stack: stack within": (
        ("attention=stack", "attention.parts.local.attention=stack"),
        "attention.parts.local: a part cannot be attention=stack: choose one of dsa, gqa, mha, mla, mqa, as",
    ),
    "stack: key of the model": (
        ("attention=stack", "attention.parts.local.heads=2"),
        "no such key; did you mean model.n_heads?",
    ),
    "stack: odd head": (
        ("attention=stack", "attention.parts.global.head_dim=7"),
        "attention.parts.global: head_dim=7 is odd",
    ),
    "stack: global tokens without a window": (
        ("attention=stack", "attention.parts.global.global_tokens=2"),
        "is seen: set attention.parts.global.window",
    ),
    "parts without a stack": (
        ("attention.parts.local.window=2",),
        "attention.parts.local.window=2: parts are of attention=stack",
    ),
    "parts without a mix": (("data.parts.sympy=1",), "data.parts.sympy=1: parts are of data=mix"),
    "mix: no parts": (("data=mix", "data.parts={}"), "data.parts={} names no corpus: give each one its quota, as in"),
    "mix: list of parts": (("data=mix", "data.parts=[sympy]"), "data.parts=['sympy'] names no corpus"),
    "mix: misspelt key": (
        ("data=mix", "data.parts.sympy.quot=1"),
        "data.parts.sympy.quot=1: no such key; did you mean quota?",
    ),
    "mix: no quota": (("data=mix", "data.parts.files.path=a.txt"), "data.parts.files.quota is not set"),
    "mix: misspelt key of a corpus": (
        ("data=mix", "data.parts={a: {data: files, quota: 1, pth: x}}"),
        "data.parts.a.pth='x': no such key; did you mean path?",
    ),
    "mix: unset value": (
        ("data=mix", "data.parts={texts: {quota: 1, data: files}}"),
        "data.parts.texts.path is not set: give it a value",
    ),
}


@pytest.mark.parametrize(("overrides", "complaint"), RULES.values(), ids=RULES)
def test_config_that_breaks_a_rule_is_refused_in_one_line(overrides, complaint):
    with pytest.raises(UserError) as caught:
        composed_run(*overrides)
    assert_refused(caught.value, complaint)
    if not any(".parts" in override or "pattern" in override or "qk_clip" in override for override in overrides):
        assert ".parts." not in str(caught.value)


def assert_refused(error: UserError, complaint: str) -> None:
    assert complaint in str(error)
    assert "\n" not in str(error)
    assert not re.search(r"input|valid (integer|number|string|boolean)|should|\bNone\b", str(error))


HUGE = (10**30, 10**400, math.inf, -math.inf, math.nan, 1e300, float("1e-400"), 5e-324)


def numbers_in(tree: dict, *path: str) -> Iterator[tuple[str, ...]]:
    """The paths of a tree's settings that hold a number, or nothing."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers_in(value, *path, key)
        elif value is None or type(value) in (int, float):
            yield *path, key


def setting_of(tree: dict, *path: str) -> Any:
    return functools.reduce(dict.__getitem__, path, tree)


@pytest.mark.parametrize("group", [None, *MODEL_PARTS, *RUN_PARTS])
def test_config_number_beyond_every_limit_is_refused_or_accepted_without_overflow(group):
    """In the settings of each choice of the group; of None, in all settings of the default run."""
    for choice in choices(group) if group else [None]:
        typed = (f"{group}={choice}", *NEEDS.get((group, choice), ())) if group else ()
        tree = dump(composed_run(*typed))
        paths = numbers_in(tree[group], group) if group else numbers_in(tree)
        for path, value in itertools.product(paths, HUGE):
            spoilt = copy.deepcopy(tree)
            setting_of(spoilt, *path[:-1])[path[-1]] = value
            try:
                run = Run.from_tree(spoilt)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert type(setting_of(dump(run), *path)) is float, path  # a huge integer is accepted nowhere
                rates = [run.learning_rates(step)["lr"] for step in (0, run.steps // 2, run.steps - 1)]
                assert math.isfinite(sum(rates)), path


TARGETS = [
    "os.system",
    "model.attention.gqa.os.system",
    "model.attention.gqa.Attention",  # imported there, not defined there
    "model.attention.gqa.GQA",  # a module, not a config
    "model.attention.base.AttentionConfig",  # abstract
    "model.attention.gqa.GQAConfig.model_validate",
    "model..attention.gqa.GQAConfig",
    "model/attention/gqa.GQAConfig",
    "tests.support.composed_run",
    "train.main",
    "model.no_such.Thing",
    "",
    None,
    7,
    ["model.attention.gqa.GQAConfig"],
]


def test_resolve_target_of_anything_but_a_config_class_of_this_project_is_refused():
    for target in TARGETS:
        with pytest.raises(UserError, match="_target_"):
            resolve_target(target, AttentionChoice, "attention")


def test_load_choice_alone_gives_its_class_or_names_the_choices():
    assert type(load_choice("kernel", "naive")).__name__ == "Naive"
    with pytest.raises(UserError, match="choose one of auto, flex, matmul, naive, online, sdpa"):
        load_choice("kernel", "fast")
