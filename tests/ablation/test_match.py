"""Matched budgets: every result is measured on runs composed with the overrides that matching gives."""

import functools
import re

import pytest

from ablation import match as module
from ablation.match import FINER_UNITS, TOLERANCE, UNIT, match
from common.errors import UserError
from model import cost
from model.transformer import ModelConfig
from tests.support import ATTENTIONS, assert_one_line, composed_run, composed_tree
from training.run.composer import choice
from training.run.config import Run, pop_command_settings

VOCAB = 4096
ALL = ("mha", *(name for name in ATTENTIONS if name != "mha"))
LATENT = "attention=mla attention.qk_norm=latent attention.qk_rope_head_dim=16"  # with nothing odd in its cache


@functools.cache
def composed(*overrides: str) -> Run:
    """The run that compose(*overrides) makes, with Hydra's fifth of a second for choices alone: the model's size and
    whole numbers are put into its tree afterwards."""
    late = [one for one in overrides if re.fullmatch(r"model=\w+|(model|mlp|attention)\.\w+=\d+", one)]
    tree = composed_tree(*(one for one in overrides if one not in late))
    pop_command_settings(tree)
    for key, _, value in sorted(one.partition("=") for one in late):  # the size first
        group, _, name = key.partition(".")
        tree[group] |= {name: int(value)} if name else choice(group, value)
    return Run.from_tree(tree)


@pytest.fixture(autouse=True)
def _composed_quickly(request, monkeypatch):
    if "compose" not in request.fixturenames:
        monkeypatch.setattr(module, "compose_start", composed)


@pytest.fixture
def compose():
    """The real one, in what is tested too."""
    return composed_run


def params(config: ModelConfig) -> int:
    """Counted by name, not by part."""
    tables = ("embedding.", "position_embedding.", "head.")
    model = cost.on_meta(config, VOCAB)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tables))


def flops(config: ModelConfig) -> float:
    return cost.flops(config, VOCAB).training()


def cache(config: ModelConfig) -> float:
    """The bytes of the caches' tensors themselves, without their spare rows, per token."""
    context = config.context_length
    caches = cost.on_meta(config, VOCAB).make_caches(1, context)
    return sum(column[:, 1:].nbytes for one in caches for column in one.columns.values()) / context


MEASURES = {"params": params, "flops": flops, "cache": cache}


def variants(*names: str, common: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Variants of these names, which are their overrides, with what all have in common."""
    return {name: [*name.split(), *common] for name in names}


def attentions(*names: str, common: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return variants(*(f"attention={name}" for name in names), common=common)


def with_d_ff(config: ModelConfig, d_ff: int) -> ModelConfig:
    return config.model_copy(update={"mlp": config.mlp.model_copy(update={"d_ff": d_ff})})


def with_attention(config: ModelConfig, **settings: int) -> ModelConfig:
    return config.model_copy(update={"attention": config.attention.model_copy(update=settings)})


def refused(found: dict[str, list[str]], *budgets: str) -> str:
    with pytest.raises(UserError) as error:
        match(found, budgets, VOCAB)
    assert_one_line(error.value)
    return str(error.value)


# Within the tolerance


@pytest.mark.parametrize(("size", "budget"), [("tiny", "params"), ("small", "flops"), ("gpt2", "params")])
def test_match_of_every_attention_to_mha_moves_d_ff_to_the_nearest_unit(size, budget):
    found = attentions(*ALL, common=(f"model={size}",))
    matched = match(found, [budget], VOCAB)
    reference, measure = composed(*found["attention=mha"]).model, MEASURES[budget]
    target = measure(reference)
    assert matched.overrides["attention=mha"] == []
    for name, overrides in matched.overrides.items():
        config = composed(*found[name], *overrides).model
        off = abs(measure(config) - target)
        assert off < TOLERANCE * target
        if overrides:
            assert overrides == [f"mlp.d_ff={config.mlp.d_ff}"] and config.mlp.d_ff % UNIT == 0
            assert off <= min(abs(measure(with_d_ff(config, config.mlp.d_ff + d)) - target) for d in (-UNIT, UNIT))


@pytest.mark.parametrize(("budget", "mlp"), [("params", "relu2"), ("flops", "swiglu")])
def test_match_finds_the_best_d_ff_that_a_search_of_all_finds(budget, mlp):
    common = ("model=mini", f"mlp={mlp}", "model.bias=true", "model.n_layers=1", "model.d_model=128")
    measure = MEASURES[budget]
    target = measure(composed("attention=mha", *common).model)
    for name in ("gqa", "mla"):
        config = composed(f"attention={name}", *common).model
        best = min(range(UNIT, 700, UNIT), key=lambda d_ff: abs(measure(with_d_ff(config, d_ff)) - target))
        if abs(measure(with_d_ff(config, best)) - target) < TOLERANCE * target:
            matched = match(attentions("mha", name, common=common), [budget], VOCAB)
            assert matched.overrides[f"attention={name}"] == [f"mlp.d_ff={best}"]
        else:
            line = refused(attentions("mha", name, common=common), budget)
            assert f"with mlp.d_ff={best}" in line


def test_match_params_leaves_out_embedding_head_and_positions():
    common = ("position=learned", "model.tie_embeddings=false")
    found = attentions("mha", "gqa", common=common)
    with_tables = match(found, ["params"], VOCAB)
    assert with_tables.overrides == match(found, ["params"], 2 * VOCAB).overrides
    assert with_tables.table == match(found, ["params"], 2 * VOCAB).table


def test_match_of_different_mlps_moves_each_from_its_own_width():
    found = variants("mlp=gelu", "mlp=relu", "mlp=swiglu", common=("model=small",))
    matched = match(found, ["params"], VOCAB)
    assert matched.overrides["mlp=relu"] == []
    target = params(composed(*found["mlp=gelu"]).model)
    assert abs(params(composed(*found["mlp=swiglu"], *matched.overrides["mlp=swiglu"]).model) / target - 1) < 0.005


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_match_of_experts_counts_all_parameters_and_the_flops_that_a_token_meets(budget):
    found = variants("mlp=swiglu", "mlp=moe mlp.n_dense_layers=1", common=("model=small",))
    matched = match(found, [budget], VOCAB)
    added = matched.overrides["mlp=moe mlp.n_dense_layers=1"]
    reference, config = (
        composed(*found["mlp=swiglu"]).model,
        composed(*found["mlp=moe mlp.n_dense_layers=1"], *added).model,
    )
    assert abs(MEASURES[budget](config) / MEASURES[budget](reference) - 1) < TOLERANCE
    met = sum(cost.active_parameters(cost.on_meta(one, VOCAB)) * sign for one, sign in ((config, 1), (reference, -1)))
    assert (met < 0) == (budget == "params") or abs(met) < 0.005 * cost.active_parameters(
        cost.on_meta(reference, VOCAB)
    )
    assert config.mlp.dense_d_ff == reference.mlp.d_ff


def test_match_of_experts_in_a_small_model_takes_finer_units_or_says_what_does():
    found = variants("mlp=swiglu", "mlp=moe", common=("model=tiny",))
    (added,) = match(found, ["flops"], VOCAB).overrides["mlp=moe"]
    assert int(added.removeprefix("mlp.d_ff=")) % UNIT
    many = variants("mlp=swiglu", "mlp=moe mlp.n_experts=64", common=("model=tiny",))
    assert "choose a larger model, whose steps are finer" in refused(many, "params")


@pytest.mark.parametrize(("size", "rope_dim", "unit"), [("tiny", 16, UNIT), ("small", 16, UNIT), ("mini", 4, 4)])
def test_match_cache_moves_the_latent_in_the_coarsest_unit_that_is_near(size, rope_dim, unit):
    """mini: 64 numbers, 4 of them the rope key's."""
    latent = f"attention=mla attention.qk_norm=latent attention.qk_rope_head_dim={rope_dim}"
    found = variants("attention=gqa", latent, common=(f"model={size}",))
    matched = match(found, ["cache"], VOCAB)
    config = composed(*found[latent], *matched.overrides[latent]).model
    rank = config.attention.kv_lora_rank
    target = cache(composed(*found["attention=gqa"]).model)
    assert matched.overrides == {"attention=gqa": [], latent: [f"attention.kv_lora_rank={rank}"]}
    assert abs(cache(config) - target) < TOLERANCE * target

    def best(unit: int) -> int:
        ranks = range(unit, 249, unit)
        return min(ranks, key=lambda one: abs(cache(with_attention(config, kv_lora_rank=one)) - target))

    assert rank == best(unit)
    for coarser in (one for one in (UNIT, *FINER_UNITS) if one > unit):
        assert abs(cache(with_attention(config, kv_lora_rank=best(coarser))) - target) >= TOLERANCE * target


def test_match_cache_counts_the_rows_that_a_window_stores():
    found = variants("attention=gqa attention.window=128", "attention=mla")
    matched = match(found, ["cache"], VOCAB)
    assert matched.overrides["attention=mla"] == [
        "attention.kv_lora_rank=47"
    ]  # 144 of 256 rows of 128 numbers, less 24 + 1
    windowed = f"{LATENT} attention.window=48"  # and 16 rows of slack
    found = variants("attention=gqa", windowed, common=("model.context_length=128",))
    moved = composed(*found[windowed], *match(found, ["cache"], VOCAB).overrides[windowed]).model
    assert cache(moved) == cache(composed(*found["attention=gqa"]).model)
    assert moved.attention.kv_lora_rank + moved.attention.qk_rope_head_dim == 256


@pytest.mark.parametrize("rank, rope_dim", [(250, 6), (5, 16), (1, 8)])  # 250: an absorbed key of 256
def test_match_cache_reaches_latents_beyond_the_multiples_of_eight(rank, rope_dim):
    given = f"attention=mla attention.qk_rope_head_dim={rope_dim}"
    found = variants(f"{given} attention.kv_lora_rank={rank}", f"{given} attention.v_head_dim=16")
    assert list(match(found, ["cache"], VOCAB).overrides.values()) == [[], [f"attention.kv_lora_rank={rank}"]]


def test_match_cache_moves_kv_heads_to_a_divisor():
    found = variants(f"{LATENT} attention.kv_lora_rank=48", "attention=gqa", "attention=mha attention.head_dim=8")
    matched = match(found, ["cache"], VOCAB)
    assert matched.overrides["attention=gqa"] == ["attention.n_kv_heads=1"]
    assert matched.overrides["attention=mha attention.head_dim=8"] == []
    found = variants(f"{LATENT} attention.kv_lora_rank=112", "attention=mqa")
    assert match(found, ["cache"], VOCAB).overrides["attention=mqa"] == ["attention.n_kv_heads=2"]


@pytest.mark.parametrize("budgets", [("cache", "params"), ("flops", "cache")])
def test_match_of_two_budgets_moves_the_cache_first(budgets):
    found = attentions("gqa", "mla")
    matched = match(found, budgets, VOCAB)
    moved = matched.overrides["attention=mla"]
    assert [one.partition("=")[0] for one in moved] == ["attention.kv_lora_rank", "mlp.d_ff"]
    reference, config = (composed(*found[name], *matched.overrides[name]).model for name in found)
    for budget in budgets:
        assert abs(MEASURES[budget](config) / MEASURES[budget](reference) - 1) < TOLERANCE
    assert sum(line.startswith("matched") for line in matched.table) == 2


def test_match_gives_overrides_that_train_composes(compose):
    found = attentions("gqa", "mla", common=("mlp=gelu",))
    matched = match(found, ["cache", "params"], VOCAB)
    assert matched.overrides["attention=mla"] == ["attention.kv_lora_rank=103", "mlp.d_ff=448"]
    reference, config = (compose(*found[name], *matched.overrides[name]).model for name in found)
    assert cache(config) == cache(reference)
    assert abs(params(config) / params(reference) - 1) < TOLERANCE


def test_match_without_budgets_moves_nothing():
    assert match(attentions("mha"), [], VOCAB) == ({"attention=mha": []}, [])


# The table


def test_match_table_is_aligned_and_says_what_moved():
    assert match(attentions("gqa", "mqa", "mla", "stack"), ["params"], VOCAB).table == [
        "matched      parameters without embedding, head and positions, to the 723,072 of attention=gqa",
        "  attention=mqa    mlp.d_ff 512 -> 544  690,176 -> 722,944  -0.02 %",
        "  attention=mla    mlp.d_ff 512 -> 528  706,656 -> 723,040  +0.00 %",
        "  attention=stack  unchanged                       723,072  +0.00 %",
    ]


def test_match_table_says_that_nothing_had_to_move():
    matched = match(variants("optim=muon", "optim=adamw"), ["params"], VOCAB)
    assert matched.overrides == {"optim=muon": [], "optim=adamw": []}
    target = params(composed("optim=muon").model)
    assert matched.table == [
        f"matched      parameters without embedding, head and positions, to the {target:,} of optim=muon, "
        "within 0.5 % as they are",
        f"  optim=adamw  unchanged  {target:,}  +0.00 %",
    ]


# Refused


REFUSED = {
    "one variant alone, two budgets": (
        ["attention=mha"],
        (),
        ["params", "cache"],
        "match=[cache,params] compares variants: sweep over several, as in attention=mha,gqa",
    ),
    "a budget that is none": (
        ["attention=mha", "attention=gqa"],
        (),
        ["tokens"],
        "match=tokens: choose params, flops or cache",
    ),
    "two budgets that move one setting": (
        ["attention=mha", "attention=gqa"],
        (),
        ["flops", "params"],
        "match=[params,flops]: params and flops both move mlp.d_ff: choose one of them",
    ),
    "steps too coarse": (
        ["attention=mha", "attention=gqa"],
        ("model=mini", "mlp=swiglu"),
        ["params"],
        "match=params: attention=gqa reaches 105,024 (-1.97 %) with mlp.d_ff=208 and 108,096 (+0.90 %) with "
        "mlp.d_ff=216, not within 0.5 % of the 107,136 of attention=mha: choose a larger model, whose steps are "
        "finer, or choose match=none",
    ),
    "a baseline too small": (
        ["model=mini", "model=tiny"],
        (),
        ["params"],
        "match=params: model=tiny reaches 272,768 (+175.68 %) with mlp.d_ff=8 and 280,960 (+183.96 %) with "
        "mlp.d_ff=16, not within 0.5 % of the 98,944 of model=mini: make it the first variant, or choose "
        "match=none",
    ),
    "a baseline between two steps": (
        ["attention=mla", "attention=gqa"],
        (),
        ["cache"],
        "match=cache: attention=gqa reaches 1,024 (+12.28 %) with attention.n_kv_heads=1 and 2,048 (+124.56 %) "
        "with attention.n_kv_heads=2, not within 0.5 % of the 912 of attention=mla: make it the first variant, or "
        "choose match=none",
    ),
    "a key too wide": (
        ["attention=gqa", LATENT],
        ("model=gpt2",),
        ["cache"],
        f"match=cache: {LATENT} reaches 12,240 (-33.59 %) with attention.kv_lora_rank=239 and 12,288 "
        "(-33.33 %) with attention.kv_lora_rank=240, not within 0.5 % of the 18,432 of attention=gqa: make it the "
        "first variant, or set attention.kv_lora_rank=368 yourself, whose absorbed key is wider than the 256 of "
        "flash kernels, or choose match=none",
    ),
    "MHA": (
        ["attention=gqa", "attention=mha"],
        (),
        ["cache"],
        "match=cache: attention=mha has 4,096, +100.00 % off attention=gqa, and MHA is never moved: with fewer KV "
        "heads it would be none: make it the first variant, leave it out, or choose match=none",
    ),
    "a stack": (
        ["attention=gqa", "attention=stack"],
        (),
        ["cache"],
        "match=cache: attention=stack has 1,344, -34.38 % off attention=gqa, and a stack has no one latent or "
        "number of KV heads to move: make it the first variant, leave it out, or choose match=none",
    ),
    "naive execution": (
        ["attention=gqa", "attention=mla attention.execution=naive"],
        (),
        ["cache"],
        "match=cache: attention=mla attention.execution=naive has 4,096, +100.00 % off attention=gqa, and "
        "attention.execution=naive caches keys and values of all heads, however wide the latent is: make it the "
        "first variant, leave it out, or choose match=none",
    ),
    "the same as the baseline": (
        ["attention=mha", "attention=gqa"],
        (),
        ["cache"],
        "match=cache needs attention.n_kv_heads=4 in attention=gqa, which makes it the same as attention=mha: "
        "leave one of them out, or choose match=none",
    ),
    "set by the variant itself": (
        ["mlp.d_ff=512", "mlp.d_ff=1024"],
        (),
        ["params"],
        "match=params: mlp.d_ff=1024 has 1,313,152, +66.46 % off mlp.d_ff=512, and what would have to move is set "
        "by mlp.d_ff=1024: leave that out, or choose match=none",
    ),
    "set by what all share": (
        ["attention=mha", "attention=gqa"],
        ("++mlp.d_ff=512",),
        ["flops"],
        "match=flops: attention=gqa has 8,260,608, -4.54 % off attention=mha, and what would have to move is set "
        "by ++mlp.d_ff=512: leave that out, or choose match=none",
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_match_that_cannot_be_is_refused_in_one_line(rule):
    names, common, budgets, line = REFUSED[rule]
    assert refused(variants(*names, common=common), *budgets) == line


def test_match_takes_gqa_with_all_heads_for_mha():
    all_heads = "attention=gqa attention.n_kv_heads=all"
    assert "MHA is never moved" in refused(variants("attention=mqa", all_heads), "cache")


def test_match_accepts_a_setting_of_the_user_that_is_near_already():
    found = variants("attention=gqa", "attention=mla attention.kv_lora_rank=103")
    assert match(found, ["cache"], VOCAB).overrides == {name: [] for name in found}


def test_match_of_a_faulty_variant_is_refused_as_the_run_is():
    assert refused(variants("attention=mha", "attention=none"), "params").startswith("attention=none: ")
