"""The lightning indexer: what it chooses, what it learns from, and that attention to what it chooses obeys the laws."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.attention import indexer
from model.attention.chosen_core import INDEX_KEY, ChosenCore
from model.attention.indexer import Index, indexer_loss, largest
from model.context import Context
from model.kernels.auto import Auto
from model.kernels.matmul import Matmul
from model.kernels.online import Online
from model.kernels.sdpa import SDPA
from model.mask import CAUSAL, Mask
from model.placement import Placement
from model.score import token_losses
from tests.model.attention.laws import check_cached, check_packed_documents, check_ragged, check_relative_positions
from tests.support import batches, composed_run, distinct_tokens, logits_of, relative_error, small_model, some_tokens
from training.losses import CROSS_ENTROPY, mean_loss

DSA = ("attention=dsa", "attention.indexer.top_k=4")
CHOSEN = [
    DSA,
    ("attention=dsa", "attention.indexer.top_k=5", "attention.qk_norm=latent", "attention.position=none"),
    ("attention=dsa", "attention.indexer.top_k=3", "attention.execution=absorbed", "attention.indexer.n_heads=1"),
    ("attention=dsa", "attention.indexer.top_k=4", "attention.execution=naive", "attention.position=alibi"),
    ("attention=gqa", "attention.indexer.top_k=4", "attention.indexer.head_dim=6"),
    ("attention=mqa", "attention.indexer.top_k=1"),
]


@pytest.mark.parametrize("case", CHOSEN, ids=" ".join)
def test_logits_with_kv_cache_equal_uncached(case):
    check_cached(small_model(*case, kernel=Auto()), small_model(*case))


@pytest.mark.parametrize("case", CHOSEN, ids=" ".join)
def test_logits_of_a_ragged_batch_equal_each_row_alone(case):
    check_ragged(small_model(*case, kernel=Auto()), small_model(*case))


@pytest.mark.parametrize("case", CHOSEN[:1] + CHOSEN[4:5], ids=" ".join)
def test_logits_of_packed_documents_equal_each_document_alone(case):
    check_packed_documents(small_model(*case, kernel=Auto()))


def test_logits_at_shifted_positions_are_unchanged():
    check_relative_positions(small_model(*DSA))


def test_no_token_reads_a_later_one():
    model, tokens = small_model(*DSA), some_tokens(1, 14)
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 100
    assert torch.equal(logits_of(model, tokens)[:, :9], logits_of(model, changed)[:, :9])


@pytest.mark.parametrize("base", [("attention=mla", "attention.q_lora_rank=32"), ("attention=gqa",)], ids=" ".join)
def test_top_k_of_all_tokens_is_dense_attention(base):
    dense, chosen = small_model(*base), small_model(*base, "attention.indexer.top_k=23")
    weights = chosen.state_dict()
    dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
    tokens = some_tokens(2, 23)
    assert relative_error(logits_of(chosen, tokens), logits_of(dense, tokens)) <= 1e-6
    longer = some_tokens(2, 30)
    assert relative_error(logits_of(chosen, longer), logits_of(dense, longer)) > 1e-3


@pytest.mark.parametrize("kernel", [SDPA(), Matmul(), Online(query_tile=4, key_tile=8)], ids=lambda k: type(k).__name__)
def test_kernels_hide_what_is_not_chosen(kernel):
    model, naive = small_model(*DSA, kernel=kernel), small_model(*DSA)
    (batch,) = batches(4, 4)
    found, expected = (torch.autograd.grad(mean_loss(m, batch)[0], list(m.parameters())) for m in (model, naive))
    for gradient, twin in zip(found, expected, strict=True):
        assert relative_error(gradient, twin) <= 1e-4


def test_largest_takes_the_first_of_equal_scores():
    scores = torch.tensor([[1.0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0], [3, 3, 1, 3, 3, 3], [-math.inf] * 5 + [1]])
    assert largest(scores, 3).int().tolist() == [
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert largest(scores, 6).all() and largest(scores, 9).all()


def test_largest_takes_as_many_where_scores_are_no_numbers():
    scores = torch.tensor([[math.nan, 1, math.nan, 2], [math.nan] * 4, [math.inf, math.nan, -math.inf, math.inf]])
    assert largest(scores, 2).int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]]


@torch.no_grad()
@pytest.mark.parametrize("broken", ["embedding.weight", "layers.0.attention.kv_up.weight"])
def test_model_whose_weights_are_no_numbers_decodes_to_what_is_none(broken):
    model = small_model(*DSA, kernel=Auto())
    caches = model.make_caches(1, 31)
    logits_of(model, some_tokens(1, 30), Placement.prefill(torch.tensor([30]), caches))
    model.get_parameter(broken).fill_(math.nan)
    assert logits_of(model, torch.tensor([[1]]), Placement.decode(torch.tensor([[30]]), caches)).isnan().any()


def made_index(ties: bool = False) -> tuple[Index, Tensor]:
    """Of two heads, for two texts of nine tokens, three keys each; and the keys. ties: of whole numbers."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        drawn = torch.randn(shape, generator=draw)
        return (drawn.round() if ties else drawn).requires_grad_()

    return Index(normal(2, 9, 2, 4), normal(2, 9, 4), normal(2, 9, 2), 3, False), normal(2, 9, 4)


def mask_of(length: int, docs: Tensor | None = None, padded: int = 0) -> Mask:
    positions = torch.arange(length)[None].expand(2, -1).clone()
    positions[1, :padded] = -1
    return Mask(positions, positions, padded == 0 and docs is None, CAUSAL, docs, docs)


DOCS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2, 2]])
MASKS = {"causal": mask_of(9), "documents": mask_of(9, DOCS), "padding": mask_of(9, padded=3)}


def score_by_hand(index: Index, k: Tensor, b: int, t: int, s: int) -> Tensor:
    heads = range(index.q.shape[2])
    return sum(index.weights[b, t, j] * torch.relu(torch.dot(index.q[b, t, j], k[b, s])) for j in heads)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_chosen_keys_are_the_visible_ones_of_the_largest_scores_whatever_the_tile(name, ties):
    mask, (index, k) = MASKS[name], made_index(ties=ties)
    visible = mask.visible()
    for tile in (1, 4, 9):
        for start in range(0, 9, tile):
            rows = slice(start, min(9, start + tile))
            found = mask.among(torch.cat([index.chosen(k, mask, slice(r, r + 1)) for r in range(9)], 1)).visible()
            real = (mask.q_pos[:, rows] >= 0)[..., None]
            assert torch.equal(index.chosen(k, mask, rows) & visible[:, rows] & real, found[:, rows] & real)
            for b, t in ((b, t) for b in range(2) for t in range(9)[rows] if mask.q_pos[b, t] >= 0):
                seen = [s for s in range(9) if visible[b, t, s]]
                best = sorted(seen, key=lambda s: (-score_by_hand(index, k, b, t, s).item(), s))[:3]
                assert found[b, t].nonzero().flatten().tolist() == sorted(best)
            indices = index.chosen_rows(k, mask, rows)
            assert torch.equal(torch.zeros_like(found[:, rows]).scatter(2, indices, True), index.chosen(k, mask, rows))


def loss_by_hand(index: Index, k_index: Tensor, q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """KL(p ‖ softmax I), the mean over queries that are tokens."""
    visible, found = mask.visible(), []
    for b, t in ((b, t) for b in range(q.shape[0]) for t in range(q.shape[1]) if mask.q_pos[b, t] >= 0):
        seen = [s for s in range(k.shape[1]) if visible[b, t, s]]
        scores = [[scale * torch.dot(q[b, t, h], k[b, s, h // 2]) for s in seen] for h in range(q.shape[2])]
        p = sum(torch.stack(of_head).softmax(0) for of_head in scores)
        p = (p / p.sum()).detach()
        share = torch.stack([score_by_hand(index, k_index, b, t, s) for s in seen]).softmax(0)
        found.append((p * (p.log() - share.log())).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("tile_numbers", [2**22, 100])
@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_indexer_loss_equals_its_definition_with_gradients(monkeypatch, name, chooses, tile_numbers):
    monkeypatch.setattr("model.attention.indexer.TILE_NUMBERS", tile_numbers)
    mask, (index, k_index) = MASKS[name], made_index()
    if chooses:
        mask = mask.among(index.chosen(k_index, mask, slice(0, 9)))
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 9, heads, 8, generator=draw).requires_grad_() for heads in (4, 2))
    found, expected = (f(index, k_index, q, k, mask, 0.4) for f in (indexer_loss, loss_by_hand))
    assert relative_error(found, expected) <= 1e-5 and found > 0.01
    wanted = [index.q, index.weights, k_index]
    for gradient, twin in zip(*(torch.autograd.grad(loss, wanted) for loss in (found, expected)), strict=True):
        assert relative_error(gradient, twin) <= 1e-4
    assert torch.autograd.grad(indexer_loss(index, k_index, q, k, mask, 0.4), [q, k], allow_unused=True) == (None, None)


def parameters_of(model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of indexers, and the others."""
    named = dict(model.named_parameters())
    own = {name: parameter for name, parameter in named.items() if ".indexer." in name}
    return own, {name: parameter for name, parameter in named.items() if name not in own}


@pytest.mark.parametrize("case", [DSA, ("attention=gqa", "attention.indexer.top_k=4")], ids=" ".join)
def test_cross_entropy_moves_all_but_the_indexer_and_its_loss_the_indexer_alone(case):
    model, (batch,) = small_model(*case, kernel=Auto()), batches(4, 4)
    own, others = parameters_of(model)
    objective, aux = mean_loss(model, batch)
    losses = sum(aux[name] for name in model.auxiliary_losses)
    of_losses = torch.autograd.grad(losses, [*own.values(), *others.values()], allow_unused=True, retain_graph=True)
    assert all(g is not None and g.abs().max() > 0 for g in of_losses[: len(own)])
    assert all(g is None for g in of_losses[len(own) :])
    plain = objective - losses
    of_plain = torch.autograd.grad(plain, [*own.values(), *others.values()], allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in of_plain[: len(own)])
    assert all(g.abs().max() > 0 for g in of_plain[len(own) :])


def test_gradient_of_the_indexer_is_that_of_finite_differences():
    model, (batch,) = small_model(*DSA, "attention.indexer.stage=warmup"), batches(4, 4)
    model.freeze_for_warmup()
    own, _ = parameters_of(model)
    draw, step = torch.Generator().manual_seed(3), 3e-4  # beyond, ReLU has other heads on

    def loss() -> float:
        aux = mean_loss(model, batch)[1]
        return sum(aux[name].item() for name in model.auxiliary_losses)

    gradients = torch.autograd.grad(mean_loss(model, batch)[0], list(own.values()))
    for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
        direction, start, ends = torch.randn(parameter.shape, generator=draw), parameter.detach().clone(), []
        for moved in (step, -step):
            parameter.data = start + moved * direction
            ends.append(loss())
        parameter.data = start
        slope = (gradient * direction).sum().item()
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=2e-3), name


def test_warmup_attends_to_all_and_trains_the_indexer_alone():
    warm = small_model(*DSA, "attention.indexer.stage=warmup")
    dense = small_model("attention=dsa", "attention.indexer.top_k=64")
    dense.load_state_dict(warm.state_dict())
    tokens = some_tokens(2, 23)
    assert torch.equal(logits_of(warm, tokens), logits_of(dense, tokens))
    warm.freeze_for_warmup()
    own, others = parameters_of(warm)
    assert all(p.requires_grad for p in own.values()) and not any(p.requires_grad for p in others.values())
    plain = small_model(*DSA)
    plain.freeze_for_warmup()
    assert all(p.requires_grad for p in plain.parameters())
    check_cached(warm, warm)


def test_score_of_a_text_does_not_depend_on_the_loss_of_the_indexer():
    (batch,) = batches(4, 4)
    model, other = small_model(*DSA), small_model(*DSA, "attention.indexer.weight=0")
    assert torch.equal(token_losses(model, batch), token_losses(other, batch))
    assert mean_loss(other, batch)[1][CROSS_ENTROPY] == mean_loss(other, batch)[0]


@pytest.mark.parametrize("case", CHOSEN, ids=" ".join)
def test_gathered_keys_give_the_output_of_masked_ones(monkeypatch, case):
    model, tokens, calls = small_model(*case, kernel=Auto()), distinct_tokens(2, 40), []
    gathered = ChosenCore._gathered
    monkeypatch.setattr(ChosenCore, "_gathered", lambda *given: calls.append(1) or gathered(*given))
    monkeypatch.setattr("model.attention.indexer.TILE_NUMBERS", 500)
    monkeypatch.setattr("model.attention.indexer.MANY_QUERIES", 4)
    with torch.no_grad():
        found = logits_of(model, tokens, Placement.prefill(torch.tensor([40, 40]), model.make_caches(2, 40)))
        assert len(calls) == 2  # layers
        assert relative_error(found, logits_of(model, tokens)) <= 1e-5
    assert len(calls) == 2  # without a cache all are read


def test_no_more_products_are_in_memory_than_a_tile_has(monkeypatch):
    """In training, where keys are masked, and in a prefill, where they are gathered: of few numbers each."""
    made, scores = [], indexer._scores

    def noted(q: Tensor, weights: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        made.append(q[..., 0].numel() * k.shape[1])
        return scores(q, weights, k, visible)

    monkeypatch.setattr(indexer, "_scores", noted)
    monkeypatch.setattr(indexer, "TILE_NUMBERS", 3000)
    model, tokens = small_model(*DSA, "attention.indexer.head_dim=2", kernel=Auto()), some_tokens(1, 64)
    mean_loss(model, batches(1, 1)[0])
    with torch.no_grad():
        logits_of(model, tokens, Placement.prefill(torch.tensor([64]), model.make_caches(1, 64)))
    assert len(made) > 8 and max(made) <= 3000


def test_decoding_reads_the_chosen_rows_alone():
    """What is not chosen may be anything."""
    model, tokens = small_model(*DSA, "model.n_layers=1", kernel=Auto()), some_tokens(1, 30)
    caches, last = model.make_caches(1, 31), torch.tensor([[30]])
    with torch.no_grad():
        logits_of(model, tokens, Placement.prefill(torch.tensor([30]), caches))
        at = Placement.decode(last, caches)
        expected = logits_of(model, tokens[:, :1], at)
        mask = Mask(last, torch.arange(31)[None], False, CAUSAL)
        attention = model.layers[0].attention
        x = model.layers[0].attention_norm(model.embedding(tokens[:, :1]))
        rotary = {rope: rope.table(last) for rope in model.ropes}
        ctx = Context(at, rotary)
        index = attention.index(x, attention.project(x, ctx).q_latent, ctx)
        rows = index.chosen_rows(caches[0].columns[INDEX_KEY][:, 1:], mask, slice(0, 1))[0, 0]
        spoilt = [row for row in range(30) if row not in rows.tolist()]
        for name, column in caches[0].columns.items():
            if name != INDEX_KEY:
                column[:, [1 + row for row in spoilt]] = math.nan
        assert torch.equal(logits_of(model, tokens[:, :1], at), expected)


def test_cache_holds_the_key_of_the_indexer():
    model = small_model(*DSA, "attention.indexer.head_dim=6")
    without = small_model("attention=mla", "attention.q_lora_rank=32")
    found, less = (m.make_caches(1, 8)[0].bytes_per_token for m in (model, without))
    assert found == less + 6 * 4 == model.config.attention.cache_elements * 4


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (("attention=dsa", "attention.q_lora_rank=0"), "indexer.top_k=64: the indexer reads the latent of the queries"),
        (("attention=dsa", "attention.indexer.top_k=0"), "attention.indexer.top_k=0: give at least 1"),
        (("attention=dsa", "attention.window=8"), "indexer.top_k=64 chooses among all earlier tokens, and window=8"),
        (("attention=mla", "attention.indexer.n_heads=2"), "indexer.n_heads=2 is of an indexer: set attention.indexer"),
        (("attention=dsa", "attention.indexer.stage=cold"), "attention.indexer.stage=cold: choose warmup or sparse"),
        (
            ("attention=dsa", "attention.indexer.stage=warmup", "attention.indexer.weight=0"),
            "indexer.weight=0 leaves indexer.stage=warmup nothing to learn: give a weight above 0",
        ),
        (
            ("attention=mla", "attention.indexer.top_k=8"),
            "q_lora_rank=0 has none: set attention.q_lora_rank to null, which is 64 here, or to another rank",
        ),
        (
            ("attention=dsa", "attention.indexer.head_dim=3", "attention.rope_scaling=ntk", "attention.rope_factor=2"),
            "indexer.head_dim=3 rotates one pair, which rope_scaling=ntk leaves as it is: choose 4 or more, or linear",
        ),
        (("attention=dsa", "kernel=flex"), "kernel=flex cannot attend to what an indexer chooses: choose kernel=auto"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_indexer_that_cannot_choose_is_refused_in_one_line(typed, line):
    with pytest.raises(UserError) as refusal:
        composed_run(*typed)
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_default_query_rank_of_dsa_is_half_the_width():
    found = composed_run("attention=dsa", "model.d_model=96").model.attention
    assert found.q_lora_rank == 48 and found.indexer.head_dim == 96 // composed_run().model.n_heads
