"""A model with the code that computes it, modeling_headroom.py, for what no family of transformers expresses: tensors
have our names, and config.json has our settings."""

from pathlib import Path
from typing import Any

from common.errors import UserError, in_part
from interchange.form import Form
from model.attention.base import AttentionConfig
from model.attention.gqa import GQAConfig
from model.attention.stack import StackConfig
from model.norm import RMS_EPS
from model.published.family import CHOICES, settings_of, typed
from model.transformer import ModelConfig, TransformerLM

CODE = Path(__file__).with_name("modeling_headroom.py")
MODEL_TYPE = "headroom"
ARCHITECTURE = "HeadroomForCausalLM"
AUTO_MAP = {
    "AutoConfig": f"{CODE.stem}.HeadroomConfig",
    "AutoModelForCausalLM": f"{CODE.stem}.{ARCHITECTURE}",
}
OF_MODEL = ("n_layers", "d_model", "n_heads", "context_length", "position_embedding", "norm", "norm_eps", "bias")
# Settings that say how a model is trained, or how a computation is carried out, or that are refused:
NOT_OF_ATTENTION = {"dropout", "execution", "indexer", "random_blocks", "block_size", "pattern_seed"}
NOT_OF_MLP = {"bias_rate", "balance_loss", "router_z_loss"}


def with_code(model: TransformerLM) -> Form:
    """Raises UserError where the code cannot compute the model."""
    found = obstacles(model.config)
    if found:
        raise UserError(f"{CODE.name} cannot express this model: it has no {', no '.join(found)}")
    tensors = ((name, tensor) for name, tensor in model.state_dict().items() if not name.startswith("mtp."))
    return Form(MODEL_TYPE, ARCHITECTURE, config_json(model.config, model.vocab_size), tensors, CODE)


def obstacles(config: ModelConfig) -> list[str]:
    """What the code cannot compute of a model: the settings, and what to choose, as in `attention.random_blocks=0.5
    (attention.random_blocks=0)`."""
    attention = config.attention
    parts = attention.parts if isinstance(attention, StackConfig) else {}
    found = [in_part(f"attention.parts.{name}", one) for name, part in parts.items() for one in _obstacles_in(part)]
    if not parts:
        found = _obstacles_in(attention)
    if type(config.mlp) not in CHOICES:
        found.append(f"mlp of type {type(config.mlp).__name__} (mlp=swiglu)")
    return found


def _obstacles_in(attention: AttentionConfig) -> list[str]:
    if type(attention) not in CHOICES:
        return [f"attention of type {type(attention).__name__} (attention=gqa)"]
    found = []
    if attention.random_blocks:
        found.append(f"attention.random_blocks={typed(attention.random_blocks)} (attention.random_blocks=0)")
    if attention.has_indexer:
        found.append(f"attention.indexer.top_k={attention.indexer.top_k} (attention.indexer.top_k=null)")
    return found


def config_json(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The content of config.json. `attention` has one entry for each layer, as often as their pattern repeats."""
    settings = settings_of(config)
    layers = [_of_attention(config, config.attention.of_layer(i)) for i in range(config.n_layers)]
    period = next(n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)])
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "vocab_size": vocab_size,
        **{name: settings[f"model.{name}"] for name in OF_MODEL},
        "logit_softcap": config.logit_softcap,
        "tie_word_embeddings": config.tie_embeddings,
        "attention": layers[:period],
        "mlp": _of_mlp(config),
    }


def _of_attention(config: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    of_heads = {"norm_eps": config.norm_eps or RMS_EPS} if isinstance(attention, GQAConfig) else {}
    return {"kind": CHOICES[type(attention)], **attention.model_dump(exclude=NOT_OF_ATTENTION), **of_heads}


def _of_mlp(config: ModelConfig) -> dict[str, Any]:
    kind = CHOICES[type(config.mlp)]
    choice = {"selection_bias": config.mlp.bias_rate > 0} if kind == "moe" else {}
    return {"kind": kind, **config.mlp.model_dump(exclude=NOT_OF_MLP), **choice}
