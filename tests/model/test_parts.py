"""Rotary tables, norms, the cache, and the model's weights."""

import cmath

import pytest
import torch

from model.initialise import initialised
from model.kernels.auto import Auto
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.norm import GroupedRMSNorm, LayerNorm, RMSNorm
from model.placement import Placement
from model.rope import Rope
from model.transformer import TransformerLM, softcapped
from tests.support import ATTENTIONS, composed_run, logits_of, relative_error, small_config, small_model, some_tokens


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_rotates_each_pair_by_its_angle(layout):
    """A pair is a complex number; its rotation is a multiplication by e^(i · position · theta^(-2j/dim))."""
    rope = Rope(8, 10000.0, layout)
    x = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 5, 1000]])
    rotated = rope.rotate(x, rope.table(positions))
    for t, position in enumerate(positions[0].tolist()):
        for j in range(4):
            a, b = (j, j + 4) if layout == "half" else (2 * j, 2 * j + 1)
            turned = complex(x[0, t, 0, a], x[0, t, 0, b]) * cmath.exp(1j * position * 10000.0 ** (-2 * j / 8))
            assert abs(complex(rotated[0, t, 0, a], rotated[0, t, 0, b]) - turned) <= 1e-5 + 1e-7 * position


def test_rope_table_of_any_positions_is_float32():
    rope = Rope(4, 10000.0, "half")
    table = rope.table(torch.tensor([[257]]))
    assert table[0].dtype == torch.float32
    assert rope.rotate(torch.ones(1, 1, 1, 4, dtype=torch.bfloat16), table).dtype == torch.bfloat16


def test_rope_gradient_is_rotated_back():
    """A rotation keeps lengths and angles, so what comes back for the output is the input."""
    for layout in ("half", "interleaved"):
        rope, x = Rope(6, 100.0, layout), torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        rotated = rope.rotate(x, rope.table(torch.arange(5)[None]))
        (gradient,) = torch.autograd.grad(rotated, x, rotated.detach())
        assert torch.allclose(gradient, x, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_backward_equals_autograd(dtype):
    draw, tolerance = torch.Generator().manual_seed(0), 1e-5 if dtype == torch.float32 else 0.01
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=draw))
    x = torch.randn(2, 5, 3, 24, generator=draw).to(dtype).requires_grad_()
    d_y = torch.randn(x.shape, generator=draw).to(dtype)
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    found = norm(x)
    assert found.dtype == dtype and relative_error(found, expected) <= tolerance
    gradients = torch.autograd.grad(found, [x, norm.weight], d_y)
    for grad, right in zip(gradients, torch.autograd.grad(expected, [x, norm.weight], d_y.double()), strict=True):
        assert relative_error(grad, right) <= tolerance


def test_rms_norm_of_low_precision_is_computed_in_float32():
    """In bfloat16 the sum of 512 squares would stop growing at 256, and the result would be sqrt(2)."""
    y = RMSNorm(512)(torch.ones(1, 512, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ones_like(y))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(RMSNorm(512)(x), exact.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_equals_its_formula_in_float32(bias):
    """Far from zero, where bfloat16 would lose the deviations in the mean."""
    draw, norm = torch.Generator().manual_seed(0), LayerNorm(512, bias)
    x = (100 + torch.randn(3, 512, generator=draw)).bfloat16()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(512, generator=draw))
    deviation = x.double() - x.double().mean(-1, keepdim=True)
    exact = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    exact = exact + norm.bias.double() if bias else exact
    assert norm(x).dtype == torch.bfloat16
    assert relative_error(norm(x), exact) <= 2**-8
    assert relative_error(norm(x.float()), exact) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_rms_norm_shares_one_rms_among_neighbouring_heads(groups):
    x, norm = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)), GroupedRMSNorm(8, groups)
    with torch.no_grad():
        norm.weight.uniform_(generator=torch.Generator().manual_seed(1))
    together = 6 // groups
    for head in range(6):
        first = head // together * together
        mean = x[:, :, first : first + together].square().mean((2, 3))[..., None]
        assert torch.allclose(norm(x)[:, :, head], x[:, :, head] * norm.weight / (mean + 1e-6).sqrt(), atol=1e-6)
    if groups == 6:
        each = RMSNorm(8)
        each.load_state_dict(norm.state_dict())
        assert torch.allclose(norm(x), each(x), atol=1e-6)


def test_softcap_bounds_large_logits_and_keeps_small_ones():
    free, capped = small_model("attention=gqa"), small_model("attention=gqa", "model.logit_softcap=2")
    logits = logits_of(free, some_tokens(2, 9))
    assert logits.abs().max() > 3
    assert torch.allclose(logits_of(capped, some_tokens(2, 9)), 2 * torch.tanh(logits / 2), atol=1e-5)
    small = torch.linspace(-0.1, 0.1, 9)
    assert torch.allclose(softcapped(small, 50.0), small, rtol=1e-5)
    exact = (30 * torch.tanh(torch.tensor(100.0, dtype=torch.float64) / 30)).bfloat16()
    assert torch.equal(softcapped(torch.tensor(100.0).bfloat16(), 30.0), exact)


def test_model_bias_is_on_the_documented_matrices_and_starts_at_zero():
    model = initialised(small_config("attention=gqa", "model.bias=true", "model.tie_embeddings=false"), 100)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.up_proj")
    parts += ("mlp.down_proj",)
    assert biases.keys() == {f"layers.{i}.{part}.bias" for i in (0, 1) for part in parts}
    assert not any(bias.any() for bias in biases.values())
    layer = initialised(small_config("attention=gqa", "model.bias=true", "model.norm=layer"), 100)
    assert {"norm.bias", "layers.1.mlp_norm.bias"} <= dict(layer.named_parameters()).keys()
    none = initialised(small_config("attention=gqa", "model.norm=layer", "attention.qk_bias=false"), 100)
    assert not any(name.endswith("bias") for name, _ in none.named_parameters())


@pytest.mark.parametrize("mlp", ["gelu", "relu", "relu2", "swiglu", "moe"])
def test_mlp_bias_is_on_the_mlp_alone_and_model_bias_without_it_on_the_others(mlp):
    def biased(*choice):
        model = initialised(small_config("attention=mha", f"mlp={mlp}", "attention.qk_bias=false", *choice), 100)
        return {name.split(".")[2] for name, _ in model.named_parameters() if name.endswith("bias")}

    assert biased("mlp.bias=true") == {"mlp"}
    assert biased("model.bias=true", "mlp.bias=false") == {"attention"}
    assert biased("model.bias=true") == {"attention", "mlp"}
    assert biased() == set()


@pytest.mark.parametrize(
    ("choice", "biased"),
    [
        (("attention=gqa",), {"q_proj", "k_proj"}),
        (("attention=mla",), {"q_proj", "kv_down"}),
        (("attention=mla", "attention.q_lora_rank=8", "attention.k_rope_from=latent"), {"q_proj.up", "k_rope_proj"}),
        (("attention=mla", "position=none"), {"q_proj"}),
    ],
)
def test_qk_bias_by_default_is_on_queries_and_rotated_keys(choice, biased):
    model = initialised(small_config(*choice), 100)
    found = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert found == {f"layers.{i}.attention.{part}.bias" for i in (0, 1) for part in biased}
    without = initialised(small_config(*choice, "attention.qk_bias=false"), 100)
    tokens = some_tokens(2, 9)
    assert torch.equal(logits_of(model, tokens), logits_of(without, tokens))  # they begin at zero


def test_residual_outputs_without_zero_init_start_small():
    size = ("model.d_model=256", "model.n_layers=8", "attention=mla")
    zero, small = (initialised(small_config(*size, f"model.zero_init={init}"), 100) for init in ("true", "false"))
    for name, parameter in small.named_parameters():
        twin = zero.get_parameter(name)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not twin.any()
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5 / 4, rel=0.02)  # 4 = sqrt(2 · 8)
        else:
            assert torch.equal(parameter, twin), name


@pytest.mark.parametrize(
    ("choice", "activation"),
    [
        (("mlp=relu",), lambda x: x.clamp(min=0)),
        (("mlp=relu2",), lambda x: x.clamp(min=0) ** 2),
        (("mlp=gelu",), lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        (
            ("mlp=gelu", "mlp.approximate=tanh"),
            lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        ),
    ],
    ids=lambda choice: " ".join(choice) if isinstance(choice, tuple) else "",
)
def test_plain_mlp_equals_its_formula(choice, activation):
    mlp = small_model(*choice, "model.bias=true").layers[0].mlp
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = activation(x @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    (y, _), expected = mlp(x, None), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias
    assert relative_error(y, expected) <= 1e-6
    wanted = [x, *mlp.parameters()]
    for gradient, twin in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected)), strict=True):
        assert relative_error(gradient, twin) <= 1e-5


def test_learned_positions_are_rows_added_to_the_embedding():
    learned = ("attention=mha", "attention.position=none", "model.position_embedding=learned")
    model = small_model(*learned, "model.n_layers=1")
    tokens, plain = some_tokens(1, 9), logits_of(model, some_tokens(1, 9))
    moved = logits_of(model, tokens, Placement(torch.arange(9)[None] + 5))
    assert relative_error(moved, plain) > 0.01
    with torch.no_grad():
        model.position_embedding.weight[:9] = model.position_embedding.weight[5:14].clone()
    assert relative_error(logits_of(model, tokens), moved) <= 1e-6
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    swapped = tokens[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]  # one layer without positions reads a bag of words
    assert relative_error(logits_of(model, swapped)[:, 5:], logits_of(model, tokens)[:, 5:]) <= 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_initialise_with_one_seed_gives_equal_weights_on_every_kernel(attention):
    models = [
        initialised(small_config(f"attention={attention}", kernel=kernel), 300, seed)
        for kernel, seed in ((Naive(), 1), (SDPA(), 1), (Auto(), 2))
    ]
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_initialise_of_two_attentions_gives_equal_weights_in_common_parts():
    mha, mla = (initialised(small_config(f"attention={name}"), 100).state_dict() for name in ("mha", "mla"))
    shared = [name for name in mha if "attention." not in name]
    assert len(shared) == 2 * 4 + 2
    assert all(torch.equal(mha[name], mla[name]) for name in shared)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_padded_embedding_padding_is_never_scored_saved_or_trained(tied):
    model = initialised(small_config("attention=mha", f"model.tie_embeddings={tied}"), vocab_size=100)
    assert model.embedding.weight.shape[0] == 128
    tokens = some_tokens(2, 8)
    logits = logits_of(model, tokens)
    assert logits.shape == (2, 8, 100)
    logits.square().mean().backward()
    matrix = model.head or model.embedding
    assert (matrix.weight.grad[100:] == 0).all()
    assert (matrix.weight[100:] == 0).all()
    state = model.state_dict()
    assert state["embedding.weight"].shape[0] == 100
    assert ("head.weight" in state) == (tied == "false")
    again = initialised(model.config, 100, seed=9)
    again.load_state_dict(state)
    assert torch.equal(logits_of(again, tokens), logits)
    assert (again.embedding.weight[100:] == 0).all()


def test_forward_returns_auxiliary_outputs_by_layer():
    model = initialised(small_config("attention=mha"), 100)
    quiet = model(some_tokens(1, 4))
    assert quiet.aux == {}
    attention = model.layers[1].attention
    speak = attention.forward
    attention.forward = lambda *given: (speak(*given)[0], {"max_logit": torch.tensor(2.5)}, None)
    assert model(some_tokens(1, 4)).aux == {"layers.1.max_logit": torch.tensor(2.5)}


def test_model_ropes_are_in_order_of_first_use():
    """As a set they would change order with PYTHONHASHSEED, and with it the graph that a compiler traces."""
    thetas = {"d": 40.0, "a": 10.0, "c": 30.0, "b": 20.0}
    parts = [f"+attention.parts.{name}={{attention: gqa, rope_theta: {theta}}}" for name, theta in thetas.items()]
    pattern = f"attention.pattern=[{','.join([*thetas, 'd'])}]"
    model = small_model("attention=stack", "model.n_layers=5", pattern, *parts)
    assert [rope.theta for rope in model.ropes] == list(thetas.values())


@pytest.mark.parametrize("size", ["tiny", "small", "gpt2", "gpt2_medium"])
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_model_presets_have_aligned_dimensions_and_their_stated_size(size, attention):
    config = composed_run(f"model={size}", f"attention={attention}").model
    if attention == "mla":
        mla = config.attention
        assert mla.qk_nope_head_dim + mla.qk_rope_head_dim == mla.v_head_dim == config.d_model // config.n_heads
        assert mla.kv_lora_rank + mla.qk_rope_head_dim <= 256
    with torch.device("meta"):
        model = TransformerLM(config, 50257)
    parameters = sum(p.numel() for p in model.parameters())
    if attention == "mha":
        assert parameters == pytest.approx({"gpt2": 124e6, "gpt2_medium": 354e6}.get(size, parameters), rel=0.01)


def test_mla_with_a_cache_larger_than_gqa_warns(caplog):
    with caplog.at_level("WARNING", logger="headroom"):
        small_config("attention=mla")
        assert not caplog.records
        initialised(small_config("attention=mla", "attention.kv_lora_rank=512"), 100)
    assert caplog.text.count("larger than the 64 of grouped-query attention") == 1
