"""Random configurations: each raises a one-line error, or builds a model that trains and decodes correctly."""

import copy
import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple, get_args

import torch
import yaml
from hypothesis import strategies as st

from common.conf_files import choices
from common.errors import Unsupported, UserError
from data.batches import Batch
from model.attention.base import divisors
from model.attention.indexed import UNUSED
from model.attention.mla import Execution
from model.initialise import initialised
from model.kernels.naive import Naive
from model.placement import Placement
from model.positions import Position
from model.rope import Layout, Scaling
from model.transformer import ModelConfig, TransformerLM
from tests.fuzz.choices import decided
from tests.support import (
    NEEDS,
    assert_one_line,
    composed_tree,
    logits_of,
    relative_error,
    sharpened,
    some_tokens,
    training_state,
)
from training.run.composer import choice
from training.run.config import Run, dump, pop_command_settings
from training.run.parts import MODEL_PARTS, RUN_PARTS
from training.step import train_step

VOCAB = 50


class Case(NamedTuple):
    tree: dict[str, Any]
    spoilt: bool  # some value was replaced by any other
    seed: int  # of the tokens, and of how they are cut into chunks


@functools.cache
def composed() -> dict[str, Any]:
    tree = composed_tree()
    pop_command_settings(tree)
    return tree


@functools.cache
def section(group: str, name: str) -> dict[str, Any]:
    """A choice of a group, with Hydra's fifth of a second only where it needs other settings."""
    found = choice(group, name)
    if (group, name) in NEEDS or "${" in str(found):
        return composed_tree(f"{group}={name}", *NEEDS.get((group, name), ()))[group]
    return found


def unset_or(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


def even(most: int) -> st.SearchStrategy:
    return st.integers(1, most // 2).map(lambda n: 2 * n)


# Mostly what can be built, whatever attention it belongs to; what does not fit together is drawn too.
ATTENTION = {
    "head_dim": unset_or(even(16)),
    "q_lora_rank": unset_or(st.integers(0, 24)),
    "kv_lora_rank": unset_or(st.integers(1, 40)),
    "qk_nope_head_dim": unset_or(st.integers(1, 12)),
    "qk_rope_head_dim": unset_or(even(8)),
    "v_head_dim": unset_or(st.integers(1, 16)),
    "qk_norm": st.booleans(),
    "qk_norm_groups": st.sampled_from([1, 1, 1, 2, 3]),
    "dropout": st.sampled_from([0.0, 0.0, 0.0, 0.2]),
    "rope_theta": st.sampled_from([10000.0, 100.0, 1e6]),
    "rope_layout": st.sampled_from(get_args(Layout)),
    "rope_dim": unset_or(even(8)),
    "position": st.sampled_from(["rope", *get_args(Position)]),
    "k_rope_from": st.sampled_from(["hidden", "latent"]),
    "execution": st.sampled_from(get_args(Execution)),
}
STRETCHES = [{}, {}, {}, *({"rope_scaling": s, "rope_factor": f} for s in get_args(Scaling) for f in (1.5, 4.0))]
HUGE = [10**6, 2**31, -(2**63), 10**15, 10**400]
FLOATS = [0.0, 0.5, 1.0, 5e-324, 1e-30, 1e30, 1e300, math.inf, math.nan]
EXTREMES = [*HUGE, -1, 0, 1, 2, 3, 7, *FLOATS, None, True, "", [], {}]
NUMBERS = st.integers(-2, 70) | st.sampled_from(HUGE) | st.sampled_from(EXTREMES) | st.integers() | st.floats()
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from(["", "auto", "1", "1e3", "nan", "???", "${steps}", "a\nb", "model.mlp.SwiGLUConfig", "os.system"]),
    st.text(max_size=20),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), st.integers(), max_size=3),
)


@st.composite
def experts(draw) -> dict[str, Any]:
    """Settings of a mixture, mostly such as go together."""
    n_groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, n_groups))
    top_k = draw(st.integers(1, size * top_groups))
    balanced = top_k < n_groups * size or not draw(st.integers(0, 7))
    return {
        "n_experts": n_groups * size,
        "n_groups": n_groups,
        "top_groups": top_groups,
        "top_k": top_k,
        "n_shared_experts": draw(st.integers(0, 2)),
        "n_dense_layers": draw(st.sampled_from([0, 0, 0, 1])),
        "dense_d_ff": draw(unset_or(st.integers(1, 40))),
        "router": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalise": draw(st.booleans()) if top_k > 1 else not draw(st.integers(0, 7)),
        "scaling": draw(st.sampled_from([1.0, 2.5])),
        "bias_rate": draw(st.sampled_from([0.001, 0.5])) if balanced else 0.0,
        "balance_loss": draw(st.sampled_from([0.0, 0.01])) if balanced else 0.0,
        "router_z_loss": draw(st.sampled_from([0.0, 0.001])),
    }


@st.composite
def indexers(draw, always: bool) -> dict[str, Any]:
    """Settings of an indexer, mostly such as go together; or of none."""
    unset = {"top_k": None, **UNUSED}
    if not (always or draw(st.booleans())):
        return unset
    return {
        "top_k": draw(st.integers(1, 8)),
        "n_heads": draw(st.integers(1, 3)),
        "head_dim": draw(unset_or(st.integers(1, 16))),
        "stage": draw(st.sampled_from(["sparse", "sparse", "warmup"])),
        "weight": draw(st.sampled_from([0.0, 1.0])),
    }


@st.composite
def fitting(draw, attention: str, names: Collection[str], n_heads: int) -> dict[str, Any]:
    """Settings of those names, of an attention of that choice."""
    found = {name: draw(ATTENTION[name]) for name in names if name in ATTENTION}
    if "rope_scaling" in names:
        found |= draw(st.sampled_from(STRETCHES))
    if attention in ("mla", "dsa"):
        found["qk_norm"] = draw(st.sampled_from(["latent", "head"]))
    if "indexer" in names:
        found["indexer"] = draw(indexers(always=attention == "dsa"))
    if attention == "mha":
        found["n_kv_heads"] = n_heads
    elif attention == "gqa":
        found["n_kv_heads"] = draw(unset_or(st.sampled_from(divisors(n_heads)) | st.integers(1, 6)))
    return found


@st.composite
def cases(draw) -> Case:
    tree = copy.deepcopy(composed())
    for group in (*MODEL_PARTS, *RUN_PARTS):
        name = draw(st.sampled_from(choices(group)))
        tree[group] = copy.deepcopy(section(group, name))
        if group == "attention":
            attention = name
    n_heads, window, sequences = draw(st.integers(1, 6)), draw(st.integers(2, 24)), draw(st.integers(1, 6))
    d_model = n_heads * draw(even(16)) if draw(st.integers(0, 7)) else draw(st.integers(1, 70))
    tree["model"] |= {
        "n_layers": draw(st.integers(1, 2)),
        "d_model": d_model,
        "n_heads": n_heads,
        "context_length": window,
        "tie_embeddings": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "position_embedding": draw(st.sampled_from(["none", "learned", "sinusoidal"])),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "bias": draw(st.booleans()),
        "logit_softcap": draw(unset_or(st.sampled_from([0.5, 30.0]))),
        "own_logit_init": draw(unset_or(st.sampled_from([0.5, 1.0]))),
        "zero_init": draw(st.booleans()),
        "mtp_depth": draw(st.sampled_from([0, 0, 0, 1])),
    }
    tree["attention"] |= draw(fitting(attention, tree["attention"].keys(), n_heads))
    tree["mlp"] |= {"d_ff": draw(unset_or(st.integers(1, 64))), "bias": draw(unset_or(st.booleans()))}
    tree["mlp"] |= draw(experts()) if "n_experts" in tree["mlp"] else {}
    tree["optim"]["lr"] = draw(unset_or(st.floats(1e-4, 1e-1)))
    tree |= {
        "steps": draw(st.integers(1, 20)),
        "batch_tokens": window * sequences,
        "micro_batch_size": draw(unset_or(st.sampled_from(divisors(sequences)) | st.integers(1, 6))),
        "eval_tokens": draw(st.integers(window, 10 * window)),
        "clip_norm": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "sample_prompt": draw(unset_or(st.text(max_size=20))),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    if draw(st.integers(0, 7)):
        make_fit(tree)
    spoils = draw(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 2]))
    for _ in range(spoils):
        spoil(draw, tree)
    return Case(tree, bool(spoils), draw(st.integers(0, 2**31)))


def make_fit(tree: dict[str, Any]) -> None:
    """Take away what most often does not go together, else nine of ten cases would be refused."""
    attention, mlp, model = tree["attention"], tree["mlp"], tree["model"]
    heads = model["n_heads"]
    model["d_model"] = heads * max(1, model["d_model"] // heads)
    if "pattern" in attention:
        model["n_layers"] = len(attention["pattern"])
    rotates = attention.get("position", "rope") == "rope"
    replace(attention, "rope_scaling", "none", not rotates)
    replace(attention, "rope_factor", None, attention.get("rope_scaling") == "none")
    replace(attention, "k_rope_from", "hidden", not rotates)
    for name in ("rope_dim", "qk_rope_head_dim"):
        replace(attention, name, None, not rotates)
    replace(attention, "head_dim", None, attention.get("qk_nope_head_dim") is not None)
    replace(attention, "n_kv_heads", heads, heads % (attention.get("n_kv_heads") or 1) > 0)
    apart = attention.get("qk_norm") == "latent" or heads % attention.get("qk_norm_groups", 1) > 0
    replace(attention, "qk_norm_groups", 1, apart)
    indexer = attention.get("indexer", {"stage": "sparse", "top_k": None})
    replace(indexer, "weight", 1.0, indexer["stage"] == "warmup")
    if indexer["top_k"] is not None and "Flex" in tree["kernel"]["_target_"]:
        tree["kernel"] = copy.deepcopy(section("kernel", "auto"))
    replace(mlp, "renormalise", False, mlp.get("top_k") == 1)
    replace(mlp, "n_dense_layers", 0, mlp.get("n_dense_layers", 0) >= model["n_layers"])
    for name in ("bias_rate", "balance_loss"):
        replace(mlp, name, 0.0, mlp.get("top_k") == mlp.get("n_experts"))
    for group, plain in (("data", "synthetic"), ("tokenizer", "byte")):  # others go together in few ways
        tree[group] = copy.deepcopy(section(group, plain))
    sequences = tree["batch_tokens"] // model["context_length"]
    replace(tree, "micro_batch_size", None, sequences % (tree["micro_batch_size"] or 1) > 0)


def replace(settings: dict[str, Any], name: str, value: Any, where: bool) -> None:
    """Replace a setting, if it is there."""
    if where and name in settings:
        settings[name] = value


def spoil(draw, tree: dict[Any, Any]) -> None:
    """Replace, remove or add a setting anywhere."""
    inner = [value for value in tree.values() if isinstance(value, dict)]
    place = draw(st.sampled_from([tree, *inner]))
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    key = draw(st.text(max_size=8) | st.integers() | st.none())
    if how != "add" and place:
        key = draw(st.sampled_from(list(place)))
    if how == "remove":
        place.pop(key, None)
    else:
        like = place.get(key)
        alike = NUMBERS if like is None or isinstance(like, int | float) else ANYTHING
        place[key] = draw(alike if draw(st.booleans()) else ANYTHING)


@st.composite
def one_extreme(draw) -> Case:
    """A valid configuration except for one setting."""
    tree = copy.deepcopy(smallest(draw(st.sampled_from(choices("attention")))))
    places = [tree, *(value for value in tree.values() if isinstance(value, dict))]
    place, key = draw(st.sampled_from([(i, key) for i, inner in enumerate(places) for key in inner]))
    places[place][key] = draw(st.sampled_from(EXTREMES))
    return Case(tree, True, 0)


@functools.cache
def smallest(attention: str) -> dict[str, Any]:
    model = ("model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.context_length=8")
    tree = composed_tree("experiment=smoke", f"attention={attention}", *model, "batch_tokens=16", "eval_tokens=16")
    pop_command_settings(tree)
    return tree


def is_small(run: Run) -> bool:
    tree = dump(run)
    widths = [tree["model"]["d_model"], tree["model"]["n_heads"], tree["model"]["context_length"]]
    widths += [n for part in ("attention", "mlp") for n in tree[part].values() if type(n) is int]
    return max(widths) <= 1000 and tree["model"]["n_layers"] <= 4 and run.batch_tokens <= 1000


def check_training(run: Run, spoilt: bool) -> None:
    """One update in float32 on random tokens."""
    model = initialised(run.model, VOCAB, run.seed)
    before, optimizer = copy.deepcopy(model.state_dict()), run.optim.build(model)
    tokens = some_tokens(run.sequences, run.model.context_length + 1, VOCAB)
    batches = [Batch(rows[:, :-1], rows[:, 1:]) for rows in tokens.split(run.micro_batch_size)]
    state = training_state(model, optimizer, clip_norm=run.clip_norm, seed=run.seed)
    result = train_step(state, batches, run.lr_factor(0))
    assert result.loss.isfinite()
    after = model.state_dict()
    changed = any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    finite = all(tensor.isfinite().all() for tensor in after.values())
    assert (changed and finite) or spoilt  # a spoilt rate may move nothing, or too far


@torch.no_grad()
def check_decoding(config: ModelConfig, seed: int) -> None:
    """Random tokens through the caches, a plain prefill and then chunks of any size, against the same weights in one
    uncached forward of the reference kernel and, where there are several, the reference execution."""
    attention = config.attention
    if "naive" in attention.executions:
        attention = attention.model_copy(update={"execution": "naive"})
    oracle = initialised(config.model_copy(update={"kernel": Naive(), "attention": attention}), VOCAB)
    model = initialised(config, VOCAB)
    model.load_state_dict(sharpened(oracle).state_dict())
    draw = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    length = between(1, config.context_length)
    tokens, positions = some_tokens(2, length, VOCAB, seed), torch.arange(length)[None]
    caches = model.make_caches(2, between(length, length + 5))
    start = between(1, length)
    found = [logits_of(model, tokens[:, :start], Placement.prefill(torch.tensor([start, start]), caches))]
    longest = between(1, 5)
    while start < length:
        end = min(length, start + between(1, longest))
        kv_len = end + between(0, 3) if between(0, 1) else None
        chunk = slice(start, end)
        at = Placement.decode(positions[:, chunk], caches, kv_len)
        found.append(logits_of(model, tokens[:, chunk], at))
        start = end
    expected = logits_of(oracle, tokens)
    if not expected.any():  # LayerNorm of one number is zero
        assert not torch.cat(found, 1).any()
        return
    check_near(oracle, tokens, torch.cat(found, 1), expected)


def check_near(oracle: TransformerLM, tokens: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits (B, T, V) are those of the oracle, wherever its choices of keys and experts are decided, and numbers
    elsewhere."""
    assert found.isfinite().all()
    if relative_error(found, expected) <= 1e-5:
        return
    places = decided(oracle, tokens)[..., None]
    error = relative_error(found.where(places, expected), expected)
    # A width of two or so can make a model whose logits hang on the last bit of its weights.
    assert error <= 1e-5 or error <= min(1e-3, 3 * last_bit(oracle, tokens, expected))


def last_bit(model: TransformerLM, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """The relative error that a unit in the last place of the weights makes, the largest of a few draws."""
    exact, errors = copy.deepcopy(model.state_dict()), []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-23 * torch.randint(-1, 2, parameter.shape, generator=draw))
        errors.append(relative_error(logits_of(model, tokens), logits))
        model.load_state_dict(exact)
    return max(errors)


def check(case: Case) -> str:
    try:
        run = Run.from_tree(case.tree)
    except UserError as error:
        assert_one_line(error)
        return "refused"
    assert Run.from_tree(yaml.safe_load(yaml.safe_dump(dump(run)))) == run
    assert all(math.isfinite(run.learning_rates(step)["lr"]) for step in (0, run.steps // 2, run.steps - 1))
    if not is_small(run):
        return "legal, too large to build"
    try:
        check_training(run, case.spoilt)
        check_decoding(run.model, case.seed)
    except Unsupported as error:
        assert_one_line(error)
        return "legal, without such a kernel"
    return "legal"


def test_config_random_settings_raise_user_error_or_train_and_decode(fuzz):
    fuzz(check, cases(), short=25, long=1800)


def test_config_single_extreme_setting_raises_user_error_or_trains_and_decodes(fuzz):
    fuzz(check, one_extreme(), short=40, long=1200)
