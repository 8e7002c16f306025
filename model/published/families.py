"""The families of published models that there are: GPT-2, Llama, Mistral, Qwen2 and 3, Apertus, GLM-4's experts, and
DeepSeek-V3."""

import math
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from model.dimensions import MAX_SIZE
from model.published.family import Content, Family, Key, Obstacle, Settings, check_kind
from model.rope import BETA_FAST, BETA_SLOW, FROM_CONTEXT, TURNS_FAST, TURNS_SLOW, Layout
from model.transformer import ModelConfig

ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
DECODER = {  # what all but GPT-2 have in common
    "model.position_embedding": ("none",),
    "model.norm": ("rms",),
    "model.logit_softcap": (None,),
    "attention.position": ("rope",),
    "attention.dilation": (1,),
    "attention.global_tokens": (0,),
    "attention.random_blocks": (0.0,),
    "attention.mask_diagonal": (False,),
    "attention.indexer.top_k": (None,),
}
GROUPED = DECODER | {"attention": ("gqa",)}
NO_WINDOW = {"attention.window": (None,)}
DECODER_KEYS = (
    Key("hidden_size", "model.d_model"),
    Key("num_hidden_layers", "model.n_layers"),
    Key("num_attention_heads", "model.n_heads"),
    Key("max_position_embeddings", "model.context_length"),
    Key("tie_word_embeddings", "model.tie_embeddings", False),
)
GROUPED_KEYS = (
    *DECODER_KEYS,
    Key("num_key_value_heads", "attention.n_kv_heads", None),
    Key("head_dim", "attention.head_dim", None),
)
DENSE_KEYS = (*GROUPED_KEYS, Key("intermediate_size", "mlp.d_ff"), Key("rms_norm_eps", "model.norm_eps", 1e-6))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*QKV, "self_attn.o_proj")
LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
OF_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OF_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2", "ln_f")
ACTIVATIONS = {"relu": ("relu", None), "relu2": ("relu2", None), "gelu": ("gelu", "none")}
ACTIVATIONS |= {"gelu_new": ("gelu", "tanh"), "gelu_pytorch_tanh": ("gelu", "tanh")}
EXPERT_KEYS = (  # whose defaults differ between the families that have them
    Key("n_routed_experts", "mlp.n_experts"),
    Key("num_experts_per_tok", "mlp.top_k"),
    Key("n_shared_experts", "mlp.n_shared_experts"),
    Key("moe_intermediate_size", "mlp.d_ff"),
    Key("intermediate_size", "mlp.dense_d_ff"),
    Key("first_k_dense_replace", "mlp.n_dense_layers"),
    Key("n_group", "mlp.n_groups"),
    Key("topk_group", "mlp.top_groups"),
    Key("norm_topk_prob", "mlp.renormalise"),
    Key("routed_scaling_factor", "mlp.scaling"),
)


def rope_keys(settings: Settings) -> dict[str, Any]:
    """Scaled positions, as transformers spells them now and before its version 5."""
    theta, factor = settings["attention.rope_theta"], settings["attention.rope_factor"]
    scaling, dim = settings["attention.rope_scaling"], _rotated(settings)
    if scaling == "ntk":  # another base, and nothing else
        theta, scaling = theta * factor ** (dim / (dim - 2)), "none"
    if scaling == "none":
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    scaled = {"rope_type": scaling, "factor": factor, "rope_theta": theta}
    if scaling in FROM_CONTEXT:
        scaled["original_max_position_embeddings"] = settings["attention.rope_original_context"]
    if scaling == "yarn" and settings["attention"] == "mla":
        scaled |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if scaling == "llama3":
        scaled |= {"low_freq_factor": float(TURNS_SLOW), "high_freq_factor": float(TURNS_FAST)}
    return {"rope_theta": theta, "rope_parameters": scaled, "rope_scaling": scaled}


def _rotated(settings: Settings) -> int:
    return settings["attention.qk_rope_head_dim" if settings["attention"] == "mla" else "attention.rope_dim"]


def stated_rope(content: Content) -> Content:
    """What a config.json says of positions, in either spelling. Raises UserError where two say different things."""
    spelled = [content[name] for name in ("rope_parameters", "rope_scaling") if content.get(name)]
    for stated in spelled:
        if not isinstance(stated, Mapping):
            raise UserError(f"rope_parameters={str(stated)[:80]} are no parameters")
    stated = dict(spelled[0]) if spelled else {}
    without_theta = [{name: value for name, value in one.items() if name not in FREE} for one in spelled]
    if len(spelled) == 2 and without_theta[0] != without_theta[1]:
        raise UserError("rope_parameters and rope_scaling say different things: remove the one that is not meant")
    stated.setdefault("rope_type", stated.pop("type", "default"))
    for name, value in stated.items():
        if name in PARAMETERS:
            check_kind(name, value)
    return stated


FREE = ("rope_theta", "partial_rotary_factor")  # parameters beside those of a scaling
# What the parameters of a scaling must be; those of FROM_CONTEXT have the context that was trained on besides.
OF_SCALING = {
    "linear": {},
    "yarn": {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW, "truncate": True, "attention_factor": None},
    "llama3": {"low_freq_factor": TURNS_SLOW, "high_freq_factor": TURNS_FAST},
}
OF_LATENT_YARN = {"mscale": 1.0, "mscale_all_dim": 1.0}  # with these it is the scale that ours is
PARAMETERS = {"rope_type", "factor", "original_max_position_embeddings", *FREE, *OF_LATENT_YARN}.union(
    *OF_SCALING.values()
)


def rope_settings(content: Content, theta: float = 10000.0) -> Settings:
    """theta: where nothing states it. Raises UserError for a scaling that is not ours."""
    stated = stated_rope(content)
    kind = stated.pop("rope_type")
    thetas = {float(one["rope_theta"]) for one in (stated, content) if one.get("rope_theta") is not None} or {theta}
    if len(thetas) > 1:
        raise UserError(f"rope_theta is {' and '.join(map(str, sorted(thetas)))}: remove the one that is not meant")
    found: Settings = {"attention.rope_theta": thetas.pop()}
    stated = {name: value for name, value in stated.items() if name not in FREE}
    if kind == "default" and not stated:
        return found
    if kind not in OF_SCALING:
        raise UserError(
            f"rope_type={kind}: positions can be scaled by {', '.join(OF_SCALING)}, or not at all (default)"
        )
    factor, original = stated.pop("factor", None), stated.pop("original_max_position_embeddings", None)
    if factor is None or (original is None and kind in FROM_CONTEXT):
        raise UserError(f"rope_type={kind} without its factor, or without original_max_position_embeddings")
    latent_yarn = kind == "yarn" and content["model_type"] == "deepseek_v3"
    _check_scaling(kind, stated, OF_LATENT_YARN if latent_yarn else {})
    found |= {"attention.rope_scaling": kind, "attention.rope_factor": float(factor)}
    return found | ({"attention.rope_original_context": original} if kind in FROM_CONTEXT else {})


def _check_scaling(kind: str, stated: Content, needed: Content) -> None:
    """Raise UserError where further parameters of a scaling are not what they must be; `needed` have to be there."""
    usual = OF_SCALING[kind] | needed
    for name in {**stated, **needed}:
        if name not in usual or stated.get(name, ...) != usual[name]:
            must = f"{name}={usual[name]}" if name in usual else "it left out"
            raise UserError(f"rope_type={kind} with {name}={stated.get(name, 'unset')}: only {must} is known")


def grouped_settings(content: Content, *, biased: bool, qk_norm: bool) -> Settings:
    """Of attention with queries, keys and values of heads. biased: whether these three have biases."""
    heads, kv_heads = content["num_attention_heads"], content.get("num_key_value_heads")
    if kv_heads is None and content["model_type"] not in ("llama", "apertus"):  # in which it is the number of heads
        raise UserError("there is no num_key_value_heads")
    return {
        "attention.n_kv_heads": heads if kv_heads is None else kv_heads,
        "attention.head_dim": content.get("head_dim") or content["hidden_size"] // heads,
        "attention.qk_norm": qk_norm,
        "attention.qk_bias": biased,
        "attention.v_bias": biased,
        **rope_settings(content),
    }


def _activation(content: Content, name: str = "hidden_act") -> Settings:
    """The MLP of two matrices with an activation. Raises UserError for one that is not ours."""
    stated = content.get(name)
    if stated not in ACTIVATIONS:
        raise UserError(f"{name}={stated}: this model's MLP can have {', '.join(ACTIVATIONS)}")
    mlp, approximate = ACTIVATIONS[stated]
    return {"mlp": mlp} | ({} if approximate is None else {"mlp.approximate": approximate})


def _activation_key(settings: Settings) -> str:
    wanted = settings["mlp"], settings.get("mlp.approximate")
    return next(name for name, found in ACTIVATIONS.items() if found == wanted)


def _silu(content: Content) -> None:
    if content.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={content['hidden_act']}: this model's MLP can have silu alone")


def _has_biases(settings: Settings) -> bool:
    return settings["model.bias"] or settings["attention.qk_bias"] or settings.get("attention.v_bias", False)


def _same_rope_everywhere(settings: Settings) -> Obstacle | None:
    rotated = settings["attention.rope_dim"]
    return None if rotated == settings["attention.head_dim"] else Obstacle("attention.rope_dim", rotated, None)


def _llama_settings(content: Content) -> Settings:
    _silu(content)
    biased = bool(content.get("attention_bias"))
    if content.get("pretraining_tp", 1) != 1:
        raise UserError(f"pretraining_tp={content['pretraining_tp']}: only 1 is known")
    grouped = grouped_settings(content, biased=biased, qk_norm=False)
    return {"model.bias": biased, "mlp.bias": bool(content.get("mlp_bias")), **grouped}


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    GROUPED | NO_WINDOW | {"attention.qk_norm": (False,), "mlp": ("swiglu",)},
    DENSE_KEYS,
    lambda s: {"attention_bias": _has_biases(s), "mlp_bias": s["mlp.bias"], "hidden_act": "silu", **rope_keys(s)},
    _llama_settings,
    ROPE | {"attention_bias", "mlp_bias", "hidden_act", "pretraining_tp"},
    lambda content: (*(QKVO if content.get("attention_bias") else ()), *(OF_MLP if content.get("mlp_bias") else ())),
    fits=_same_rope_everywhere,
)


def _mistral_settings(content: Content) -> Settings:
    _silu(content)
    window = content.get("sliding_window", 4096)
    return {
        "model.bias": False,
        "attention.window": window,
        **grouped_settings(content, biased=False, qk_norm=False),
    }


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    GROUPED
    | {"attention.qk_norm": (False,), "attention.qk_bias": (False,), "attention.v_bias": (False,), "mlp": ("swiglu",)},
    DENSE_KEYS,
    lambda s: {"sliding_window": s["attention.window"], "hidden_act": "silu", **rope_keys(s)},
    _mistral_settings,
    ROPE | {"sliding_window", "hidden_act"},
    lambda content: (),
    fits=_same_rope_everywhere,
)


FULL, SLIDING = "full_attention", "sliding_attention"


def _window_keys(settings: Settings) -> dict[str, Any]:
    """Qwen's: of layers from max_window_layers on, or of those that layer_types says."""
    windows = settings["attention.windows"]
    window = next((one for one in windows if one is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": len(windows) if window is None else windows.index(window),
        "layer_types": [FULL if one is None else SLIDING for one in windows],
    }


WINDOW = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
STACKED = {"attention": ("gqa", "stack")}  # of layers that differ in their window alone


def _windows_fit(settings: Settings) -> Obstacle | None:
    windows = settings["attention.windows"]
    if windows is None:
        return Obstacle("attention", "stack", "gqa")
    sizes = sorted({*windows} - {None})
    if len(sizes) > 1:
        return Obstacle("attention.window", " and ".join(map(str, sizes)), sizes[0])
    return _same_rope_everywhere(settings)


def _window_settings(content: Content) -> Settings:
    """Of a stack, `attention.windows` of each layer. Raises UserError where not every layer has one that is known."""
    layers, window = content["num_hidden_layers"], content.get("sliding_window", 4096)
    kinds, first = content.get("layer_types"), content.get("max_window_layers", 28)
    if type(layers) is not int or not 1 <= layers <= MAX_SIZE:
        raise UserError(f"num_hidden_layers={layers}: 1 to {MAX_SIZE:,} is what it can be")
    if kinds is not None:
        _check_layer_types(kinds, layers)
    if not content.get("use_sliding_window") or window is None:
        return {"attention": "gqa", "attention.window": None}
    if kinds is None:
        if type(first) is not int:
            raise UserError(f"max_window_layers={str(first)[:80]} is no number of layers")
        kinds = [FULL if i < first else SLIDING for i in range(layers)]
    windows = tuple(window if kind == SLIDING else None for kind in kinds)
    if len({*kinds}) == 1:
        return {"attention": "gqa", "attention.window": windows[0]}
    return {"attention": "stack", "attention.windows": windows}


def _check_layer_types(kinds: Any, layers: int) -> None:
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"layer_types={str(kinds)[:80]}: {layers} of them are needed, one for each layer")
    unknown = next((kind for kind in kinds if kind not in (FULL, SLIDING)), None)
    if unknown is not None:
        raise UserError(f"layer_types with {str(unknown)[:80]}: {FULL} and {SLIDING} are known")


def _qwen2_settings(content: Content) -> Settings:
    _silu(content)
    grouped = grouped_settings(content, biased=True, qk_norm=False)
    return {"model.bias": False, **grouped, **_window_settings(content)}


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    GROUPED | STACKED | {"attention.qk_norm": (False,), "mlp": ("swiglu",)},
    DENSE_KEYS,
    lambda s: {"hidden_act": "silu", **_window_keys(s), **rope_keys(s)},
    _qwen2_settings,
    ROPE | WINDOW | {"hidden_act"},
    lambda content: QKV,
    fits=_windows_fit,
)


def _qwen3_settings(content: Content) -> Settings:
    _silu(content)
    biased = bool(content.get("attention_bias"))
    content = {"head_dim": 128, **content}
    grouped = grouped_settings(content, biased=biased, qk_norm=True)
    return {"model.bias": biased, "mlp.bias": False, **grouped, **_window_settings(content)}


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    GROUPED | STACKED | {"attention.qk_norm": (True,), "mlp": ("swiglu",)},
    DENSE_KEYS,
    lambda s: {"attention_bias": _has_biases(s), "hidden_act": "silu", **_window_keys(s), **rope_keys(s)},
    _qwen3_settings,
    ROPE | WINDOW | {"attention_bias", "hidden_act"},
    lambda content: QKVO if content.get("attention_bias") else (),
    fits=_windows_fit,
)


def _apertus_settings(content: Content) -> Settings:
    biased = bool(content.get("attention_bias"))
    if not (content.get("rope_parameters") or content.get("rope_scaling")):
        raise UserError("there is no rope_parameters, without which versions of transformers differ")
    grouped = grouped_settings(content, biased=biased, qk_norm=True)
    return {"model.bias": biased, "mlp.bias": False, **_activation(content), **grouped}


APERTUS = Family(
    "apertus",
    "ApertusForCausalLM",
    GROUPED | NO_WINDOW | {"attention.qk_norm": (True,), "mlp": ("relu2", "relu", "gelu")},
    (*DENSE_KEYS[:-1], Key("rms_norm_eps", "model.norm_eps", 1e-5)),
    lambda s: {"attention_bias": _has_biases(s), "hidden_act": _activation_key(s), **rope_keys(s)},
    _apertus_settings,
    ROPE | {"attention_bias", "hidden_act"},
    lambda content: QKVO if content.get("attention_bias") else (),
    renamed={"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"},
    fits=_same_rope_everywhere,
)


def _expert_settings(content: Content) -> Settings:
    """The bias by which experts are chosen moves on where it is trained."""
    if content["n_routed_experts"] < 2 * content.get("n_group", 1):
        raise UserError("a group of fewer than two experts is not known")
    every = content["num_experts_per_tok"] == content["n_routed_experts"]
    return {"mlp": "moe", "mlp.router": "sigmoid", "mlp.bias_rate": 0.0 if every else 0.001}


def _glm_fits(settings: Settings) -> Obstacle | None:
    """Its yarn scales the products of what rotates, ours those of whole heads."""
    partial = _same_rope_everywhere(settings) if settings["attention.rope_scaling"] == "yarn" else None
    return partial or _experts_fit(settings)


def _experts_fit(settings: Settings) -> Obstacle | None:
    """A group is as good as its two best experts; there is a shared one."""
    groups, shared = settings["mlp.n_groups"], settings["mlp.n_shared_experts"]
    if settings["mlp.n_experts"] < 2 * groups:
        return Obstacle("mlp.n_groups", groups, 1)
    return Obstacle("mlp.n_shared_experts", shared, 1) if shared == 0 else None


def _share(part: int, whole: int) -> float:
    """A factor f with int(whole * f) = part, which part / whole is not always."""
    found = part / whole
    return found if int(whole * found) == part else math.nextafter(found, 2.0)


def _glm_keys(settings: Settings) -> dict[str, Any]:
    rope, partial = rope_keys(settings), _share(settings["attention.rope_dim"], settings["attention.head_dim"])
    rope["rope_parameters"]["partial_rotary_factor"] = partial
    return {
        "attention_bias": _has_biases(settings),
        "use_qk_norm": settings["attention.qk_norm"],
        "hidden_act": "silu",
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": partial,
        **rope,
    }


def _glm_settings(content: Content) -> Settings:
    _silu(content)
    biased = bool(content.get("attention_bias"))
    grouped = grouped_settings(content, biased=biased, qk_norm=bool(content.get("use_qk_norm")))
    partial = stated_rope(content).get("partial_rotary_factor") or content.get("partial_rotary_factor", 0.5)
    grouped["attention.rope_dim"] = int(grouped["attention.head_dim"] * partial)
    return {"model.bias": False, **_expert_settings(content), **grouped}


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    GROUPED | NO_WINDOW | {"mlp": ("moe",), "mlp.router": ("sigmoid",)},
    (*GROUPED_KEYS, *EXPERT_KEYS, Key("rms_norm_eps", "model.norm_eps", 1e-5)),
    _glm_keys,
    _glm_settings,
    ROPE | {"attention_bias", "use_qk_norm", "hidden_act", "partial_rotary_factor"},
    lambda content: QKV if content.get("attention_bias") else (),
    fits=_glm_fits,
)


def _deepseek_keys(settings: Settings) -> dict[str, Any]:
    layers, moe = settings["model.n_layers"], settings["mlp"] == "moe"
    dense = {"intermediate_size": settings["mlp.d_ff"], "first_k_dense_replace": layers}
    dense |= {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    return {
        **({key.name: settings[key.setting] for key in EXPERT_KEYS} if moe else dense),
        "num_key_value_heads": settings["model.n_heads"],
        "q_lora_rank": settings["attention.q_lora_rank"] or None,
        "rope_interleave": True,  # as published; vLLM and llama.cpp know no other way
        "scoring_func": "sigmoid",  # which they ask for, and transformers does not
        "topk_method": "noaux_tc",
        "attention_bias": _has_biases(settings),
        "hidden_act": "relu" if settings["mlp"] == "relu2" else "silu",
        "num_nextn_predict_layers": 0,
        **rope_keys(settings),
    }


def _deepseek_pairs(content: Content) -> Layout:
    return "interleaved" if content.get("rope_interleave", True) else "half"


def _deepseek_settings(content: Content) -> Settings:
    for name, value in {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}.items():
        if content.get(name, value) != value:
            raise UserError(f"{name}={content[name]}: only {value} is known")
    dense = content.get("first_k_dense_replace", 3) >= content["num_hidden_layers"]
    activation = content.get("hidden_act", "silu")
    if activation != "silu" and not (activation == "relu" and dense):
        raise UserError(f"hidden_act={activation}: silu is known, and relu of a model without experts")
    plain = {"mlp": "relu2" if activation == "relu" else "swiglu", "mlp.d_ff": content.get("intermediate_size")}
    experts = {key.setting: content.get(key.name, key.default) for key in EXPERT_KEYS}
    if not dense and ... in experts.values():
        raise UserError(f"its experts are not described whole: it needs {', '.join(key.name for key in EXPERT_KEYS)}")
    biased = bool(content.get("attention_bias"))
    return {
        **(plain if dense else experts | _expert_settings(content)),
        "model.bias": biased,
        "mlp.bias": False,
        "attention.q_lora_rank": content.get("q_lora_rank", 1536) or 0,
        "attention.rope_layout": _deepseek_pairs(content),
        **rope_settings(content),
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    DECODER
    | NO_WINDOW
    | {
        "attention": ("mla",),
        "attention.qk_norm": ("latent",),
        "attention.k_rope_from": ("hidden",),
        "attention.qk_bias": (False,),
        "mlp": ("swiglu", "relu2", "moe"),
        "mlp.router": ("sigmoid",),
    },
    (
        *DECODER_KEYS,
        Key("rms_norm_eps", "model.norm_eps", 1e-6),
        Key("kv_lora_rank", "attention.kv_lora_rank", 512),
        Key("qk_nope_head_dim", "attention.qk_nope_head_dim", 128),
        Key("qk_rope_head_dim", "attention.qk_rope_head_dim", 64),
        Key("v_head_dim", "attention.v_head_dim", 128),
    ),
    _deepseek_keys,
    _deepseek_settings,
    ROPE
    | {key.name for key in EXPERT_KEYS}
    | {
        "q_lora_rank",
        "rope_interleave",
        "attention_bias",
        "hidden_act",
        "num_key_value_heads",
        "head_dim",
        "qk_head_dim",
    }
    | {"topk_method", "scoring_func", "moe_layer_freq", "pretraining_tp"},
    lambda content: LATENT if content.get("attention_bias") else (),
    pairs=_deepseek_pairs,
    gates=True,
    fits=lambda settings: _experts_fit(settings) if settings["mlp"] == "moe" else None,
)


def _gpt2_keys(settings: Settings) -> dict[str, Any]:
    return {
        "n_inner": settings["mlp.d_ff"],
        "activation_function": _activation_key(settings),
        "n_ctx": settings["model.context_length"],  # as llama.cpp reads it
    }


GPT2_USUAL = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
GPT2_USUAL |= {"add_cross_attention": False}


def _gpt2_settings(content: Content) -> Settings:
    for name, value in GPT2_USUAL.items():
        if content.get(name, value) is not value:
            raise UserError(f"{name}={content[name]}: only {value} is known")
    heads, width = content.get("n_head", 12), content.get("n_embd", 768)
    return {
        "model.bias": True,
        "attention.n_kv_heads": heads,
        "attention.head_dim": width // heads,
        "attention.qk_bias": True,
        "attention.v_bias": True,
        "mlp.d_ff": content.get("n_inner") or 4 * width,
        **_activation({"activation_function": "gelu_new", **content}, "activation_function"),
    }


def _gpt2_fits(settings: Settings) -> Obstacle | None:
    heads, kv_heads = settings["model.n_heads"], settings["attention.n_kv_heads"]
    if kv_heads != heads:
        return Obstacle("attention.n_kv_heads", kv_heads, "all")
    if settings["attention.head_dim"] * heads != settings["model.d_model"]:
        return Obstacle("attention.head_dim", settings["attention.head_dim"], None)
    return None


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    GROUPED
    | NO_WINDOW
    | {
        "model.position_embedding": ("learned",),
        "model.norm": ("layer",),
        "attention.position": ("none",),
        "attention.qk_norm": (False,),
        "mlp": ("gelu", "relu", "relu2"),
    },
    (
        Key("n_embd", "model.d_model", 768),
        Key("n_layer", "model.n_layers", 12),
        Key("n_head", "model.n_heads", 12),
        Key("n_positions", "model.context_length", 1024),
        Key("layer_norm_epsilon", "model.norm_eps", 1e-5),
        Key("tie_word_embeddings", "model.tie_embeddings", True),
    ),
    _gpt2_keys,
    _gpt2_settings,
    frozenset({"n_inner", "activation_function"}) | GPT2_USUAL.keys(),
    lambda content: OF_GPT2,
    names="gpt2",
    fits=_gpt2_fits,
)

FAMILIES = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, APERTUS, GLM4_MOE, DEEPSEEK_V3, GPT2)
}


def family_of(config: ModelConfig) -> Family:
    """The first family that can express a model. Raises UserError with what the nearest one lacks."""
    obstacles = {family: family.obstacles(config) for family in FAMILIES.values()}
    nearest = min(obstacles, key=lambda family: sum(map(_weight, obstacles[family])))
    if obstacles[nearest]:
        raise UserError(
            f"no family of transformers can express this model; the nearest, {nearest.model_type}, has no "
            f"{', no '.join(map(str, obstacles[nearest]))}"
        )
    return nearest


def _weight(obstacle: Obstacle) -> int:
    """Another attention or MLP is further away than another setting of one."""
    return 10 if obstacle.setting in ("attention", "mlp") else 1
