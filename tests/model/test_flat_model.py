"""The flat step of decoding computes what the model does, and stands aside where it would not."""

import pytest
import torch
from torch import nn

from generation.decode import generate
from generation.sampler import Sampler
from generation.state import GenerationState
from model.attention.gqa import GQA
from model.decode_layout import lay_out_for_decoding
from model.flat_model import FlatModel, flat_model
from model.kernels.auto import SDPA_DEFAULT
from model.kernels.base import Kernel
from model.kernels.naive import Naive
from model.linear import Linear
from model.mlp import PlainMLP
from model.placement import Placement
from model.transformer import PaddedEmbedding, TransformerLM, run_block
from tests.support import ATTENTIONS, logits_of, relative_error, small_model, some_tokens

PROMPT, TOKENS = 9, 24
FLAT = [
    ("attention=mha",),
    ("attention=mqa", "model.qk_norm=false", "mlp=swiglu", "model.tie_embeddings=false"),
    ("attention=gqa", "model.bias=true", "model.qk_bias=true", "model.norm=layer", "mlp=gelu"),
    ("attention=gqa", "attention.rope_layout=interleaved", "attention.rope_dim=8", "model.logit_softcap=15"),
    ("attention=mha", "attention.position=none", "model.position_embedding=learned", "mlp=relu"),
    ("attention=mha", "attention.position=none", "model.position_embedding=sinusoidal"),
    ("attention=gqa", "attention.rope_scaling=yarn", "attention.rope_factor=4"),
    ("attention=mla",),
    ("attention=mla", "attention.q_lora_rank=24", "model.bias=true", "model.qk_bias=true", "mlp=swiglu"),
    ("attention=mla", "attention.qk_norm=latent", "attention.execution=absorbed"),
    ("attention=mla", "attention.qk_norm=latent", "attention.rope_layout=interleaved", "attention.v_head_dim=24"),
    ("attention=mla", "model.qk_norm=false", "attention.q_lora_rank=24"),
    ("attention=mla", "attention.rope_scaling=yarn", "attention.rope_factor=4"),
]
GENERAL = [
    ("attention=gqa", "attention.window=6"),
    ("attention=mha", "attention.position=alibi"),
    ("attention=mha", "attention.mask_diagonal=true"),
    ("attention=mla", "attention.execution=naive"),
    ("attention=mla", "attention.execution=expanded"),
    ("attention=mla", "attention.qk_norm=head"),
    ("attention=mla", "attention.qk_norm_groups=2"),
    ("attention=mla", "attention.k_rope_from=latent"),
    ("attention=mla", "attention.position=none"),
]


def laid_out(*case: str, rows: int = 2, kernel: Kernel = SDPA_DEFAULT):
    model = small_model(*case, kernel=kernel)
    lay_out_for_decoding(model, rows)
    return model


def flat_of(model, caches, rows: int = 2):
    return flat_model(model, caches, rows, model.config.context_length)


@torch.no_grad()
def steps(model, tokens: torch.Tensor, step) -> torch.Tensor:
    """Logits (B, T, V) of tokens (B, T) behind a prompt, one at a time by `step(caches)(tokens (B, 1), position)`."""
    caches = model.make_caches(len(tokens), 64)
    model(tokens[:, :PROMPT], Placement.prefill(torch.full((len(tokens),), PROMPT), caches))
    one = step(caches)
    return torch.stack([one(tokens[:, i, None], i) for i in range(PROMPT, tokens.shape[1])], 1)


def general(model):
    def step(caches):
        def one(token, position):
            at = Placement.decode(torch.tensor([[position]]), caches)
            return model.logits(model(token, at).x)[:, 0]

        return one

    return step


# Products of one row are computed otherwise: each kind of layer has both.
WITH_ROWS = [*((case, 1) for case in FLAT), *((FLAT[i], 3) for i in (0, 1, 2, 7, 8))]


@pytest.mark.parametrize(
    ("case", "rows"),
    WITH_ROWS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_flat_step_computes_what_the_model_does(case, rows):
    model, tokens = laid_out(*case, rows=rows), some_tokens(rows, TOKENS)
    expected = steps(model, tokens, general(model))
    assert relative_error(steps(model, tokens, lambda caches: flat_of(model, caches, rows)), expected) <= 1e-5


@pytest.mark.parametrize("case", [("attention=mha",), ("attention=mla",)], ids=" ".join)
def test_flat_step_leaves_in_the_cache_what_the_model_reads_there(case):
    """Each token is decoded by the one whose turn it is."""
    model, tokens = laid_out(*case), some_tokens(2, TOKENS)

    def in_turns(caches):
        both = flat_of(model, caches), general(model)(caches)
        return lambda token, position: both[position % 2](token, position)

    assert relative_error(steps(model, tokens, in_turns), steps(model, tokens, general(model))) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", [("attention=gqa", "mlp=swiglu"), ("attention=mla",)], ids=" ".join)
def test_flat_step_in_bfloat16_is_as_near_as_the_model(case):
    exact, tokens = laid_out(*case), some_tokens(2, TOKENS)
    expected = steps(exact, tokens, general(exact))
    model = laid_out(*case)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    lay_out_for_decoding(model, 2)
    errors = [
        relative_error(steps(model, tokens, step).float(), expected)
        for step in (general(model), lambda caches: flat_of(model, caches))
    ]
    assert 0 < errors[1] <= 2 * errors[0] < 0.2


@pytest.mark.parametrize("case", GENERAL, ids=" ".join)
def test_flat_step_stands_aside_for_what_it_does_not_know(case):
    model = laid_out(*case)
    assert flat_of(model, model.make_caches(2, 64)) is None


def test_flat_step_stands_aside_for_another_kernel():
    model = laid_out("attention=mha", kernel=Naive())
    assert flat_of(model, model.make_caches(2, 64)) is None


def hooked(model):
    model.layers[1].attention.register_forward_hook(lambda *_: None)


def modified(model):
    model.layers[1].attention.__class__ = type("Gated", (GQA,), {"modify": lambda self, heads, x, ctx: 2 * heads})


def other_heads(model):
    model.layers[1].attention.__class__ = type("Other", (GQA,), {"heads": GQA.heads.__get__})


def replaced(model):
    model.layers[1].attention.o_proj = nn.Sequential(model.layers[1].attention.o_proj)


def replaced_mlp(model):
    model.layers[1].mlp.down_proj = nn.Sequential(model.layers[1].mlp.down_proj)


def replaced_norm(model):
    model.layers[1].attention.q_norm = nn.Sequential(model.layers[1].attention.q_norm)


def another_attention(model):
    model.layers[1].attention.__class__ = type("Own", (GQA,), {})


def another_embedding(model):
    model.embedding.__class__ = type("Own", (PaddedEmbedding,), {})


def another_model(model):
    model.__class__ = type("Own", (TransformerLM,), {})


def another_way_to_run(model):
    model.run_block = lambda *given: run_block(*given)


def another_mlp(model):
    model.layers[1].mlp.__class__ = type("Own", (PlainMLP,), {})


def another_forward(model):
    def twice(self, x, ctx):
        return 2 * PlainMLP.forward(self, x, ctx)[0], {}

    model.layers[1].mlp.__class__ = type("Other", (PlainMLP,), {"forward": twice})


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        modified,
        other_heads,
        replaced,
        replaced_mlp,
        replaced_norm,
        another_attention,
        another_embedding,
        another_model,
        another_way_to_run,
        another_mlp,
        another_forward,
    ],
)
def test_flat_step_stands_aside_for_a_model_that_was_changed(change):
    model = laid_out("attention=gqa")
    assert flat_of(model, model.make_caches(2, 64)) is not None
    change(model)
    assert flat_of(model, model.make_caches(2, 64)) is None


@pytest.mark.parametrize("part", [0, 1, 2])
def test_flat_step_stands_aside_for_another_query_latent(part):
    model = laid_out("attention=mla", "attention.q_lora_rank=24")
    q_proj = model.layers[1].attention.q_proj
    q_proj[part] = nn.Sequential(q_proj[part])
    assert flat_of(model, model.make_caches(2, 64)) is None


@torch.no_grad()
def test_lay_out_for_decoding_does_not_join_a_layer_of_another_kind():
    model = small_model("attention=gqa")
    layer = model.layers[0].attention.q_proj
    layer.__class__ = type("Doubled", (Linear,), {"forward": lambda self, x: 2 * Linear.forward(self, x)})
    expected = logits_of(model, some_tokens(2, 9))
    lay_out_for_decoding(model)
    assert relative_error(logits_of(model, some_tokens(2, 9)), expected) <= 1e-5


def test_flat_step_follows_caches_that_grow_and_weights_that_change_between_calls():
    """Weights of the last norm, which nothing that is cached depends on."""
    texts = []
    for cached in (True, False):
        model = laid_out("attention=mha", "model.context_length=256", rows=1)
        state = GenerationState(model, [[1, 2, 3]], [0], cached=cached)
        list(generate(model, state, Sampler(temperature=0), max_new_tokens=70))  # beyond 64
        assert isinstance(state.flat, FlatModel) is cached
        model.norm.weight.data.mul_(torch.linspace(-1, 3, 64))
        list(generate(model, state, Sampler(temperature=0), max_new_tokens=70))  # beyond 96 and 128
        texts.append(state.tokens[0, :143].tolist())
    assert texts[0] == texts[1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flat_step_greedy_text_equals_the_text_without_a_cache(attention):
    """Rows of one length take the flat step until one ends, and again after; the text is that without a cache."""
    model = laid_out(f"attention={attention}")
    prompts = some_tokens(3, 6).tolist()
    texts = []
    for cached in (True, False):
        state = GenerationState(model, prompts, range(3), cached=cached)
        sampler = Sampler(temperature=0)
        list(generate(model, state, sampler, max_new_tokens=10))
        state.end(1)
        list(generate(model, state, sampler, max_new_tokens=10))
        state.append(1, state.tokens[0, 16:26].tolist())
        list(generate(model, state, sampler, max_new_tokens=10))
        texts.append(state.tokens[:, : int(state.rows.lengths.max())])
    assert torch.equal(*texts)
