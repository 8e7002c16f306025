"""A language model that Headroom trained, in plain PyTorch, for transformers 5:

    model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)

The file reads from top to bottom and needs nothing of the program that trained the model. It is written to be read: it
computes the same in float32, to rounding, and takes no shortcut. Shapes: B texts, T tokens given, S tokens seen (those
cached, and these), H query heads, G key and value heads, D the width of a head, d that of the residual stream.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# What this release of transformers calls the KV cache:
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Arguments that `forward` is given by some releases: the cache, by both its names, and what changes nothing here.
KNOWN = {"cache", "past_key_values", "cache_position", "return_dict", "num_items_in_batch"}
Settings = dict[str, Any]  # of one attention, or of the MLP, by the names that they have in training


class HeadroomConfig(PretrainedConfig):
    """config.json. Layer i has the attention number i % len(attention)."""

    model_type = "headroom"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "context_length",
    }
    vocab_size: int = 0
    d_model: int = 0
    n_layers: int = 0
    n_heads: int = 0
    context_length: int = 0
    position_embedding: str = "none"  # none | learned | sinusoidal
    norm: str = "rms"  # rms | layer: of the residual stream
    norm_eps: float = 1e-6
    bias: bool = False  # of every linear layer of attention, and of LayerNorm
    logit_softcap: float | None = None
    tie_word_embeddings: bool = True
    attention: Any = ()  # a list of Settings
    mlp: Any = None  # Settings


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + eps), in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        return (exact * (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


def group_normed(x: Tensor, groups: int) -> Tensor:
    """x (B, T, H, D), the heads of each group divided by their common root mean square."""
    exact = x.float().unflatten(2, (groups, -1))  # (B, T, groups, H / groups, D)
    inverse = (exact.square().mean((-2, -1), keepdim=True) + 1e-6).rsqrt()
    return (exact * inverse).flatten(2, 3).to(x.dtype)


class GroupedRMSNorm(nn.Module):
    """group_normed, times a weight that all heads share."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (group_normed(x, self.groups) * self.weight).to(x.dtype)


def residual_norm(config: HeadroomConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, config.norm_eps)


def rope_frequencies(s: Settings, dim: int, device: torch.device) -> Tensor:
    """Radians per position of each pair of coordinates, (dim / 2,). Scalings let a model read `rope_factor` times the
    context that it was trained on, by turning the pairs slower."""
    scaling, factor, theta, context = s["rope_scaling"], s["rope_factor"], s["rope_theta"], s["rope_original_context"]
    if scaling == "ntk":  # the fastest pair turns as before, the slowest factor times slower
        theta *= factor ** (dim / (dim - 2))
    frequencies = theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling in ("none", "ntk"):
        return frequencies
    slowed = torch.ones_like(frequencies)  # linear: all pairs; else 0 for the fast pairs, 1 for the slow ones
    if scaling == "llama3":  # by the turns of a pair in that context: from 4 down to 1
        slowed = ((4 - context * frequencies / (2 * math.pi)) / 3).clamp(0, 1)
    elif scaling == "yarn":  # by the number of the pair: from the one that turns 32 times to the one that turns once
        first, last = (dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        pairs = torch.arange(dim // 2, device=device, dtype=torch.float32)
        slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / factor * slowed + frequencies * (1 - slowed)


def rotated(x: Tensor, positions: Tensor, s: Settings, dim: int) -> Tensor:
    """Rotary position embedding: the first `dim` coordinates of x (B, T, H, D) rotate in pairs, by positions (B, T)."""
    if s["position"] != "rope":
        return x
    angles = positions[:, :, None, None].float() * rope_frequencies(s, dim, x.device)  # (B, T, 1, dim / 2)
    cos, sin, exact = angles.cos(), angles.sin(), x[..., :dim].float()
    if s["rope_layout"] == "half":  # pairs (i, i + dim / 2)
        a, b = exact.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:  # interleaved: pairs (2i, 2i + 1)
        a, b = exact[..., 0::2], exact[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), -1)


def alibi_slopes(heads: int, rule: str, device: torch.device) -> Tensor:
    """What ALiBi takes from a score per token of distance, (H,)."""
    i = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    if rule == "geometric":
        return torch.exp2(-8 / heads * i)
    n = 1 << (heads.bit_length() - 1)  # the power of two up to H; the heads beyond it have slopes in between
    return torch.exp2(-8 / n * torch.where(i <= n, i, i - n - 0.5))


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """(B, T) -> (B, T, d): sin and cos in turn, in float32."""
    pairs = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * 10000.0 ** (-pairs / dim)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim] * dim**-0.5


def visible(q_pos: Tensor, k_pos: Tensor, s: Settings) -> Tensor:
    """Which keys a query sees: positions (B, T) and (B, S) -> (B, T, S) bool. Padding has the position -1: no query
    sees it, and it sees everything itself, so that no softmax is over nothing."""
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    distance = q - k
    near = distance % s["dilation"] == 0  # within the window, every n-th key
    if s["window"] is not None:
        near = near & (distance < s["window"])
    seen = (distance >= 0) & (near | (k < s["global_tokens"]))
    if s["mask_diagonal"]:  # no token sees itself, but the first, which has no other
        seen = seen & ((distance != 0) | (q == 0))
    return (seen & (k >= 0)) | (q < 0)


class Attention(nn.Module):
    """softmax(scale · q kᵀ) v, and an output matrix. Subclasses have `project`, and the layers that it needs."""

    def __init__(self, config: HeadroomConfig, s: Settings, layer: int, key_dim: int):
        super().__init__()
        self.s = s
        self.layer = layer
        self.n_heads = config.n_heads
        yarn = s["rope_scaling"] == "yarn"
        self.scale = key_dim**-0.5 * ((0.1 * math.log(max(1.0, s["rope_factor"])) + 1) ** 2 if yarn else 1.0)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> queries (B, T, H, D), keys (B, T, G, D), values (B, T, G, Dv)."""
        raise NotImplementedError

    def forward(self, x: Tensor, q_pos: Tensor, k_pos: Tensor, cache: Any) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.project(x, q_pos))  # (B, heads, T, D)
        if cache is not None:  # all tokens are kept, even those that a window hides
            k, v = cache.update(k, v, self.layer)  # (B, G, S, D)
        k, v = (part.repeat_interleave(self.n_heads // part.shape[1], dim=1) for part in (k, v))
        scores = (q @ k.mT).float() * self.scale  # (B, H, T, S)
        if self.s["position"] == "alibi":
            slopes = alibi_slopes(self.n_heads, self.s["alibi_slopes"], x.device)
            scores = scores - slopes[:, None, None] * (q_pos[:, None, :, None] - k_pos[:, None, None, :])
        scores = scores.masked_fill(~visible(q_pos, k_pos, self.s)[:, None], float("-inf"))
        heads = scores.softmax(-1).to(v.dtype) @ v  # (B, H, T, Dv)
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class GroupedAttention(Attention):
    """Multi-head, grouped-query or multi-query attention, by the number of key and value heads."""

    def __init__(self, config: HeadroomConfig, s: Settings, layer: int):
        super().__init__(config, s, layer, s["head_dim"])
        q_width, kv_width = config.n_heads * s["head_dim"], s["n_kv_heads"] * s["head_dim"]
        # A bias on keys that are neither rotated nor normed is one that softmax ignores:
        k_bias = s["qk_bias"] and (s["position"] == "rope" or s["qk_norm"])
        self.q_proj = nn.Linear(config.d_model, q_width, config.bias or s["qk_bias"])
        self.k_proj = nn.Linear(config.d_model, kv_width, config.bias or k_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, s["v_bias"])
        self.q_norm = RMSNorm(s["head_dim"], s["norm_eps"]) if s["qk_norm"] else nn.Identity()
        self.k_norm = RMSNorm(s["head_dim"], s["norm_eps"]) if s["qk_norm"] else nn.Identity()
        self.o_proj = nn.Linear(q_width, config.d_model, config.bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).unflatten(-1, (-1, self.s["head_dim"])) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotated(self.q_norm(q), positions, self.s, self.s["rope_dim"])
        k = rotated(self.k_norm(k), positions, self.s, self.s["rope_dim"])
        return q, k, v


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one narrow latent per token,
    and one rotated key, which the heads share. Cached are the keys and values of all heads, which is simple; the
    program that trained the model caches the latent, which is small, and computes the same."""

    def __init__(self, config: HeadroomConfig, s: Settings, layer: int):
        d, heads, key = config.d_model, config.n_heads, s["qk_nope_head_dim"] + s["qk_rope_head_dim"]
        super().__init__(config, s, layer, key)
        self.nope, self.rope, self.rank = s["qk_nope_head_dim"], s["qk_rope_head_dim"], s["kv_lora_rank"]
        k_bias = s["qk_bias"] and self.rope > 0
        from_latent = s["k_rope_from"] == "latent"
        if s["q_lora_rank"]:
            down = nn.Linear(d, s["q_lora_rank"], config.bias)
            up = nn.Linear(s["q_lora_rank"], heads * key, s["qk_bias"])
            self.q_proj = nn.Sequential(OrderedDict(down=down, norm=RMSNorm(s["q_lora_rank"]), up=up))
        else:
            self.q_proj = nn.Linear(d, heads * key, s["qk_bias"])
        down_width = self.rank if from_latent else self.rank + self.rope
        self.kv_down = nn.Linear(d, down_width, config.bias or (k_bias and not from_latent))
        self.kv_norm = RMSNorm(self.rank)
        self.k_rope_proj = nn.Linear(self.rank, self.rope, k_bias) if from_latent else None
        self.kv_up = nn.Linear(self.rank, heads * (self.nope + s["v_head_dim"]), bias=False)
        self.o_proj = nn.Linear(heads * s["v_head_dim"], d, config.bias)
        of_heads, whole = s["qk_norm"] == "head", s["qk_norm"] == "whole"
        self.q_norm = RMSNorm(key) if whole else nn.Identity()
        self.q_nope_norm = RMSNorm(self.nope) if of_heads else nn.Identity()
        self.k_nope_norm = GroupedRMSNorm(self.nope, s["qk_norm_groups"]) if of_heads else nn.Identity()
        self.q_rope_norm = RMSNorm(self.rope) if of_heads and self.rope else nn.Identity()
        self.k_rope_norm = RMSNorm(self.rope) if of_heads and self.rope else nn.Identity()

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.n_heads
        q_nope, q_rope = self.q_norm(self.q_proj(x).unflatten(-1, (heads, -1))).split([self.nope, self.rope], -1)
        down = self.kv_down(x)
        latent, k_rope = self.kv_norm(down[..., : self.rank]), down[..., self.rank :]
        if self.k_rope_proj is not None:
            k_rope = self.k_rope_proj(latent)
        k_nope, v = self.kv_up(latent).unflatten(-1, (heads, -1)).split([self.nope, self.s["v_head_dim"]], -1)
        q_rope = rotated(self.q_rope_norm(q_rope), positions, self.s, self.rope)
        k_rope = rotated(self.k_rope_norm(k_rope[:, :, None]), positions, self.s, self.rope)  # (B, T, 1, r)
        q = torch.cat((self.q_nope_norm(q_nope), q_rope), -1)
        k = torch.cat((self.k_nope_norm(k_nope), k_rope.expand(-1, -1, heads, -1)), -1)
        return q, group_normed(k, self.s["qk_norm_groups"]) if self.s["qk_norm"] == "whole" else k, v


ATTENTIONS = {"gqa": GroupedAttention, "mla": LatentAttention}


class SwiGLU(nn.Module):
    """A gated MLP."""

    def __init__(self, d_model: int, d_ff: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """ReLU, squared ReLU or GELU between two matrices."""

    def __init__(self, d_model: int, s: Settings):
        super().__init__()
        self.s = s
        self.up_proj = nn.Linear(d_model, s["d_ff"], s["bias"])
        self.down_proj = nn.Linear(s["d_ff"], d_model, s["bias"])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        if self.s["kind"] == "gelu":
            return self.down_proj(F.gelu(hidden, approximate=self.s["approximate"]))
        return self.down_proj(F.relu(hidden) if self.s["kind"] == "relu" else F.relu(hidden).square())


class Router(nn.Module):
    """Which experts a token goes to, and with which weights. Chosen is by the scores plus a bias, mixed by the scores.
    With groups, only experts of the best groups can be chosen; a group is as good as its best two experts."""

    def __init__(self, d_model: int, s: Settings):
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(0.02 * torch.randn(s["n_experts"], d_model))
        self.register_buffer("selection_bias", torch.zeros(s["n_experts"]) if s["selection_bias"] else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d) -> experts and their weights, (N, k) each."""
        s = self.s
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if s["router"] == "softmax" else logits.sigmoid()  # (N, experts)
        choice = scores if self.selection_bias is None else scores + self.selection_bias
        if s["top_groups"] < s["n_groups"]:
            groups = choice.unflatten(1, (s["n_groups"], -1))
            value = groups.sort(-1, descending=True).values[..., :2].sum(-1)  # (N, groups)
            losers = value.argsort(dim=-1, descending=True, stable=True)[:, s["top_groups"] :]
            choice = groups.scatter(1, losers[..., None].expand(-1, -1, groups.shape[2]), -torch.inf).flatten(1)
        chosen = choice.argsort(dim=-1, descending=True, stable=True)[:, : s["top_k"]]
        weights = scores.gather(1, chosen)
        if s["renormalise"]:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return chosen, weights * s["scaling"]


class Experts(nn.Module):
    """SwiGLUs, one matrix of each expert in one tensor."""

    def __init__(self, d_model: int, s: Settings):
        super().__init__()
        self.gate_proj = nn.Parameter(0.02 * torch.randn(s["n_experts"], s["d_ff"], d_model))
        self.up_proj = nn.Parameter(0.02 * torch.randn(s["n_experts"], s["d_ff"], d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(s["n_experts"], d_model, s["d_ff"]))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)  # (N, d)
        for e, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)):
            rows, choice = (chosen == e).nonzero(as_tuple=True)  # the tokens that chose this expert
            hidden = F.silu(F.linear(x[rows], gate)) * F.linear(x[rows], up) * weights[rows, choice, None].to(x.dtype)
            y = y.index_add(0, rows, F.linear(hidden, down))
        return y


class MixtureOfExperts(nn.Module):
    """A few of many experts for each token, and a shared one for all."""

    def __init__(self, d_model: int, s: Settings):
        super().__init__()
        self.router = Router(d_model, s)
        self.experts = Experts(d_model, s)
        shared = s["n_shared_experts"] * s["d_ff"]
        self.shared = SwiGLU(d_model, shared, s["bias"]) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (N, d)
        y = self.experts(tokens, *self.router(tokens)).view_as(x)
        return y if self.shared is None else y + self.shared(x)


def mlp_of(config: HeadroomConfig, layer: int) -> nn.Module:
    s = config.mlp
    if s["kind"] == "swiglu":
        return SwiGLU(config.d_model, s["d_ff"], s["bias"])
    if s["kind"] != "moe":
        return PlainMLP(config.d_model, s)
    if layer < s["n_dense_layers"]:
        return SwiGLU(config.d_model, s["dense_d_ff"], s["bias"])
    return MixtureOfExperts(config.d_model, s)


class Block(nn.Module):
    def __init__(self, config: HeadroomConfig, layer: int):
        super().__init__()
        s = config.attention[layer % len(config.attention)]
        self.attention_norm = residual_norm(config)
        self.attention = ATTENTIONS[s["kind"]](config, s, layer)
        self.mlp_norm = residual_norm(config)
        self.mlp = mlp_of(config, layer)

    def forward(self, x: Tensor, q_pos: Tensor, k_pos: Tensor, cache: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), q_pos, k_pos, cache)
        return x + self.mlp(self.mlp_norm(x))


class HeadroomForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HeadroomConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 - where config.tie_word_embeddings is true
    _input_embed_layer = "embedding"
    _no_split_modules = ("Block",)

    def __init__(self, config: HeadroomConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.position_embedding == "learned"
        self.position_embedding = nn.Embedding(config.context_length, config.d_model) if learned else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = residual_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) -> logits (B, T, V). attention_mask: (B, S), 0 for padding; positions count from the first
        token that is none. labels: (B, T), each predicted from the tokens before it; -100 for none. more: KNOWN."""
        cache = more.get("past_key_values") if more.get("cache") is None else more["cache"]
        asked = {name for name, value in more.items() if value is not None and value is not False}
        if asked - KNOWN:
            raise TypeError(f"this model has no {', '.join(sorted(asked - KNOWN))}")
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        k_pos = self.positions(attention_mask, past + input_ids.shape[1])
        q_pos = k_pos[:, past:]
        x = self.embedded(input_ids, q_pos)
        for block in self.layers:
            x = block(x, q_pos, k_pos, cache)
        logits, cap = self.head(self.norm(x)), self.config.logit_softcap
        if cap is not None:
            logits = (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)
        loss = None
        if labels is not None:
            count = more.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=count)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def positions(self, attention_mask: Tensor | None, seen: int) -> Tensor:
        """Of all tokens seen, (B or 1, S); -1 for padding."""
        if attention_mask is None:
            return torch.arange(seen, device=self.embedding.weight.device)[None]
        if attention_mask.dim() != 2 or attention_mask.shape[1] != seen:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, and must be (texts, {seen}): the tokens "
                "cached and those given (of caches, transformers' dynamic one alone is known)"
            )
        real = attention_mask != 0
        return (real.long().cumsum(-1) - 1).masked_fill(~real, -1)

    def embedded(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens and positions (B, T) -> (B, T, d)."""
        x, positions = self.embedding(input_ids), positions.clamp(min=0)
        if self.position_embedding is not None:
            if positions.max() >= self.config.context_length:
                raise ValueError(f"the text is longer than the {self.config.context_length} positions that are learned")
            return x + self.position_embedding(positions)
        if self.config.position_embedding == "sinusoidal":
            return x + sinusoidal(positions, self.config.d_model).to(x.dtype)
        return x
