"""The laws on combinations that nobody thought of: any attention, with any pattern, positions, norms and kernel."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from model.initialise import initialised
from model.kernels.naive import Naive
from model.kernels.online import Online
from model.kernels.sdpa import SDPA
from tests.model.attention import laws
from tests.support import logits_of, sharpened, small_config, some_tokens

KERNELS = [Naive(), SDPA(), Online(query_tile=5, key_tile=3)]


def switches(*choices: str) -> st.SearchStrategy[list[str]]:
    """One of these overrides, several to be separated by spaces, or none."""
    return st.sampled_from(["", *choices]).map(str.split)


PATTERNS = switches(
    "attention.window=5",
    "attention.window=4 attention.global_tokens=2",
    "attention.window=9 attention.dilation=2",
    "attention.dilation=3",
    "attention.window=3 attention.random_blocks=0.4 attention.block_size=2 attention.pattern_seed=7",
    "attention.mask_diagonal=true attention.window=6",
)
POSITIONS = switches(
    "position=alibi",
    "position=none",
    "position=learned",
    "position=sinusoidal",
    "attention.rope_scaling=yarn attention.rope_factor=4",
    "attention.rope_scaling=ntk attention.rope_factor=2 attention.rope_layout=interleaved",
)
BLOCKS = switches(  # without relu: a unit that rounding switches on has another gradient
    "model.norm=layer model.bias=true",
    "model.logit_softcap=5",
    "mlp=gelu model.bias=true",
    "mlp=swiglu model.norm=layer",
)
GQA = st.tuples(
    st.sampled_from(["attention=mha", "attention=gqa", "attention=mqa"]).map(str.split),
    switches("attention.qk_norm=false", "attention.head_dim=24"),
)
MLA = st.tuples(
    st.just(["attention=mla"]),
    switches("attention.q_lora_rank=24", "attention.v_head_dim=24", "attention.kv_lora_rank=40"),
    switches("attention.execution=naive", "attention.execution=expanded", "attention.execution=absorbed"),
    switches("attention.qk_norm=head", "attention.qk_norm=head attention.qk_norm_groups=2", "attention.qk_norm=whole"),
    switches("attention.k_rope_from=latent"),
)


@st.composite
def combinations(draw) -> list[str]:
    parts = [*draw(st.one_of(GQA, MLA)), draw(PATTERNS), draw(POSITIONS), draw(BLOCKS)]
    return [override for part in parts for override in part]


def check(overrides: list[str], kernel) -> None:
    try:
        config = small_config(*overrides, "model.tie_embeddings=false", kernel=kernel)
    except UserError:  # a rope key from the latent, where nothing rotates, and the like
        assume(False)
    attention = config.attention
    reference = attention.with_execution("naive") if attention.executions else attention
    model = initialised(config, 100)
    oracle = initialised(config.model_copy(update={"kernel": Naive(), "attention": reference}), 100)
    model.load_state_dict(sharpened(oracle).state_dict())
    laws.check_causality(model)
    laws.check_cached(model, oracle, tolerance=2e-5)
    laws.check_ragged(model, oracle, tolerance=2e-5)
    laws.check_packed_documents(model)
    gradients = [
        torch.autograd.grad(logits_of(one, some_tokens(2, 24)).square().mean(), list(one.parameters()))
        for one in (model, oracle)
    ]
    laws.check_gradients(*gradients, tolerance=2e-4)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(overrides=combinations(), kernel=st.sampled_from(KERNELS))
def test_laws_for_pairwise_combinations_hold(overrides, kernel):
    check(overrides, kernel)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(overrides=combinations(), kernel=st.sampled_from(KERNELS))
def test_laws_for_many_combinations_hold(overrides, kernel):
    check(overrides, kernel)
