"""Our oracle against code written elsewhere: randomly initialised transformers models, their weights mapped to ours.

Llama is MHA and GQA, with biases where it is asked to, Qwen3 adds the norms on queries and keys, DeepSeek-V3 (its dense
blocks) is MLA, and GPT-2 is classic_gpt.
"""

import pytest
import torch
from torch import Tensor

from model.initialise import initialised
from model.layout import Kind
from model.mask import Mask
from model.transformer import TransformerLM
from tests.model.attention.laws import ways_to_decode
from tests.support import composed_run, logits_of, relative_error, some_tokens, spread_out

transformers = pytest.importorskip("transformers")

VOCAB, LAYERS, WIDTH, HEADS, HIDDEN = 100, 2, 64, 4, 96
SHAPE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
OURS = (
    "model.n_layers=2",
    "model.d_model=64",
    "model.n_heads=4",
    "model.tie_embeddings=false",
    "mlp=swiglu",
    "mlp.d_ff=96",
    "attention.qk_bias=false",
)


LATENTS = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}  # DeepSeek's
OUR_LATENTS = [f"attention.{name}={size}" for name, size in LATENTS.items()]


def load_published(mine: TransformerLM, state: dict[str, Tensor]) -> None:
    """All of their weights, and nothing else but zeros: DeepSeek has biases in attention only."""
    table = mine.layout()
    assert state.keys() <= {layout.published.llama for layout in table.values()}
    for name, parameter in mine.named_parameters():
        theirs = state.get(table[name].published.llama)
        assert theirs is not None or table[name].kind is Kind.BIAS, name
        parameter.data.copy_(torch.zeros_like(parameter) if theirs is None else padded(theirs, parameter))


def padded(theirs: Tensor, parameter: Tensor) -> Tensor:
    """Rows of zeros behind a vocabulary."""
    behind = torch.zeros(len(parameter) - len(theirs), *theirs.shape[1:])
    return torch.cat((theirs, behind))


def check_parity(theirs: torch.nn.Module, *overrides: str) -> None:
    theirs = theirs.eval()
    spread_out(theirs)
    config = composed_run(*OURS, "kernel=naive", *overrides).model
    mine = initialised(config, VOCAB)
    load_published(mine, theirs.state_dict())
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        assert relative_error(logits_of(mine, tokens), theirs(tokens, use_cache=False).logits) <= 1e-4


@pytest.mark.parametrize(("kv_heads", "attention"), [(4, "mha"), (2, "gqa"), (1, "mqa")])
def test_gqa_with_llamas_weights_gives_its_logits(kv_heads, attention):
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=kv_heads)
    check_parity(transformers.LlamaForCausalLM(config), f"attention={attention}", "attention.qk_norm=false")


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_gqa_with_llamas_scaled_rope_gives_its_logits(scaling):
    """Theirs multiplies cos and sin by YaRN's mscale, ours the scores by its square."""
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"linear": LINEAR, "yarn": YARN, "llama3": {**YARN, "rope_type": "llama3", **turns}}[scaling]
    shape = {**SHAPE, "rope_parameters": rope, "rope_scaling": rope}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2)
    check_parity(
        transformers.LlamaForCausalLM(config),
        "attention=gqa",
        "attention.qk_norm=false",
        "model.context_length=64",  # so that yarn begins from 16
        f"attention.rope_scaling={scaling}",
        "attention.rope_factor=4",
    )


def test_gqa_with_llamas_biases_gives_its_logits():
    config = transformers.LlamaConfig(**SHAPE | {"attention_bias": True}, mlp_bias=True, num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM(config)
    check_parity(theirs, "attention=gqa", "attention.qk_norm=false", "model.bias=true")


def test_gqa_with_qwen2s_biases_and_its_eps_gives_its_logits():
    config = transformers.Qwen2Config(**SHAPE | {"rms_norm_eps": 1e-3}, num_key_value_heads=2)
    ours = ("attention=gqa", "attention.qk_norm=false", "attention.v_bias=true", "model.norm_eps=1e-3")
    check_parity(transformers.Qwen2ForCausalLM(config), *ours, "attention.qk_bias=true")


def test_gqa_with_qwen3s_qk_norms_gives_its_logits():
    config = transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16)
    check_parity(transformers.Qwen3ForCausalLM(config), "attention=gqa")


@pytest.mark.parametrize(  # each pair once; that the executions agree is a law
    ("q_lora_rank", "execution", "scaling", "bias"),
    [
        (None, "naive", "none", False),
        (24, "absorbed", "none", False),
        (None, "absorbed", "yarn", False),
        (24, "naive", "yarn", False),
        (None, "absorbed", "none", True),
        (24, "naive", "none", True),
    ],
)
def test_mla_with_deepseek_v3s_weights_gives_its_logits(q_lora_rank, execution, scaling, bias):
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    stretched = ("attention.rope_scaling=yarn", "attention.rope_factor=4", "attention.rope_original_context=16")
    config = transformers.DeepseekV3Config(
        **SHAPE | {"attention_bias": bias},
        **({"rope_parameters": rope, "rope_scaling": rope} if scaling == "yarn" else {}),
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        **LATENTS,
        first_k_dense_replace=LAYERS,  # dense blocks only
        rope_interleave=True,
    )
    check_parity(
        transformers.DeepseekV3ForCausalLM(config),
        "attention=mla",
        "attention.qk_norm=latent",
        f"attention.q_lora_rank={q_lora_rank or 0}",
        *OUR_LATENTS,
        "attention.rope_layout=interleaved",
        f"attention.execution={execution}",
        *(stretched if scaling == "yarn" else ()),
        f"model.bias={bias}",
    )


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="this transformers has no DeepSeek-V3.2")
def test_dsa_with_deepseek_v32s_weights_chooses_its_keys_and_gives_its_logits(monkeypatch):
    top_k, theirs_chosen, mine_chosen = 7, [], []
    config = transformers.DeepseekV32Config(
        **SHAPE,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        **LATENTS,
        index_topk=top_k,
        index_head_dim=20,
        index_n_heads=16,  # so many that no key has them all off: theirs takes any of equal scores
        first_k_dense_replace=LAYERS,
        rope_interleave=True,
    )
    theirs = transformers.DeepseekV32ForCausalLM(config)
    among = Mask.among
    monkeypatch.setattr(Mask, "among", lambda mask, chosen: mine_chosen.append(chosen) or among(mask, chosen))
    for layer in theirs.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda _module, _given, found: theirs_chosen.append(found))
    check_parity(
        theirs,
        "attention=dsa",
        "attention.qk_norm=latent",
        "attention.q_lora_rank=24",
        *OUR_LATENTS,
        "attention.rope_layout=interleaved",
        f"attention.indexer.top_k={top_k}",
        "attention.indexer.head_dim=20",
        "attention.indexer.n_heads=16",
    )
    assert len(mine_chosen) == len(theirs_chosen) == LAYERS
    earlier = torch.ones(40, 40, dtype=torch.bool).tril()
    for mine, indices in zip(mine_chosen, theirs_chosen, strict=True):
        expected = torch.zeros(2, 40, 40, dtype=torch.bool).scatter(2, indices.long(), True)
        assert torch.equal(mine & earlier, expected & earlier)


def per_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As published checkpoints have it, each expert's matrices by themselves; transformers joins them as it loads."""
    found = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts"):
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            parts = zip(names, matrix.chunk(len(names)), strict=True)
            found |= {f"{module}.{e}.{part}.weight": rows for part, rows in parts}
    return found


def joined(state: dict[str, Tensor], mine: TransformerLM) -> dict[str, Tensor]:
    """The matrices of experts as one tensor, by the names that the layout has for each."""
    patterns = {layout.published.llama: layout.experts.count for layout in mine.layout().values() if layout.experts}
    stacks = {name: torch.stack([state.pop(name.format(e=e)) for e in range(n)]) for name, n in patterns.items()}
    return state | stacks


def test_moe_with_deepseek_v3s_weights_gives_its_logits():
    """One dense layer, then experts in groups, chosen with a bias that makes some scores negative."""
    config = transformers.DeepseekV3Config(
        **SHAPE | {"num_hidden_layers": 3},
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        **LATENTS,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_interleave=True,
    )
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    spread_out(theirs)
    mine = initialised(
        composed_run(
            *(one for one in OURS if not one.startswith(("mlp", "model.n_layers"))),
            *(
                "model.n_layers=3",
                "kernel=naive",
                "attention=mla",
                "attention.q_lora_rank=0",
                "attention.qk_norm=latent",
            ),
            *OUR_LATENTS,
            *("attention.rope_layout=interleaved", "mlp=moe", "mlp.d_ff=24"),
            *("mlp.n_experts=16", "mlp.top_k=4", "mlp.n_shared_experts=2", "mlp.n_groups=4", "mlp.top_groups=2"),
            *("mlp.scaling=2.5", "mlp.n_dense_layers=1", "mlp.dense_d_ff=96"),
        ).model,
        VOCAB,
    )
    state = per_expert(theirs.state_dict())
    for i in (1, 2):
        name = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
        bias = torch.linspace(-1.5, 0.3, 16).roll(5 * i)
        dict(theirs.named_buffers())[name].copy_(bias)
        state.pop(name)
        mine.layers[i].mlp.router.selection_bias.copy_(bias)
    load_published(mine, joined(state, mine))
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        assert relative_error(logits_of(mine, tokens), theirs(tokens, use_cache=False).logits) <= 1e-4


def load_gpt2(mine: TransformerLM, state: dict[str, Tensor]) -> None:
    """Its matrices are stored as (inputs, outputs), and those of queries, keys and values as one."""
    named, table = dict(mine.named_parameters()), mine.layout()
    assert state.keys() == {layout.published.gpt2 for layout in table.values()} | {"lm_head.weight"}
    for published in state.keys() - {"lm_head.weight"}:  # the embedding again
        sharing = [named[name] for name, layout in table.items() if layout.published.gpt2 == published]
        is_matrix = any(layout.published.gpt2 == published and layout.kind is Kind.MATRIX for layout in table.values())
        theirs = padded(state[published].T if is_matrix else state[published], torch.cat(sharing))
        for parameter, rows in zip(sharing, theirs.split([len(one) for one in sharing]), strict=True):
            parameter.data.copy_(rows)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_new", "tanh")])
def test_mha_with_gpt2s_weights_gives_its_logits(activation, approximate):
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 64, "n_inner": HIDDEN}
    config = transformers.GPT2Config(vocab_size=VOCAB, activation_function=activation, **shape)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    spread_out(theirs)
    sizes = [override for override in OURS if "tie" not in override and override != "mlp=swiglu"]
    tied = ("model.tie_embeddings=true", "model.context_length=64", f"mlp.approximate={approximate}")
    mine = initialised(composed_run("model=classic_gpt", *sizes, *tied, "kernel=naive").model, VOCAB)
    load_gpt2(mine, theirs.state_dict())
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert relative_error(logits_of(mine, tokens), expected) <= 1e-4
    for way, found in ways_to_decode(mine, tokens):
        assert relative_error(found, expected) <= 1e-4, way
