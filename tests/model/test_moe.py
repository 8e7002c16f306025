"""Mixture of experts: against its formula, on every path; what routes, what is counted, and what it costs."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from data.batches import document_positions
from model import cost, grouped
from model.context import Context
from model.initialise import initialised
from model.layout import Experts, Kind, Role
from model.mlp import SwiGLU
from model.moe import BALANCE_LOSS, LOAD, Z_LOSS, MoE, Routes, balance_loss, expert_load, first, z_loss
from model.placement import Placement
from tests.model.attention.laws import ways_to_decode
from tests.support import (
    assert_one_line,
    composed_run,
    configured,
    logits_of,
    relative_error,
    small_config,
    small_model,
    some_tokens,
)
from training.optim.muon import MuonConfig

PLAIN = {"lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.0, "momentum_warmup": 0}  # of Muon
CHOICES = [
    (),
    ("mlp.router=softmax", "mlp.renormalise=false", "mlp.bias_rate=0", "mlp.n_shared_experts=0"),
    ("mlp.router=softmax", "mlp.top_k=1", "mlp.renormalise=false", "mlp.n_shared_experts=2"),
    ("mlp.n_groups=4", "mlp.top_groups=2", "mlp.top_k=3", "mlp.scaling=2.5", "model.bias=true"),
    ("mlp.d_ff=7",),  # which no kernel multiplies at once
]


def moe(*overrides: str, **options) -> MoE:
    """The first layer's, its selection moved by a bias where it has one."""
    mlp = small_model("attention=gqa", "mlp=moe", *overrides, **options).layers[0].mlp
    if mlp.router.selection_bias is not None:
        with torch.no_grad():
            mlp.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, mlp.config.n_experts))
    return mlp


def context(positions: torch.Tensor, *collect: str) -> Context:
    return Context(Placement(positions), {}, collect=frozenset(collect))


def hidden(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(seed))


def by_hand(mlp: MoE, x: torch.Tensor) -> torch.Tensor:
    """Each token by itself, as the formula has it: (N, d) -> (N, d)."""
    config, found = mlp.config, []
    for token in x:
        logits = mlp.router.weight @ token
        scores = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
        biased = scores.detach().clone()
        if mlp.router.selection_bias is not None:
            biased += mlp.router.selection_bias
        size = config.n_experts // config.n_groups
        groups = [sorted(biased[i : i + size].tolist())[-2:] for i in range(0, config.n_experts, size)]
        allowed = sorted(range(config.n_groups), key=lambda i: -sum(groups[i]))[: config.top_groups]
        ranked = sorted((e for e in range(config.n_experts) if e // size in allowed), key=lambda e: -biased[e])
        chosen = ranked[: config.top_k]
        total = sum(scores[e] for e in chosen) if config.renormalise else 1.0
        out = 0 if mlp.shared is None else mlp.shared(token[None, None], None)[0][0, 0]
        for e in chosen:
            gate, up, down = (getattr(mlp.experts, f"{name}_proj")[e] for name in ("gate", "up", "down"))
            out = out + config.scaling * scores[e] / total * (down @ (F.silu(gate @ token) * (up @ token)))
        found.append(out)
    return torch.stack(found)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_moe_and_its_gradients_equal_the_formula(choice, at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(grouped, "has_kernel", lambda *_: False)
    mlp, x = moe(*choice), hidden(2, 9).requires_grad_()
    wanted = [x, *mlp.parameters()]
    found, _ = mlp(x, context(torch.arange(9)[None]))
    expected = by_hand(mlp, x.flatten(0, 1)).view_as(x)
    assert relative_error(found, expected) <= 2e-6
    direction = hidden(2, 9, seed=1)
    gradients, others = (torch.autograd.grad((y * direction).sum(), wanted) for y in (found, expected))
    assert all(relative_error(one, other) <= 1e-5 for one, other in zip(gradients, others, strict=True))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_is_that_of_each_group_with_empty_ones_and_any_stride(dtype, monkeypatch):
    x, weight = torch.randn(20, 16, dtype=dtype), torch.randn(5, 24, 16, dtype=dtype)
    ends = torch.tensor([0, 6, 6, 20, 20], dtype=torch.int32)
    expected = torch.cat([x[:6] @ weight[1].mT, x[6:] @ weight[3].mT])
    assert grouped.has_kernel("cpu", dtype, 24, 16) and not grouped.has_kernel("cpu", dtype, 24, 15)
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(grouped, "has_kernel", lambda *_: False)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped.grouped_product(*leaves, ends)
        assert relative_error(y, expected) <= (1e-6 if dtype == torch.float32 else 1e-2)
        y.sum().backward()  # whose gradient is a number with strides of zero
        assert relative_error(leaves[0].grad[:6], weight[1].sum(0).expand(6, -1)) <= 2e-2
        assert not leaves[1].grad[[0, 2, 4]].any() and leaves[1].grad[[1, 3]].all()


def test_grouped_product_without_a_kernel_says_so_once(caplog):
    grouped.has_kernel.cache_clear()
    with caplog.at_level("INFO", "headroom"):
        for _ in range(2):
            moe("mlp.d_ff=11")(hidden(1, 4), context(torch.arange(4)[None]))
    said = [record.message for record in caplog.records if "one after another" in record.message]
    assert len(said) == 1 and "rows of 11 or 64 numbers are no multiples of 16 bytes" in said[0]


@pytest.mark.parametrize("groups", [(), ("mlp.n_groups=4", "mlp.top_groups=2")], ids=" ".join)
def test_experts_of_equal_scores_are_chosen_from_the_first(groups):
    router = moe("mlp.top_k=3", *groups, "mlp.bias_rate=0").router
    with torch.no_grad():
        router.weight.zero_()
    assert router(hidden(1, 5)[0]).experts.tolist() == [[0, 1, 2]] * 5
    scores = torch.tensor([[1.0, 3, 2, 3, 3, 2, 1, 3]])
    assert first(scores, 5).tolist() == [[1, 3, 4, 7, 2]]


def test_losing_groups_are_masked_whatever_the_bias_is():
    """With zeros for the losers' scores, these would win where the bias is below them."""
    router = moe("mlp.n_groups=4", "mlp.top_groups=1", "mlp.top_k=2").router
    with torch.no_grad():
        router.selection_bias.fill_(-3)
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.2, 0.6, 0.5, 0.3, 0.3]])
    assert router.choose(scores).tolist() == [[4, 5]]  # 1.1 together, and 1.0 of the first group


def test_bias_chooses_and_does_not_mix():
    router, x = moe("mlp.top_k=2").router, hidden(1, 50)[0]
    with torch.no_grad():
        router.selection_bias.zero_()
        router.selection_bias[5] = 10
        router.weight[5].zero_()
    routes = router(x)
    assert (routes.experts[:, 0] == 5).all()
    own = 0.5 / (0.5 + routes.logits.sigmoid().gather(1, routes.experts[:, 1:])[:, 0])
    torch.testing.assert_close(routes.weights[:, 0], own)


def test_router_scores_in_float32_where_the_rest_is_bfloat16():
    mlp = moe().bfloat16()
    x = hidden(1, 30)[0].bfloat16()
    routes = mlp.router(x)
    assert routes.logits.dtype == routes.weights.dtype == torch.float32
    assert torch.equal(routes.logits, x.float() @ mlp.router.weight.float().T)
    assert mlp(x[None], context(torch.arange(30)[None]))[0].dtype == torch.bfloat16


def test_output_of_a_token_does_not_depend_on_its_neighbours():
    """Alone, in a batch, beside another document, and beside padding."""
    model = small_model("attention=gqa", "mlp=moe", "mlp.n_groups=2", "mlp.top_groups=1")
    tokens = some_tokens(4, 24, vocab_size=99)
    together = logits_of(model, tokens)
    for row in range(4):
        assert relative_error(logits_of(model, tokens[row : row + 1]), together[row : row + 1]) <= 1e-5
    joined = tokens[:2].flatten()[None].clone()
    joined[0, [0, 24]] = 99  # which begins a document
    packed = logits_of(model, joined, Placement.packed(*document_positions(joined, document_start=99)))
    apart = logits_of(model, joined.view(2, 24))
    assert relative_error(packed.view_as(apart), apart) <= 1e-5
    lengths = torch.tensor([24, 5, 24, 13])
    padded = logits_of(model, tokens, Placement.prefill(lengths))
    assert all(relative_error(padded[i, :n], together[i, :n]) <= 1e-5 for i, n in enumerate(lengths))


def test_cached_equals_uncached_in_every_way_to_decode():
    model = small_model("attention=mla", "mlp=moe", "mlp.n_dense_layers=1")
    tokens = some_tokens(2, 30)
    whole = logits_of(model, tokens)
    for way, logits in ways_to_decode(model, tokens):
        assert relative_error(logits, whole) <= 1e-5, way


def test_load_counts_each_choice_of_a_token_and_no_padding():
    mlp, x = moe("mlp.top_k=3"), hidden(2, 6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]])
    load = mlp(x, context(positions, LOAD))[1][LOAD]
    kept = torch.cat([x[0], x[1, :2]])
    expected = torch.bincount(mlp.router(kept).experts.flatten(), minlength=8)
    assert load.dtype == torch.float32 and load.tolist() == expected.tolist() and load.sum() == 8 * 3
    assert mlp(x, context(positions))[1] == {}


def routes_of(experts: list[list[int]], logits: torch.Tensor) -> Routes:
    return Routes(logits, logits.softmax(-1), torch.tensor(experts), torch.ones(len(experts), len(experts[0])))


def test_balance_loss_is_one_for_even_loads_and_the_formula_for_others():
    even = routes_of([[0, 1], [2, 3]], torch.zeros(2, 4))
    assert balance_loss(even, torch.ones(2, dtype=torch.bool)) == 1
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routes = routes_of([[0, 1], [0, 2], [3, 1]], logits)
    counted = torch.tensor([True, True, False])
    assert expert_load(routes, counted).tolist() == [2, 1, 1, 0]
    p = logits.softmax(-1)[:2].mean(0)
    torch.testing.assert_close(balance_loss(routes, counted), (torch.tensor([2.0, 1, 1, 0]) * p).sum())
    (gradient,) = torch.autograd.grad(balance_loss(routes, counted), logits)
    assert gradient[:2].any() and not gradient[2].any()


def test_z_loss_is_the_mean_square_of_the_logarithm_of_the_sum():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    routes = routes_of([[0], [1], [2]], logits)
    expected = logits[:2].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(z_loss(routes, torch.tensor([True, True, False])), expected)


def test_losses_are_returned_where_they_have_a_weight():
    model = small_model("attention=gqa", "mlp=moe", "mlp.balance_loss=0.01", "mlp.router_z_loss=0.001")
    weights = {f"layers.{i}.{name}": w for i in (0, 1) for name, w in ((BALANCE_LOSS, 0.01), (Z_LOSS, 0.001))}
    assert model.auxiliary_losses == weights
    assert not small_model("attention=gqa", "mlp=moe").auxiliary_losses
    aux = model(some_tokens(2, 8), collect=frozenset({BALANCE_LOSS})).aux
    assert aux.keys() == {"layers.0.balance_loss", "layers.1.balance_loss"}


def test_first_layers_are_dense_in_a_width_of_their_own():
    model = small_model("attention=gqa", "mlp=moe", "mlp.n_dense_layers=1", "mlp.dense_d_ff=40", "mlp.d_ff=24")
    dense, experts = (block.mlp for block in model.layers)
    assert type(dense) is SwiGLU and dense.up_proj.weight.shape == (40, 64)
    assert experts.experts.up_proj.shape == (8, 24, 64) and experts.shared.up_proj.weight.shape == (24, 64)


def test_unset_widths_give_a_token_as_many_products_as_swiglu():
    for choice in (("mlp.top_k=3",), ("mlp.n_shared_experts=0",), ("mlp.n_dense_layers=1",)):
        config = small_config("attention=gqa", "mlp=moe", *choice).mlp
        dense = small_config("attention=gqa", "mlp=swiglu").mlp.d_ff
        assert config.dense_d_ff == dense and config.d_ff % 8 == 0
        assert 0 <= (config.top_k + config.n_shared_experts) * config.d_ff - dense < 8 * 4


def test_layout_describes_experts_and_router():
    model = small_model("attention=gqa", "mlp=moe", "mlp.top_k=3", "mlp.d_ff=24")
    table = model.layout()
    down, router = table["layers.1.mlp.experts.down_proj"], table["layers.1.mlp.router.weight"]
    assert (down.role, down.kind, down.fan_in, down.shard_axis) == (Role.RESIDUAL_OUTPUT, Kind.MATRIX, 24, 0)
    assert down.experts == Experts(8, 3) and down.active(8 * 24 * 64) == 3 * 24 * 64
    assert (router.role, router.fan_in, router.experts) == (Role.ROUTER, 64, None)
    stored = model.get_parameter("layers.1.mlp.experts.down_proj").detach()
    for layout in (down, down.whole()):
        (view,) = layout.views(stored).values()
        assert torch.equal(view, stored) and view.data_ptr() == stored.data_ptr()
    llama = "model.layers.1.mlp."
    assert down.published.llama == llama + "experts.{e}.down_proj.weight"
    assert router.published.llama == llama + "gate.weight"
    assert table["layers.1.mlp.shared.up_proj.weight"].published.llama == llama + "shared_experts.up_proj.weight"
    assert "layers.1.mlp.router.selection_bias" in model.state_dict()
    assert "layers.1.mlp.router.selection_bias" not in dict(model.named_parameters())


def test_each_experts_matrices_begin_with_the_spread_of_their_fan_in():
    model = initialised(small_config("attention=gqa", "mlp=moe", "mlp.d_ff=48", "model.zero_init=false"), 100)
    experts = model.layers[0].mlp.experts
    for parameter, std in ((experts.up_proj, 64**-0.5), (experts.down_proj, 48**-0.5 / math.sqrt(2 * 2))):
        spread = parameter.flatten(1).std(1)
        assert ((spread / std - 1).abs() < 0.1).all() and len(spread.unique()) == 8
    assert model.layers[0].mlp.router.weight.std().item() == pytest.approx(64**-0.5, rel=0.15)
    assert not initialised(small_config("attention=gqa", "mlp=moe"), 100).layers[0].mlp.experts.down_proj.any()


@pytest.mark.parametrize("per_head", [True, False])
def test_muon_moves_each_expert_by_an_orthogonal_matrix(per_head):
    model = small_model("attention=gqa", "mlp=moe", "mlp.d_ff=24")
    optimizer, before = configured(MuonConfig, **PLAIN, per_head=per_head).build(model), {}
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        before[name], p.grad = p.detach().clone(), torch.randn(p.shape, generator=draw)
    optimizer.step()
    for name in ("up_proj", "down_proj"):
        moved = model.layers[0].mlp.experts.get_parameter(name).detach() - before[f"layers.0.mlp.experts.{name}"]
        spectra = torch.linalg.svdvals(moved / 0.02 / math.sqrt(max(1, moved.shape[1] / moved.shape[2])))
        assert ((spectra > 0.6) & (spectra < 1.25)).float().mean() > 0.9


def test_costs_count_the_experts_that_a_token_meets():
    config = small_config("attention=gqa", "mlp=moe", "mlp.d_ff=24", "mlp.n_dense_layers=1", "mlp.dense_d_ff=40")
    dense = small_config("attention=gqa", "mlp=swiglu", "mlp.d_ff=40")
    model, other = cost.on_meta(config, 100), cost.on_meta(dense, 100)
    of_expert, router, layer = 3 * 24 * 64, 8 * 64, 3 * 40 * 64
    assert cost.parameters(model)["mlp"] == layer + router + 9 * of_expert
    assert cost.active_parameters(model) == cost.active_parameters(other) - layer + router + 3 * of_expert
    assert cost.active_parameters(other) == sum(cost.parameters(other).values())
    assert cost.has_experts(model) and not cost.has_experts(other)
    mine, its = cost.flops(config, 100), cost.flops(dense, 100)
    assert mine.per_token == its.per_token + 2 * (router + 3 * of_expert - layer)


def test_weights_read_by_a_step_are_those_of_the_experts_that_its_tokens_can_choose():
    model = small_model("attention=gqa", "mlp=moe", "mlp.top_k=3")
    every = 4 * sum(parameter.numel() for parameter in model.parameters())
    of_expert = 4 * 2 * 3 * model.config.mlp.d_ff * 64
    assert cost.weight_bytes_read(model, 1) == 4 * cost.active_parameters(model) == every - 5 * of_expert
    assert [cost.weight_bytes_read(model, tokens) for tokens in (2, 3, 9)] == [every - 2 * of_expert, every, every]


def test_deepseek_v3_has_671_billion_parameters_of_which_a_token_meets_37():
    config = composed_run(
        *("model.n_layers=61", "model.d_model=7168", "model.n_heads=128", "model.tie_embeddings=false"),
        *(
            "attention=mla",
            "attention.kv_lora_rank=512",
            "attention.q_lora_rank=1536",
            "attention.qk_nope_head_dim=128",
        ),
        *("attention.qk_rope_head_dim=64", "attention.v_head_dim=128", "model.qk_bias=false"),
        *("mlp=moe", "mlp.d_ff=2048", "mlp.n_experts=256", "mlp.top_k=8", "mlp.n_dense_layers=3"),
        *("mlp.dense_d_ff=18432", "mlp.n_groups=8", "mlp.top_groups=4", "mlp.scaling=2.5"),
    ).model
    model = cost.on_meta(config, 129_280)
    embedding = 129_280 * 7168
    assert sum(cost.parameters(model).values()) == pytest.approx(671.0e9, rel=1e-3)
    assert cost.active_parameters(model) - embedding == pytest.approx(36.7e9, rel=5e-3)


def test_model_on_the_meta_device_has_shapes_forward_and_backward():
    model = cost.on_meta(small_config("attention=gqa", "mlp=moe"), 100)
    hidden = model(some_tokens(2, 8).to("meta"), collect=frozenset({LOAD}))
    assert hidden.x.shape == (2, 8, 64) and hidden.aux["layers.0.expert_load"].shape == (8,)
    hidden.x.sum().backward()
    assert all(p.grad.shape == p.shape for name, p in model.named_parameters())


REFUSED = {
    "mlp.top_k=0": "mlp.top_k=0: give at least 1 and at most 1048576",
    "mlp.top_k=9": "mlp.top_k=9 is more than mlp.n_experts=8: choose at most that",
    "mlp.n_groups=3": "mlp.n_groups=3 does not divide mlp.n_experts=8: choose one of 1, 2, 4, 8",
    "mlp.n_groups=2 mlp.top_groups=3": "mlp.top_groups=3 is more than mlp.n_groups=2: choose at most that",
    "mlp.n_groups=4 mlp.top_groups=1 mlp.top_k=3": "mlp.top_k=3 is more than the 2 experts in mlp.",
    "mlp.n_dense_layers=4": "mlp.n_dense_layers=4 leaves none of model.n_layers=4 to experts: choose at",
    "mlp.top_k=8": "mlp.bias_rate=0.001 balances nothing where mlp.top_k=8 chooses all experts: set mlp.bias_r",
    "mlp.top_k=8 mlp.bias_rate=0 mlp.balance_loss=0.1": "mlp.balance_loss=0.1 balances nothing where mlp.top_k=8",
    "mlp.top_k=1": "mlp.top_k=1 with mlp.renormalise=true gives each chosen expert the weight 1, of which the router",
    "mlp.router=tanh": "mlp.router=tanh: choose softmax or sigmoid",
    "mlp.bias_rate=-1": "mlp.bias_rate=-1: give at least 0 and at most 1",
    "mlp.scaling=0": "mlp.scaling=0: give more than 0",
    "mlp.bias=true mlp.n_shared_experts=0": "mlp.bias=true: routed experts have no biases, and there are no others: ",
    "+mlp.n_expert=4": "mlp.n_expert=4: no such key; did you mean",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_experts_that_cannot_be_are_refused_in_one_line(typed):
    with pytest.raises(UserError) as caught:
        composed_run("mlp=moe", *typed.split())
    assert_one_line(caught.value)
    assert str(caught.value).startswith(REFUSED[typed]), caught.value


def test_balance_by_bias_and_losses_together_is_allowed():
    model = small_model("mlp=moe", "mlp.balance_loss=0.001", "mlp.router_z_loss=0.002")
    assert set(model.auxiliary_losses.values()) == {0.001, 0.002}
    assert model.layers[0].mlp.router.selection_bias is not None
    unbiased = small_model("mlp=moe", "mlp.top_k=8", "mlp.bias_rate=0")
    assert unbiased.layers[0].mlp.router.selection_bias is None


@pytest.mark.slow
def test_moe_compiles_as_one_graph_with_its_gradients():
    model = small_model("attention=gqa", "mlp=moe")
    tokens = some_tokens(2, 16)

    def loss(model, tokens):
        out = model(tokens, collect=frozenset({LOAD}))
        return out.x.square().mean(), out.aux["layers.0.expert_load"]

    compiled, load = torch.compile(loss, fullgraph=True, dynamic=False)(model, tokens)
    plain, expected = loss(model, tokens)
    assert torch.equal(load, expected)
    gradients, others = (torch.autograd.grad(one, list(model.parameters())) for one in (compiled, plain))
    assert all(relative_error(one, other) <= 1e-4 for one, other in zip(gradients, others, strict=True))
