"""Every law, for every file under conf/attention and the choices within them (DESIGN: the laws)."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.compiled_step import bucket, decode_step
from model.attention.latent import Projected
from model.attention.mla import MLA
from model.cache import Cache
from model.context import Context
from model.initialise import initialised
from model.kernels import online
from model.kernels.base import Attended, How, Kernel
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import SDPA
from model.kernels.tiles import Tiles
from model.layout import Kind, Role
from model.mask import CAUSAL, Mask
from model.placement import Placement
from model.transformer import TransformerLM
from tests.model.attention import laws
from tests.support import (
    ATTENTIONS,
    CASES,
    DISTINCT,
    logits_of,
    mostly_slow,
    relative_error,
    sharpened,
    small_config,
    small_model,
    some_tokens,
)

# Auto takes one of these. Flex needs texts of a block, and seconds to compile: tests/model/test_flex.py.
KERNELS = [Naive(), SDPA(), Online(query_tile=4, key_tile=3), Matmul(query_tile=7), Tiles()]
# What a token is, or what it sees, depends on where it stands.
ANCHORED = ("global_tokens", "random_blocks", "mask_diagonal", "position=learned", "position=sinusoidal")
Cases = Sequence[tuple[str, ...]]
often = pytest.mark.parametrize("case", mostly_slow())  # to compose all of them takes longer than most laws
GQA = ("attention=gqa",)
ABSORBED = ("attention=mla", "attention.execution=absorbed", "attention.qk_norm=latent", "attention.q_lora_rank=24")
ALIBI = ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla")
RANDOM = ("attention=gqa", "attention.window=3", "attention.random_blocks=0.4", "attention.block_size=2")
# These hand a kernel all that cases can: shared keys, wide ones, values that are keys, masks, added columns.
ON_ALL_KERNELS = [(case, kernel) for case in (GQA, ABSORBED, ALIBI) for kernel in (Naive, Online, Matmul, Tiles)]
ON_ONE_KERNEL_EACH = [(GQA, Naive), (ABSORBED, Online), (ALIBI, Matmul), (RANDOM, Tiles)]
assert all(case in CASES for case in (GQA, ABSORBED, ALIBI, RANDOM))


def on_kernels(
    kernels: Sequence[Kernel],
    cases: Cases = CASES,
    *,
    fused: Cases = DISTINCT,
    others: Sequence[tuple[tuple[str, ...], type[Kernel]]] = ON_ONE_KERNEL_EACH,
) -> pytest.MarkDecorator:
    """Some of the cases on the fused kernel, and some on the others; the rest is slow, and says little that
    tests/model/test_kernels.py does not, which holds kernels against each other under every mask."""
    often = [*((case, SDPA) for case in fused), *others]
    return pytest.mark.parametrize(
        ("case", "kernel"),
        [
            pytest.param(
                case,
                kernel,
                marks=() if (case, type(kernel)) in often else pytest.mark.slow,
                id=f"{' '.join(case)} {type(kernel).__name__}",
            )
            for case in cases
            for kernel in kernels
        ],
    )


def oracle_for(case: tuple[str, ...]) -> TransformerLM:
    """The same weights, uncached by whoever calls it, on the naive kernel and with MLA's reference execution."""
    config = small_config(*case)
    attention = config.attention.with_execution("naive") if "attention=mla" in case else config.attention
    return sharpened(initialised(config.model_copy(update={"attention": attention}), 100))


@often
def test_logits_of_a_causal_model_have_no_gradient_from_later_tokens(case):
    laws.check_causality(small_model(*case, tie_embeddings=False))


@on_kernels(KERNELS)
def test_logits_with_kv_cache_equal_uncached(case, kernel):
    laws.check_cached(small_model(*case, kernel=kernel), oracle_for(case))


@on_kernels(KERNELS)
def test_logits_of_a_ragged_batch_equal_each_row_alone(case, kernel):
    laws.check_ragged(small_model(*case, kernel=kernel), oracle_for(case))


@on_kernels(KERNELS)
def test_logits_of_packed_documents_equal_each_document_alone(case, kernel):
    laws.check_packed_documents(small_model(*case, kernel=kernel))


@on_kernels(KERNELS[1:], others=ON_ALL_KERNELS)
def test_kernels_on_one_model_agree_with_gradients(case, kernel):
    tokens = some_tokens(2, 24)
    naive, fused = small_model(*case, kernel=Naive()), small_model(*case, kernel=kernel)
    for model in (naive, fused):
        logits_of(model, tokens).square().mean().backward()
    assert relative_error(logits_of(fused, tokens), logits_of(naive, tokens)) <= 1e-5
    expected = dict(naive.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.grad is not None:
            assert relative_error(parameter.grad, expected[name].grad) <= 1e-4, name
        else:
            assert ".indexer." in name and expected[name].grad is None


RELATIVE = [case for case in CASES if not any(name in part for name in ANCHORED for part in case)]
YARN = ("attention=gqa", "attention.rope_scaling=yarn", "attention.rope_factor=4", "attention.rope_theta=100")


@pytest.mark.parametrize("case", mostly_slow(RELATIVE, often=[*DISTINCT, YARN]))
def test_logits_at_shifted_positions_are_unchanged(case):
    laws.check_relative_positions(small_model(*case))


@often
def test_cache_bytes_per_token_equal_the_formula(case):
    model = small_model(*case)
    caches = model.make_caches(1, 8)
    laws.decode_in_chunks(model, some_tokens(1, 8), [8], caches)
    for i, cache in enumerate(caches):
        attention = model.config.attention.of_layer(i)
        expected = attention.cache_elements
        if "attention.execution=naive" in case:
            expected = 4 * (16 + attention.v_head_dim)
        assert cache.bytes_per_token == 4 * expected


@often
def test_layout_describes_every_parameter_once(case):
    """Rows of the parts in their heads are all of its rows, and fan-in is its other dimension; of the matrices of an
    attention one makes queries, and one its output, as of an MLP."""
    model = small_model(*case, tie_embeddings=False)
    named, table = dict(model.named_parameters()), model.layout()
    assert table.keys() == named.keys()
    for name, layout in table.items():
        rows, *columns = named[name].shape
        assert all(part.rows > 0 for part in layout.parts)
        assert layout.heads * sum(part.rows for part in layout.parts) == rows
        assert [layout.fan_in] == (columns or [None]), name
        assert list(layout.views(named[name])) == [part.name for part in layout.parts]
        assert (layout.kind in (Kind.VECTOR, Kind.BIAS)) == (not columns)
        assert layout.shard_axis is None or layout.shard_axis < named[name].ndim
    for block in model.layers:
        matrices = [layout.role for layout in block.attention.layout().values() if layout.kind is Kind.MATRIX]
        assert matrices.count(Role.RESIDUAL_OUTPUT) == matrices.count(Role.QUERY) == 1
        assert [layout.role for layout in block.mlp.layout().values()].count(Role.RESIDUAL_OUTPUT) >= 1


def test_layout_names_the_rows_the_forward_pass_reads():
    """Zeroing the keys of a head, as the layout names them, leaves that head without scores, and no other."""
    seen = {}
    for attention, part in (("gqa", "k"), ("mla", "k_nope")):
        norm = "false" if part == "k" else "latent"
        model = small_model(f"attention={attention}", f"attention.qk_norm={norm}", "attention.qk_bias=false")
        with torch.no_grad():
            for name, layout in model.layout().items():
                views = layout.views(dict(model.named_parameters())[name])
                for zeroed in (part, "q_rope"):
                    if zeroed in views:
                        views[zeroed][1] = 0
        aux = model(some_tokens(1, 16), collect=frozenset({"max_logit"})).aux
        seen[attention] = [value > 0 for value in aux["layers.0.max_logit"].tolist()]
    assert seen == {"gqa": [True, True, False, False], "mla": [True, False, True, True]}


def test_cache_bytes_per_token_equal_hand_computed_sizes():
    """d_model 64, 4 heads of 16; latent 16 + rope key 12. Elements per token of one layer."""
    expected = {"mha": 2 * 4 * 16, "gqa": 2 * 2 * 16, "mqa": 2 * 16, "mla": 16 + 12 + 1}
    for name, elements in expected.items():
        assert small_model(f"attention={name}").make_caches(1, 4)[0].bytes_per_token == 4 * elements, name
    latent_only = small_model("attention=mla", "attention.qk_norm=latent", "attention.qk_rope_head_dim=4")
    assert latent_only.make_caches(1, 4)[0].bytes_per_token == 4 * (16 + 4)
    for norm, groups in (("head", 1), ("head", 4), ("whole", 2)):  # and one inverse root mean square each
        model = small_model("attention=mla", f"attention.qk_norm={norm}", f"attention.qk_norm_groups={groups}")
        assert model.make_caches(1, 4)[0].bytes_per_token == 4 * (16 + 12 + groups)
        assert model.config.attention.cache_elements == 16 + 12 + groups


def test_window_cache_of_a_long_text_is_bounded_by_the_window():
    """However long the text: 5 rows and slack, beside 2 for the global tokens; not where random blocks lead back."""
    window, tokens = ("attention=mla", "attention.window=5"), some_tokens(1, 60)
    for more, rows in (((), 21), (("attention.global_tokens=2",), 23), (("attention.random_blocks=0.5",), 64)):
        model = small_model(*window, *more)
        caches = model.make_caches(1, 64)
        laws.decode_in_chunks(model, tokens, [30] + [1] * 30, caches)
        assert [cache.columns["latent_and_k_rope"].shape[1] for cache in caches] == [rows + 1, rows + 1]


@on_kernels(KERNELS, [case for case in CASES if "position=alibi" not in case])
def test_encoder_reads_tokens_on_both_sides(case, kernel):
    encoder, twin = (
        sharpened(initialised(small_config(*case, kernel=each, tie_embeddings=False), 100, causal=False))
        for each in (kernel, Naive())
    )
    laws.check_reach(encoder)
    assert relative_error(logits_of(encoder, some_tokens(2, 20)), logits_of(twin, some_tokens(2, 20))) <= 1e-5


def test_encoder_with_caches_is_refused():
    encoder = initialised(small_config("attention=gqa"), 100, causal=False)
    with pytest.raises(ValueError, match="causal=True"):
        encoder.make_caches(1, 8)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_encoder_with_alibi_is_refused(attention):
    with pytest.raises(ValueError, match="position=alibi is for causal models"):
        initialised(small_config(f"attention={attention}", "position=alibi"), 100, causal=False)


def test_latent_cache_holds_no_tensor_per_head():
    for execution in ("auto", "expanded", "absorbed"):
        model = small_model("attention=mla", f"attention.execution={execution}")
        for column in model.make_caches(2, 8)[0].columns.values():
            assert column.shape[2] == 1, execution


# To trace it takes a second. MHA and MQA are GQA by other numbers of key heads.
OF_A_KIND = [(f"attention={name}",) for name in ATTENTIONS if name not in ("mha", "mqa")]


@on_kernels([SDPA(), Online(), Matmul()], fused=OF_A_KIND, others=())
def test_decode_step_compiled_traces_once(case, kernel):
    model = small_model(*case, kernel=kernel, **({} if "attention=stack" in case else {"n_layers": 1}))
    torch._dynamo.reset()
    step = torch.compile(decode_step, backend="eager", fullgraph=True)
    caches = model.make_caches(2, 64)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (3, 17, 40):
            laws.decode_in_chunks(model, some_tokens(2, length), [length], caches)
            positions = torch.full((2, 1), length)
            found = step(model, some_tokens(2, 1), positions, caches, torch.empty(bucket(length + 1), 0))
            caches_again = model.make_caches(2, 64)
            laws.decode_in_chunks(model, some_tokens(2, length), [length], caches_again)
            expected = decode_step(model, some_tokens(2, 1), positions, caches_again, torch.empty(64, 0))
            assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize(
    "changed",
    [
        ("attention.qk_norm=latent", "attention.q_lora_rank=0"),
        ("attention.qk_norm=latent", "attention.q_lora_rank=24"),
        ("attention.qk_norm=latent", "attention.q_lora_rank=24", "model.bias=true"),
        *(("attention.qk_norm=head", f"attention.qk_norm_groups={groups}") for groups in (1, 2)),
        ("attention.qk_norm=whole", "attention.qk_norm_groups=4"),
        ("attention.qk_norm=whole", "attention.q_lora_rank=24", "attention.qk_rope_head_dim=8"),
    ],
    ids=" ".join,
)
def test_mla_executions_give_equal_logits(changed):
    tokens, config = some_tokens(2, 20), small_config("attention=mla", *changed)
    models = {}
    for execution in ("naive", "expanded", "absorbed", "auto"):
        attention = config.attention.with_execution(execution)
        models[execution] = sharpened(initialised(config.model_copy(update={"attention": attention}), 100))
    expected = logits_of(models["naive"], tokens)
    for execution, model in models.items():
        assert relative_error(logits_of(model, tokens), expected) <= 1e-5, execution
        assert relative_error(_decoded(model, tokens), expected) <= 1e-5, execution


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mla_qk_norm_of_heads_equals_its_formula(groups):
    """One layer and all positions at once, against the formula written with loops over heads and groups."""
    model = small_model("attention=mla", "attention.qk_norm=head", f"attention.qk_norm_groups={groups}")
    layer: MLA = model.layers[0].attention
    n, r, v, c, heads = layer.nope_dim, layer.rope_dim, layer.v_dim, layer.rank, layer.n_heads
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9)[None]
    table = layer.rope.table(positions)

    def normed(x: Tensor, weight: Tensor, over: Tensor | None = None) -> Tensor:
        squares = (x if over is None else over.flatten(-2)).square()
        return x * weight / (squares.mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x: Tensor) -> Tensor:
        return layer.rope.rotate(x[:, :, None], table)[:, :, 0]

    with torch.no_grad():
        queries = (x @ layer.q_proj.weight.T + layer.q_proj.bias).view(1, 9, heads, n + r)
        latent, k_rope = (x @ layer.kv_down.weight.T + layer.kv_down.bias).split([c, r], -1)
        latent, k_rope = normed(latent, layer.kv_norm.weight), turned(normed(k_rope, layer.k_rope_norm.weight))
        k_nope, values = (latent @ layer.kv_up.weight.T).view(1, 9, heads, n + v).split([n, v], -1)
        outputs, together = [], heads // groups
        for h in range(heads):
            group = slice(h // together * together, (h // together + 1) * together)
            key = normed(k_nope[:, :, h], layer.k_nope_norm.weight, over=k_nope[:, :, group])
            q_nope = normed(queries[:, :, h, :n], layer.q_nope_norm.weight)
            q_rope = turned(normed(queries[:, :, h, n:], layer.q_rope_norm.weight))
            scores = (q_nope @ key.mT + q_rope @ k_rope.mT) * (n + r) ** -0.5
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
            outputs.append(scores.softmax(-1) @ values[:, :, h])
        expected = torch.cat(outputs, -1) @ layer.o_proj.weight.T
        found, *_ = layer(x, Context(Placement(positions, is_contiguous=True), {layer.rope: table}))
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mla_qk_norm_of_whole_heads_equals_its_formula(groups):
    """One layer and all positions at once: queries and keys of heads are made whole, normed, and only then rotated."""
    model = small_model("attention=mla", "attention.qk_norm=whole", f"attention.qk_norm_groups={groups}")
    layer: MLA = model.layers[0].attention
    n, r, v, c, heads = layer.nope_dim, layer.rope_dim, layer.v_dim, layer.rank, layer.n_heads
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9)[None]
    table = layer.rope.table(positions)

    def turned(head: Tensor) -> Tensor:
        return torch.cat((head[..., :n], layer.rope.rotate(head[..., n:], table)), -1)

    with torch.no_grad():
        q = (x @ layer.q_proj.weight.T + layer.q_proj.bias).view(1, 9, heads, n + r)
        q = turned(q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight)
        latent, k_rope = (x @ layer.kv_down.weight.T + layer.kv_down.bias).split([c, r], -1)
        k_rope = k_rope[:, :, None].expand(1, 9, heads, r)
        latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_norm.weight
        k_nope, values = (latent @ layer.kv_up.weight.T).view(1, 9, heads, n + v).split([n, v], -1)
        grouped = torch.cat((k_nope, k_rope), -1).unflatten(2, (groups, -1))
        k = turned((grouped / (grouped.square().mean((3, 4), keepdim=True) + 1e-6).sqrt()).flatten(2, 3))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (n + r) ** -0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        outputs = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), values)
        expected = outputs.flatten(2) @ layer.o_proj.weight.T
        found, *_ = layer(x, Context(Placement(positions, is_contiguous=True), {layer.rope: table}))
    assert relative_error(found, expected) <= 1e-5


def test_mla_with_prefused_matrices_gives_equal_logits():
    """W_uq W_uk and W_uv W_o multiplied out ahead: an identity, here for one layer and all positions at once."""
    model = small_model("attention=mla", "attention.q_lora_rank=24", "attention.qk_norm=latent")
    layer: MLA = model.layers[0].attention
    n, r, v, c, heads = layer.nope_dim, layer.rope_dim, layer.v_dim, layer.rank, layer.n_heads
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9)[None]
    table = layer.rope.table(positions)
    with torch.no_grad():
        up = torch.cat([layer.q_proj.up.weight, layer.q_proj.up.bias[:, None]], dim=1).view(heads, n + r, 25)
        w_uk, w_uv = layer.kv_up.weight.view(heads, n + v, c).split([n, v], 1)
        fused_q = torch.einsum("hnq,hnc->hcq", up[:, :n], w_uk)
        fused_o = torch.einsum("dhv,hvc->dhc", layer.o_proj.weight.view(64, heads, v), w_uv)
        query = F.pad(layer.q_proj.norm(layer.q_proj.down(x)), (0, 1), value=1.0)  # the bias, a column of the matrix
        latent, k_rope = layer.kv_down(x).split([c, r], -1)
        latent, k_rope = layer.kv_norm(latent), layer.rope.rotate(k_rope[:, :, None], table)[:, :, 0]
        q_rope = layer.rope.rotate(torch.einsum("hrq,btq->bthr", up[:, n:], query), table)
        scores = torch.einsum("hcq,btq,bsc->bhts", fused_q, query, latent)
        scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * (n + r) ** -0.5
        probs = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1)
        found = torch.einsum("bhts,bsc,dhc->btd", probs, latent, fused_o)
        expected, *_ = layer(x, Context(Placement(positions, is_contiguous=True), {layer.rope: table}))
    assert relative_error(found, expected) <= 1e-5


def test_mla_auto_execution_absorbs_up_to_break_even_and_expands_above():
    layer: MLA = small_model("attention=mla", "attention.kv_lora_rank=48").layers[0].attention
    n, v, c = layer.nope_dim, layer.v_dim, layer.rank
    assert layer.break_even == c * (n + v) / (2 * c - n - v)
    deepseek_v3 = 512 * 256 / (2 * 512 - 256)
    assert round(deepseek_v3) == 171
    layer._absorbed, layer._expanded = lambda *_: "absorbed", lambda *_: "expanded"
    for queries, expected in ((1, "absorbed"), (int(layer.break_even) + 1, "expanded")):
        given = Projected(None, *[torch.zeros(1, queries, 1, 1)] * 3)
        assert layer._cheaper(given, None, cache=object()) == expected
        assert layer._cheaper(given, None, cache=None) == "expanded"


@often
def test_logits_in_bfloat16_are_near_float32(case):
    case = [part for part in case if "top_k" not in part]  # rounding chooses other keys
    tokens = some_tokens(2, 20)
    exact = small_model(*case)
    low = small_model(*case, kernel=SDPA())
    for parameter in low.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        expected = logits_of(exact, tokens)
        assert relative_error(logits_of(low, tokens), expected) <= 0.07
        assert relative_error(_decoded(low, tokens), expected) <= 0.07


@pytest.mark.parametrize("case", mostly_slow(often=[*DISTINCT, ("attention=mha", "position=none")]))
def test_logits_after_swapped_tokens_change_unless_position_is_none(case):
    """Two tokens before the last one change places: the last one's logits notice, but with no positions at all, where a
    single layer cannot (further ones can, by what the causal mask showed to each)."""
    model, tokens = small_model(*case, n_layers=1), some_tokens(1, 3)
    moved = relative_error(logits_of(model, tokens[:, [1, 0, 2]])[:, -1], logits_of(model, tokens)[:, -1])
    assert (moved <= 1e-6) == ("position=none" in case)


# Negative tests: what the laws are for is caught by them.


class ScaleFromKeyDim(Naive):
    """Scores scaled by the width of the key it is handed: right for MHA, wrong for absorbed MLA."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        return super().__call__(q, k, v, mask, how._replace(scale=k.shape[-1] ** -0.5))


class TopLeftCausal(SDPA):
    """Takes the causal fast path whatever the positions: one query then sees the first key only."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        return super().__call__(q, k, v, Mask(mask.q_pos, mask.k_pos, contiguous=True, pattern=CAUSAL), how)


def test_law_of_executions_catches_a_scale_from_the_key_width():
    case = ("attention=mla", "attention.execution=absorbed")
    with pytest.raises(AssertionError):
        laws.check_cached(small_model(*case, kernel=ScaleFromKeyDim()), oracle_for(case))


def test_law_of_caches_catches_a_top_left_causal_mask():
    with pytest.raises(AssertionError):
        laws.check_cached(small_model("attention=gqa", kernel=TopLeftCausal()), oracle_for(("attention=gqa",)))


def test_law_of_kernels_catches_a_misprinted_online_softmax(monkeypatch):
    """A rescaling of the other sign, and none."""
    model, expected = small_model(*GQA, kernel=Online(query_tile=8, key_tile=4)), oracle_for(GQA)
    laws.check_cached(model, expected)
    for misprint in (lambda m, m_new: (m_new - m).exp().clamp(max=1e30), lambda m, m_new: torch.ones_like(m)):
        monkeypatch.setattr(online, "rescale", misprint)
        with pytest.raises(AssertionError):
            laws.check_cached(model, expected)


def test_law_of_caches_catches_a_window_that_forgets_what_rewinding_needs():
    model = small_model("attention=gqa", "attention.window=6")
    tokens = some_tokens(2, 23)
    expected = logits_of(oracle_for(("attention=gqa", "attention.window=6")), tokens)
    assert relative_error(laws.decode_with_rewinding(model, tokens), expected) <= 1e-5
    made = model.make_caches

    def without_slack(batch_size: int, capacity: int) -> list[Cache]:
        caches = made(batch_size, capacity)
        for cache in caches:
            cache.ring = 6
        return caches

    model.make_caches = without_slack
    assert relative_error(laws.decode_with_rewinding(model, tokens), expected) > 1e-3


def test_law_of_caches_catches_positions_restarted_at_zero():
    class Forgetful(TransformerLM):
        def forward(self, tokens, at=None, **rest):
            restarted = torch.arange(tokens.shape[1])[None].expand_as(tokens)
            return super().forward(tokens, at and dataclasses.replace(at, positions=restarted), **rest)

    model = small_model("attention=mla")
    model.__class__ = Forgetful
    with pytest.raises(AssertionError):
        laws.check_cached(model, oracle_for(("attention=mla",)))


@pytest.mark.parametrize("forgotten", ["documents", "positions"])
def test_law_of_packed_documents_catches_a_missing_mask_or_reset(monkeypatch, forgotten):
    model, real = small_model("attention=gqa"), TransformerLM.forward

    def forgetful(self, tokens, at=None, **rest):
        if at is not None and forgotten == "documents":
            at = Placement.packed(at.positions, torch.zeros_like(at.docs))
        if at is not None and forgotten == "positions":
            at = Placement.packed(torch.zeros_like(at.positions) + 5, at.docs)  # each token sees all of its document
        return real(self, tokens, at, **rest)

    monkeypatch.setattr(TransformerLM, "forward", forgetful)
    with pytest.raises(AssertionError):
        laws.check_packed_documents(model)


def test_law_of_causality_catches_a_look_ahead():
    class SeesAll(Naive):
        def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
            everywhere = torch.full_like(mask.q_pos, 10**6)
            return super().__call__(q, k, v, Mask(everywhere, mask.k_pos, contiguous=False, pattern=CAUSAL), how)

    with pytest.raises(AssertionError):
        laws.check_causality(small_model("attention=mha", tie_embeddings=False, kernel=SeesAll()))


def _decoded(model: TransformerLM, tokens: Tensor) -> Tensor:
    return laws.decode_in_chunks(
        model, tokens, [6] + [1] * (tokens.shape[1] - 6), model.make_caches(2, tokens.shape[1])
    )
