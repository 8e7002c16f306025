"""Rotations in part and stretched, linear biases, and vectors added to the embedding, each against its definition."""

import importlib
import math

import pytest
import torch

from model import cost
from model.context import Context
from model.initialise import initialised
from model.kernels.base import How
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.mask import CAUSAL, Mask
from model.placement import Placement
from model.positions import alibi, slopes
from model.rope import Rope
from tests.support import composed_run, logits_of, relative_error, small_config, small_model, some_tokens
from training.run.config import Run, dump
from training.run.migrate import UNSTATED, migrate


def angles(rope: Rope, position: int) -> list[float]:
    """Of each pair, read off the rotation of (1, 0)."""
    first = torch.arange(rope.dim)[None, None, None] < rope.dim // 2  # of every pair; the layout is half
    x, y = rope.rotate(first.float(), rope.table(torch.tensor([[position]]))).flatten().chunk(2)
    return torch.atan2(y, x).tolist()


def test_rope_leaves_dimensions_beyond_rope_dim_unchanged():
    x = torch.randn(2, 5, 3, 10, generator=torch.Generator().manual_seed(0))
    rope, positions = Rope(6, 100.0, "half"), torch.arange(5)[None]
    rotated = rope.rotate(x, rope.table(positions))
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert torch.equal(rotated[..., :6], rope.rotate(x[..., :6], rope.table(positions)))
    assert not torch.allclose(rotated[:, 1:, :, :6], x[:, 1:, :, :6], atol=0.1)


def test_rope_linear_scaling_divides_positions():
    assert angles(Rope(8, 100.0, "half", "linear", 4.0), 12) == pytest.approx(angles(Rope(8, 100.0, "half"), 3))


def test_rope_ntk_scaling_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, scaled = (angles(Rope(8, 100.0, "half", *how), 2) for how in ((), ("ntk", 4.0)))
    assert scaled[0] == pytest.approx(plain[0])
    assert scaled[-1] == pytest.approx(plain[-1] / 4)
    theta = 100.0 * 4 ** (8 / 6)
    assert scaled == pytest.approx([2 * theta ** (-2 * i / 8) for i in range(4)])


def test_rope_yarn_keeps_fast_pairs_slows_slow_ones_and_ramps_between():
    """64 dimensions, theta 10,000, context 4,096: pair 10.5 turns 32 times, pair 22.5 once; rounded outwards."""
    scaled, plain = Rope(64, 10000.0, "half", "yarn", 8.0, 4096), Rope(64, 10000.0, "half")
    ratio = [after / before for after, before in zip(angles(scaled, 1), angles(plain, 1), strict=True)]
    first, last = (32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(10000.0) for turns in (32, 1))
    assert (math.floor(first), math.ceil(last)) == (10, 23)
    expected = [1 - (1 - 1 / 8) * min(max((i - 10) / 13, 0), 1) for i in range(32)]
    assert ratio == pytest.approx(expected, rel=1e-4)


def test_rope_yarn_multiplies_the_softmax_scale_in_every_execution():
    mscale = 0.1 * math.log(4) + 1
    yarn = ("attention.rope_scaling=yarn", "attention.rope_factor=4")
    assert small_model("attention=gqa", *yarn).layers[0].attention.core.scale == pytest.approx(16**-0.5 * mscale**2)
    for execution in ("naive", "expanded", "absorbed"):
        mla = small_model("attention=mla", *yarn, f"attention.execution={execution}").layers[0].attention
        assert mla.core.scale == pytest.approx(16**-0.5 * mscale**2)
    assert small_config("attention=gqa", *yarn).attention.rope_original_context == 64 / 4


SLOPES = {  # powers of 2 of some heads' slopes
    ("published", 1): [-8],
    ("published", 3): [-4, -8, -2],
    ("published", 6): [-2, -4, -6, -8, -1, -3],
    ("published", 8): [-1, -2, -3, -4, -5, -6, -7, -8],
    ("published", 12): [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5],
    ("geometric", 8): [-1, -2, -3, -4, -5, -6, -7, -8],
    ("geometric", 6): [-8 / 6, -16 / 6, -4, -32 / 6, -40 / 6, -8],
}


def test_alibi_slopes_equal_those_of_bloom_and_mpt():
    bloom, mpt = (importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in ("bloom", "mpt"))
    for heads in range(1, 25):
        found = slopes(heads)
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # of two tokens, the second
        assert torch.allclose(found, theirs, rtol=1e-5)
        assert torch.allclose(found, -mpt.build_mpt_alibi_tensor(heads, 2)[:, 0, 0], rtol=1e-6)
        assert torch.equal(found, slopes(heads, "geometric")) == (heads in (1, 2, 4, 8, 16))


@pytest.mark.parametrize(("rule", "heads"), SLOPES)
@pytest.mark.parametrize("start", [0, 5000])
def test_alibi_on_every_kernel_equals_the_distance_bias(rule, heads, start):
    """scores - slope (q_pos - k_pos), written down in float64; three of the keys are unfilled rows of a cache."""
    draw, scale = torch.Generator().manual_seed(0), 0.3
    q, k, v = (torch.randn(2, length, n, 8, generator=draw) for length, n in ((4, heads), (300, 1), (300, 1)))
    k_pos = torch.arange(start, start + 300)[None].expand(2, -1).clone()
    k_pos[0, :3] = -1
    q_pos = torch.tensor([[start + 299, start + 260, start + 7, -1], [start + 3, start + 280, start + 9, start + 50]])
    mask = Mask(q_pos, k_pos, contiguous=False, pattern=CAUSAL)
    biased = alibi(q, k, mask, scale, rule)
    m = torch.tensor([2**power for power in SLOPES[rule, heads]], dtype=torch.float64)
    scores = scale * torch.einsum("bthd,bsgd->bhts", q.double(), k.double())
    scores -= m[:, None, None] * (q_pos[:, None, :, None] - k_pos[:, None, None, :])
    scores = scores.masked_fill(~mask.visible()[:, None], -math.inf)
    expected = torch.einsum("bhts,bsgd->bthd", scores.softmax(-1), v.double())
    real = q_pos >= 0
    for kernel in (Naive(), SDPA()):
        found = kernel(biased.q, biased.k, v, mask, How(scale)).out
        assert relative_error(found[real], expected[real]) <= 1e-5, kernel
        assert found.isfinite().all()


def test_alibi_distances_in_bfloat16_are_exact():
    """Of 40,000 keys, each as far as it is: read back from the columns, with slopes that bfloat16 holds."""
    distance = torch.arange(40000)
    mask = Mask(torch.tensor([[39999]]), 39999 - distance[None], contiguous=False, pattern=CAUSAL)
    q, k = (torch.zeros(1, n, 8, 64, dtype=torch.bfloat16) for n in (1, 40000))
    q, k, _ = alibi(q, k, mask, 0.125)
    scores = 0.125 * torch.einsum("thd,shd->hs", q[0].double(), k[0].double())
    expected = 2.0 ** -torch.arange(1, 9, dtype=torch.float64)
    assert torch.equal(scores, -expected[:, None] * distance)


@pytest.mark.parametrize("attention", ["gqa", "mla", "stack"])
def test_alibi_of_an_older_run_keeps_geometric_slopes(attention):
    """Its settings state no rule for the slopes; those of a run without ALiBi get the default."""

    def older(tree):
        return {k: older(v) for k, v in tree.items() if k != "alibi_slopes"} if isinstance(tree, dict) else tree

    for position, rule in (("alibi", "geometric"), ("rope", "published")):
        stored = older(dump(composed_run(f"attention={attention}", f"position={position}")))
        found = Run.from_tree(migrate(stored, UNSTATED)).model.attention
        assert {found.of_layer(i).alibi_slopes for i in range(2)} == {rule}
    model = small_model("attention=mha", "position=alibi", "attention.alibi_slopes=geometric", "model.n_heads=2")
    assert model.layers[0].attention.core.add_position_bias.keywords == {"rule": "geometric"}


def test_mla_without_rope_has_no_rope_key():
    for position in ("alibi", "none"):
        model = small_model("attention=mla", f"position={position}")
        assert model.config.attention.qk_rope_head_dim == 0
        assert model.config.attention.qk_nope_head_dim == 16
        assert model.make_caches(1, 4)[0].bytes_per_token == 4 * (16 + 1)  # the latent, and a root mean square
        assert model.layers[0].attention.kv_down.weight.shape == (16, 64)
        assert not model.ropes


def test_mla_rope_key_comes_from_hidden_state_or_normed_latent():
    """What only the hidden state holds, beyond the latent, reaches the cached key in one case and not in the other."""
    for source in ("hidden", "latent"):
        layer = small_model("attention=mla", f"attention.k_rope_from={source}").layers[0].attention
        x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
        _, _, rows = torch.linalg.svd(layer.kv_down.weight[:16])
        unseen = x + 5 * rows[-1]  # orthogonal to the 16 directions the latent is read from
        positions = torch.arange(3)[None]
        found = []
        for inputs in (x, unseen):
            cache = layer.make_cache(1, 3)
            rotary = {layer.rope: layer.rope.table(positions)}
            layer(inputs, Context(Placement(positions, is_contiguous=True), rotary), cache)
            found.append(cache.columns["latent_and_k_rope"][0, 1:, 0])
        assert torch.allclose(found[0][:, :16], found[1][:, :16], atol=1e-4)
        assert torch.allclose(found[0][:, 16:], found[1][:, 16:], atol=1e-4) == (source == "latent")


def test_sinusoidal_positions_equal_the_formula():
    model = small_model("attention=mha", "position=sinusoidal")
    found = model.position_embedding(torch.tensor([[0, 1, 1000, -1]]))
    assert found.dtype == torch.float32
    for t, position in enumerate([0, 1, 1000, 0]):
        for i in range(32):
            angle = position / 10000 ** (2 * i / 64)
            expected = [math.sin(angle) / 8, math.cos(angle) / 8]
            assert found[0, t, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert logits_of(small_model("attention=mha", "position=sinusoidal"), some_tokens(1, 100)).isfinite().all()


def test_sinusoidal_positions_of_odd_width_lack_the_last_cosine():
    model = small_model("position=sinusoidal", "model.d_model=21", "model.n_heads=3", "attention=mha")
    assert logits_of(model, some_tokens(1, 5)).shape == (1, 5, 100)


def test_learned_positions_are_initialised_like_the_embedding():
    config = small_config("attention=mha", "position=learned")
    model = initialised(config, 100)
    matrix = model.position_embedding.weight
    assert matrix.shape == (64, 64)
    assert matrix.std().item() == pytest.approx(model.embedding.weight[:100].std().item(), rel=0.1)
    positions = torch.tensor([[5, 0, -1]])
    assert torch.equal(model.position_embedding(positions)[0], matrix[[5, 0, 0]])
    same, other = initialised(config, 100), initialised(config, 100, seed=1)
    assert torch.equal(same.position_embedding.weight, matrix)
    assert not torch.equal(other.position_embedding.weight, matrix)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "rope"),
        (["position=none"], "the causal mask alone"),
        (["position=learned", "attention.position=alibi"], "learned and alibi"),
        (["model=classic_gpt", "model.n_layers=2"], "learned"),
        (["attention=stack", "attention.parts.local.position=alibi"], "alibi and rope"),
    ],
)
def test_model_config_positions_names_the_encodings(overrides, expected):
    assert composed_run(*overrides).model.positions == expected


def test_learned_positions_beyond_the_context_are_refused():
    model = small_model("attention=gqa", "position=learned")
    assert logits_of(model, some_tokens(1, 64)).isfinite().all()
    with pytest.raises(ValueError, match="65 tokens are more than the context_length=64"):
        model(some_tokens(1, 65))
    caches = model.make_caches(1, 128)
    with pytest.raises(IndexError):
        model(some_tokens(1, 1), Placement.decode(torch.tensor([[64]]), caches))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_flops_leave_out_learned_position_lookups(tied):
    flops = [
        cost.flops(small_config("attention=mha", f"position={position}", f"model.tie_embeddings={tied}"), 100).per_token
        for position in ("none", "sinusoidal", "learned")
    ]
    assert flops[0] == flops[1] == flops[2]
