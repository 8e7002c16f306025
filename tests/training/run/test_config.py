"""The border: everything under conf/ passes, nonsense is one line, and a configuration executes nothing."""

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from common.conf_files import choices
from common.errors import UserError
from model.attention.base import AttentionChoice
from tests.support import ATTENTIONS, NEEDS, ROOT, composed_run
from training.run.config import Run, dump
from training.run.parts import MODEL_PARTS, RUN_PARTS, load_choice, resolve_target

GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)], ids=lambda x: x
)
def test_every_file_under_conf_composes_and_loads(group, choice):
    run = composed_run(f"{group}={choice}", *NEEDS.get((group, choice), ()))
    assert isinstance(run, Run)
    assert Run.from_tree(yaml.safe_load(yaml.safe_dump(dump(run)))) == run  # what config.yaml will hold


@pytest.mark.parametrize("choice", choices("data"))
def test_no_setting_of_a_corpus_is_lost_in_a_runs_config(choice):
    run = composed_run(f"data={choice}", *NEEDS.get(("data", choice), ()), "document_mask=true")
    again = Run.from_tree(yaml.safe_load(yaml.safe_dump(dump(run))))
    assert again == run and again.document_mask


@pytest.mark.parametrize(
    ("typed", "expected"), [("optim=muon", 1.0), ("optim=adamw", None), ("model.tie_embeddings=false", None)]
)
def test_own_logit_init_by_default_is_what_suits_the_optimizer_and_the_head(typed, expected):
    assert composed_run(typed).model.own_logit_init == expected


@pytest.mark.parametrize(("attention", "model"), list(itertools.product(ATTENTIONS, choices("model"))))
def test_every_attention_fits_every_model(attention, model):
    config = composed_run(f"attention={attention}", f"model={model}").model
    assert all(config.attention.of_layer(i).cache_elements > 0 for i in range(config.n_layers))


def test_classic_gpt_chooses_in_other_groups_and_is_overridden_like_any_choice():
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


def test_one_switch_says_how_positions_are_known():
    for position, bias, embedding in (
        ("rope", "rope", "none"),
        ("alibi", "alibi", "none"),
        ("none", "none", "none"),
        ("learned", "none", "learned"),
        ("sinusoidal", "none", "sinusoidal"),
    ):
        for attention in ATTENTIONS:
            model = composed_run(f"position={position}", f"attention={attention}").model
            assert model.position_embedding == embedding
            assert {model.attention.of_layer(i).position for i in range(model.n_layers)} == {bias}


def test_what_is_typed_or_said_by_an_experiment_goes_before_the_switch(tmp_path):
    assert composed_run("attention.position=alibi").model.attention.position == "alibi"
    run = composed_run("position=learned", "attention.position=rope")
    assert (run.model.position_embedding, run.model.attention.position) == ("learned", "rope")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "ours.yaml").write_text("# @package _global_\nattention: {position: alibi}\n")
    run = composed_run("experiment=ours", f"hydra.searchpath=[file://{tmp_path}]")
    assert run.model.attention.position == "alibi"


def test_a_part_of_a_stack_may_differ_from_what_the_stack_says():
    stack = composed_run("attention=stack", "position=none", "attention.parts.local.position=rope").model.attention
    assert [stack.of_layer(i).position for i in range(2)] == ["rope", "none"]


def test_a_setting_of_a_part_needs_no_plus_and_may_come_from_an_experiment(tmp_path):
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


BAD = [
    (
        ("attention.n_kv_heads=5", "model=gpt2", "attention=gqa"),
        "n_kv_heads=5 does not divide n_heads=12: choose one of 1, 2, 3, 4, 6, 12",
    ),
    (("attention=mla", "attention.qk_rope_head_dim=7"), "qk_rope_head_dim=7 is odd"),
    (("attention=mla", "attention.qk_rope_head_dim=32"), "qk_rope_head_dim=32 leaves nothing of head_dim=32"),
    (("attention.head_dim=7",), "head_dim=7 is odd"),
    (("attention.rope_dim=5",), "rope_dim=5 is odd"),
    (("attention.rope_dim=34",), "rope_dim=34 is more than head_dim=32"),
    (("attention.rope_dim=0",), "attention.rope_dim=0"),
    (("attention.rope_dim=8", "position=none"), "rope_dim=8 rotates, and position=none does not"),
    (("attention.rope_scaling=yarn", "attention.rope_factor=0"), "attention.rope_factor=0"),
    (("attention.rope_scaling=linear", "attention.rope_factor=-2"), "attention.rope_factor=-2"),
    (("attention.rope_scaling=ntk",), "rope_scaling=ntk needs a factor"),
    (("attention.rope_factor=2",), "rope_factor=2.0 does nothing with rope_scaling=none"),
    (("attention.rope_scaling=ntk", "attention.rope_factor=2", "attention.rope_dim=2"), "rope_dim=2 is one pair"),
    (("attention.rope_scaling=yarn", "attention.rope_factor=2", "attention.rope_theta=1"), "rope_theta=1 turns all"),
    (
        ("attention.rope_scaling=ntk", "attention.rope_factor=2", "attention.rope_original_context=64"),
        "rope_original_context=64 is what yarn begins from, and rope_scaling=ntk does not ask",
    ),
    (
        ("attention.rope_scaling=linear", "attention.rope_factor=2", "position=alibi"),
        "rope_scaling=linear scales a rotation, and position=alibi has none",
    ),
    (("attention.alibi_slopes=geometric",), "alibi_slopes=geometric is of position=alibi, and position=rope has no"),
    (("attention.alibi_slopes=steep", "position=alibi"), "alibi_slopes=steep: choose published or geometric"),
    (
        ("attention=mla", "attention.qk_rope_head_dim=8", "position=alibi"),
        "position=alibi needs qk_rope_head_dim=0, not 8",
    ),
    (("attention=mla", "attention.qk_rope_head_dim=0"), "qk_rope_head_dim=0 leaves position=rope nothing to rotate"),
    (("attention=mla", "attention.k_rope_from=latent", "position=none"), "position=none has no rope key"),
    (("attention=mla", "attention.k_rope_from=above"), "attention.k_rope_from=above"),
    (("attention.position=learned",), "attention.position=learned"),
    (("model.position_embedding=rope",), "model.position_embedding=rope"),
    (
        (
            "attention=stack",
            "attention.parts.local.attention=mla",
            "attention.parts.local.qk_rope_head_dim=4",
            "position=alibi",
        ),
        "position=alibi needs qk_rope_head_dim=0, not 4",
    ),
    (("model.n_heads=7",), "d_model=128 is not a multiple of n_heads=7"),
    (("model.logit_softcap=0",), "model.logit_softcap=0"),
    (("model.logit_softcap=-30",), "model.logit_softcap=-30"),
    (("model.norm=batch",), "model.norm=batch"),
    (("model.bias=maybe",), "model.bias=maybe"),
    (("attention.dropout=1",), "attention.dropout=1"),
    (("attention=mla", "attention.dropout=-0.1"), "attention.dropout=-0.1"),
    (("model.dropout=1.5",), "model.dropout=1.5"),
    (("mlp=gelu", "mlp.approximate=erf"), "mlp.approximate=erf"),
    (("attention=mla", "attention.qk_norm=true"), "attention.qk_norm=true: choose latent, head or whole"),
    (
        ("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=3"),
        "qk_norm_groups=3 does not divide n_heads=4: choose one of 1, 2, 4",
    ),
    (
        ("attention=mla", "model.qk_norm=false", "attention.qk_norm_groups=2"),
        "qk_norm_groups=2 has no heads to norm with qk_norm=latent",
    ),
    (("steps=abc",), "steps=abc"),
    (("steps=1.5",), "steps=1.5"),
    (("seed=-1",), "seed=-1"),
    (("compile=maybe",), "compile=maybe"),
    (("model.n_heads=0",), "model.n_heads=0"),
    (("model.context_length=1",), "model.context_length=1"),
    (("model.context_length=1000000",), "batch_tokens=1024 is less than one window"),
    (("+foo=1",), "foo=1: no such key"),
    (("+attention.n_kv_head=2",), "did you mean n_kv_heads?"),
    (("+optim.learning_rate=2",), "optim.learning_rate=2: no such key; did you mean optim.lr?"),
    (("attention.rope_layout=diagonal",), "attention.rope_layout=diagonal"),
    (("attention=mla", "attention.execution=fast"), "attention.execution=fast"),
    (("batch_tokens=1000",), "batch_tokens=1000 is not a multiple of model.context_length=256: choose 768 or 1024"),
    (("micro_batch_size=3", "batch_tokens=2048"), "micro_batch_size=3 does not divide the 8 sequences"),
    (("eval_tokens=10",), "eval_tokens=10 is less than"),
    (("optim=muon", "optim.lr=0"), "optim.lr=0: give more than 0"),
    (("optim=muon", "optim.muon_lr=0"), "optim.muon_lr=0: give more than 0"),
    (("optim=muon", "optim.momentum=1"), "optim.momentum=1: give at least 0 and less than 1"),
    (("optim=muon", "optim.momentum_warmup=-1"), "optim.momentum_warmup=-1: give at least 0"),
    (("optim.qk_clip=0",), "optim.qk_clip=0: give more than 0"),
    (
        ("optim.qk_clip=50",),
        "optim.qk_clip=50.0: attention.qk_norm=true undoes any scaling of queries and keys: set it",
    ),
    (("attention=mla", "attention.qk_norm=head", "optim.qk_clip=50"), "attention.qk_norm=head undoes any scaling"),
    (("attention=mla", "attention.qk_norm=whole", "optim.qk_clip=50"), "attention.qk_norm=whole undoes any scaling"),
    (
        ("attention=gqa", "attention.qk_norm=false", "position=alibi", "optim.qk_clip=50"),
        "optim.qk_clip=50.0: position=alibi adds to the scores",
    ),
    (
        ("attention=stack", "optim=muon", "optim.qk_clip=50"),
        "optim.qk_clip=50.0: attention.parts.local.qk_norm=true",
    ),
    (("optim=adamw", "+optim.muon_lr=0.1"), "optim.muon_lr=0.1: no such key"),
    (("micro_batch_size=0",), "micro_batch_size=0"),
    (("optim.beta1=1",), "optim.beta1=1"),
    (("peak_flops=0",), "peak_flops=0"),
    (("peak_flops=fast",), "peak_flops=fast"),
    (("peak_flops=inf",), "peak_flops=inf"),
    (("profile_steps=1.5",), "profile_steps=1.5"),
    (("dry_run=maybe",), "dry_run=maybe"),
    (("logger=tensorboard", "+logger.folder=x"), "logger.folder='x': no such key; valid: none"),
    (("schedule.warmup=2",), "schedule.warmup=2"),
    (("tokenizer.vocab_size=100",), "tokenizer.vocab_size=100"),
    (("data=files",), "data.path is not set"),
    (("data=files", "data.path=x", "data.val_fraction=1"), "data.val_fraction=1"),
    (("seed=9223372036854775808",), "seed=9223372036854775808: give at least 0 and less than 9223372036854775808"),
    (("steps=0",), "steps=0: give at least 1 and at most 1099511627776"),
    (("optim.lr=0",), "optim.lr=0: give more than 0"),
    (("optim.lr=inf",), "optim.lr=inf: give a finite number"),
    (("clip_norm=true",), "clip_norm=true: give a number"),
    (("compile=null",), "compile=null: give true or false"),
    (("autotune=true",), "autotune=true chooses among compiled kernels: set compile=true, or leave it"),
    (("kernel=sdpa", "kernel.flash=FA2"), "kernel.flash=FA2: choose FA3 or FA4"),
    (("kernel=sdpa", "kernel.backend=math"), "kernel.backend=math: choose flash, efficient or cudnn"),
    (("model.own_logit_init=0",), "model.own_logit_init=0: give more than 0, or auto, or null"),
    (("model.own_logit_init=1e4",), "model.own_logit_init=10000: give at most 1000, or auto, or null"),
    (
        ("attention=gqa", "attention.n_kv_heads=some"),
        "attention.n_kv_heads=some: give a whole number, written in digits, or all, or null",
    ),
    (("model.dropout=1",), "model.dropout=1: give at least 0 and less than 1"),
    (("profile_steps=1001",), "profile_steps=1001: give at least 0 and at most 1000"),
    (("precision=int8",), "precision=int8: choose auto, bf16, fp16, fp32 or fp8"),
    (("device=3",), "device=3: give text"),
    (("run_dir=''",), "run_dir= is empty: give it a value"),
    (("data=files", "data.path=''"), "data.path= is empty: give it a value"),
    (("data=mix", "data.parts={}"), "data.parts={} names no corpus: give each one its quota, as in"),
    (("data=mix", "data.parts=[sympy]"), "data.parts=['sympy'] names no corpus"),
    (
        ("attention=stack", "attention.parts.local.dilaton=2"),
        "attention.parts.local.dilaton=2: no such key; did you mean",
    ),
    (("attention=stack", "attention.parts.lokal.window=2"), "attention.parts.lokal.window=2: did you mean part local?"),
    (
        ("attention=stack", "attention.parts.other.window=2"),
        "choose its attention, as attention.parts.other.attention=",
    ),
    (("attention=stack", "attention.parts.local=3"), "attention.parts.local=3: choose its attention"),
    (("attention=stack", "attention.parts=3"), "attention.parts=3: give a dict"),
    (("attention=stack", "model.n_heads=7"), "d_model=128 is not a multiple of n_heads=7: choose n_heads from"),
    (("attention=stack", "attention.pattern=local"), "attention.pattern=local: give a list of parts"),
    (
        ("attention=stack", "attention.parts.local.attention=gqaa"),
        "there is no attention=gqaa: choose one of gqa, mha, mla, mqa, as attention.parts.local.attention=",
    ),
    (
        ("attention=stack", "attention.parts.local.attention=stack"),
        "attention.parts.local: a part cannot be attention=stack: choose one of gqa, mha, mla, mqa, as",
    ),
    (("attention=stack", "attention.parts.local.heads=2"), "no such key; did you mean model.n_heads?"),
    (("attention=stack", "attention.parts.global.head_dim=7"), "attention.parts.global: head_dim=7 is odd"),
    (("attention=stack", "attention.parts.global.global_tokens=2"), "is seen: set attention.parts.global.window"),
    (("attention.parts.local.window=2",), "attention.parts.local.window=2: parts are of attention=stack"),
    (("data.parts.sympy=1",), "data.parts.sympy=1: parts are of data=mix"),
    (("data=mix", "data.parts.sympy.quot=1"), "data.parts.sympy.quot=1: no such key; did you mean quota?"),
    (("data=mix", "data.parts.files.path=a.txt"), "data.parts.files.quota is not set"),
    (
        ("data=mix", "data.parts={a: {data: files, quota: 1, pth: x}}"),
        "data.parts.a.pth='x': no such key; did you mean path?",
    ),
    (("data=mix", "data.parts={texts: {quota: 1, data: files}}"), "data.parts.texts.path is not set: give it a value"),
    (("attention._target_=model.mlp.SwiGLUConfig",), "names no AttentionChoice"),
]


@pytest.mark.parametrize(("overrides", "complaint"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_nonsense_is_refused_in_one_line(overrides, complaint):
    with pytest.raises(UserError) as caught:
        composed_run(*overrides)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    if not any(".parts" in override or "pattern" in override or "qk_clip" in override for override in overrides):
        assert ".parts." not in str(caught.value)
    assert not re.search(r"input|valid (integer|number|string|boolean)|should|\bNone\b", str(caught.value))


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


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in (*MODEL_PARTS, *RUN_PARTS) for choice in choices(group)]
)
def test_load_number_beyond_every_limit_is_refused_or_accepted_without_overflow(group, choice):
    tree = dump(composed_run(f"{group}={choice}", *NEEDS.get((group, choice), ())))
    for path, value in itertools.product(numbers_in(tree), HUGE):
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


@pytest.mark.parametrize(
    "target",
    [
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
    ],
)
def test_a_target_names_a_config_class_of_this_project_or_nothing(target):
    with pytest.raises(UserError, match="_target_"):
        resolve_target(target, AttentionChoice, "attention")


def test_a_choice_can_be_loaded_alone():
    assert type(load_choice("kernel", "naive")).__name__ == "Naive"
    with pytest.raises(UserError, match="choose one of auto, flex, matmul, naive, online, sdpa"):
        load_choice("kernel", "fast")
