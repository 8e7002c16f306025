"""Models for tests of published ones: of transformers, initialised at random and saved in a folder, and of ours."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.vocabulary import OURS
from model.initialise import initialised
from model.layout import Kind
from model.transformer import TransformerLM
from tests.support import composed_run, spread_out

# Its models take seconds to import, once one is asked for: annotations of them are quoted.
transformers = pytest.importorskip("transformers")

VOCAB = 257  # of bytes
SHAPE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
ENDS = ("vocab_size", "bos_token_id", "eos_token_id")
KV = {"num_key_value_heads": 2}
LATENTS = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2}
# Published models of every family, by name: what transformers calls the family, and what the model has besides SHAPE.
THEIRS = {
    "llama": ("Llama", {**KV, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "llama tied, linear": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "llama yarn": ("Llama", {"num_key_value_heads": 1, "mlp_bias": True, "rope_parameters": YARN}),
    "mistral": ("Mistral", {**KV, "sliding_window": 8}),
    "llama 3.1": ("Llama", {**KV, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", KV),
    "qwen2 window": ("Qwen2", {**KV, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2 of both kinds of layers": (
        "Qwen2",
        {**KV, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3 of both kinds of layers": (
        "Qwen3",
        {
            **{**KV, "use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3": ("Qwen3", {**KV, "attention_bias": True, "head_dim": 24}),
    "apertus": ("Apertus", {**KV, "attention_bias": True, "hidden_act": "relu2", "rope_parameters": LLAMA3}),
    "glm4_moe": ("Glm4Moe", {**KV, **EXPERTS, "use_qk_norm": True, "num_mtp_layers": 0}),
    "deepseek_v3": ("DeepseekV3", {**LATENTS, "q_lora_rank": None, "first_k_dense_replace": 2}),
    "deepseek_v3 yarn": (
        "DeepseekV3",
        {
            **LATENTS,
            **{"q_lora_rank": 24, "first_k_dense_replace": 2, "rope_interleave": False, "attention_bias": True},
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3 experts": ("DeepseekV3", {**LATENTS, **EXPERTS, **GROUPS, "q_lora_rank": 24}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
# Ours, each with the family that expresses it first.
OURS_AS = {
    "llama": ("attention=gqa", "mlp=swiglu", "model.qk_norm=false"),
    "llama, all biases, neighbours rotate, ntk, untied": (
        *("attention=mha", "mlp=swiglu", "model.qk_norm=false", "model.bias=true", "attention.rope_layout=interleaved"),
        *("attention.rope_scaling=ntk", "attention.rope_factor=2", "model.tie_embeddings=false"),
    ),
    "mistral": ("attention=mqa", "mlp=swiglu", "model.qk_norm=false", "model.qk_bias=false", "attention.window=8"),
    "qwen2": (
        *("attention=gqa", "mlp=swiglu", "model.qk_norm=false", "attention.v_bias=true", "attention.window=8"),
        "attention.rope_layout=interleaved",
    ),
    "qwen3": (
        *("attention=gqa", "mlp=swiglu", "attention.rope_layout=interleaved", "attention.window=12"),
        "attention.head_dim=24",
    ),
    "qwen3, a stack": (
        *("attention=stack", "mlp=swiglu", "attention.parts.local.window=12", "model.n_layers=4"),
        *("attention.parts.local.rope_layout=interleaved", "attention.parts.global.rope_layout=interleaved"),
    ),
    "apertus": ("attention=gqa",),
    "llama 3.1": (
        *("attention=gqa", "mlp=swiglu", "model.qk_norm=false", "attention.rope_scaling=llama3"),
        *("attention.rope_factor=4", "attention.rope_original_context=16"),
    ),
    "apertus, gelu, yarn": ("attention=gqa", "mlp=gelu", "attention.rope_scaling=yarn", "attention.rope_factor=4"),
    "glm4_moe": ("attention=gqa", "mlp=moe", "attention.rope_dim=8"),
    "glm4_moe without a bias of experts": (
        *("attention=gqa", "mlp=moe", "mlp.bias_rate=0", "model.qk_norm=false", "mlp.n_dense_layers=1"),
    ),
    "deepseek_v3, squared relu": ("attention=mla", "mlp=relu2", "model.qk_norm=false", "attention.qk_bias=false"),
    "deepseek_v3, experts, neighbours rotate, yarn": (
        *("attention=mla", "mlp=moe", "model.qk_norm=false", "attention.qk_bias=false", "attention.q_lora_rank=24"),
        *("mlp.n_dense_layers=1", "attention.rope_layout=interleaved", "mlp.n_groups=2"),
        *("attention.rope_scaling=yarn", "attention.rope_factor=4"),
    ),
    "gpt2": ("model=classic_gpt", "model.n_layers=2", "model.d_model=64", "model.n_heads=4"),
    "gpt2 with few biases": ("attention=mha", "position=learned", "model.norm=layer", "model.qk_norm=false"),
}


def theirs(name: str, **changed: object) -> "transformers.PreTrainedModel":
    kind, more = THEIRS[name]
    shape = {name: SHAPE[name] for name in ENDS} if kind == "GPT2" else SHAPE
    config = getattr(transformers, f"{kind}Config")(**{**shape, **more, **changed})
    architecture = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    return spread_out(architecture(config).eval())


def save(model: "transformers.PreTrainedModel", folder: Path, **options: object) -> Path:
    """As published: with a tokenizer.json that is not of our making."""
    model.save_pretrained(folder, **options)
    content = ByteTokenizer().content()
    del content["model"][OURS]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def fallback_tokenizer(**changed: object) -> dict[str, object]:
    """The content of a tokenizer.json as of Llama 2: characters are tokens, and bytes where they are none."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = [{**replaced, "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    special = ["<unk>", "<s>", "</s>"]
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f"), ("▁", "▁"), ("▁▁", "▁▁"), ("é", "é"), ("e", "f"), ("(", "x")]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁defx()é語", *map("".join, merges)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": word, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, word in enumerate(special)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "model": {
            **{"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
            **{"vocab": {word: i for i, word in enumerate(words)}, "merges": [list(pair) for pair in merges]},
        },
        **changed,
    }


def ours(overrides: Sequence[str], vocab: int = VOCAB) -> TransformerLM:
    shape = () if "model=classic_gpt" in overrides else ("model=mini",)
    model = spread_out(initialised(composed_run(*shape, *overrides).model, vocab))
    for name, layout in model.layout().items():
        if layout.kind is Kind.TABLE and "position" not in name:
            model.get_parameter(name).data[vocab:] = 0
    return model
