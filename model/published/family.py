"""A family of published models: which of our settings it can express, and how: config.json, and the names and forms of
tensors. A family is a table (model/published/families.py has them); export and import read the same one, so that what
was exported can be imported again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch

from common.errors import UserError
from model.attention.gqa import GQAConfig
from model.attention.mla import MLAConfig
from model.layout import Kind, ParamLayout
from model.mlp import GELUConfig, ReLU2Config, ReLUConfig, SwiGLUConfig
from model.moe import MoEConfig
from model.norm import LAYER_EPS, RMS_EPS
from model.published.tensors import Entry, Joined, Left, PerExpert, Same, Twice, Zeros
from model.rope import Layout
from model.transformer import ModelConfig, TransformerLM

Settings = dict[str, Any]  # values by their dotted names, as `attention.head_dim`; of `attention` and `mlp`, the choice
Content = Mapping[str, Any]  # of config.json
CHOICES = {GQAConfig: "gqa", MLAConfig: "mla"}
CHOICES |= {SwiGLUConfig: "swiglu", ReLUConfig: "relu", ReLU2Config: "relu2", GELUConfig: "gelu", MoEConfig: "moe"}
OF_MODEL = ("n_layers", "d_model", "n_heads", "context_length", "tie_embeddings", "position_embedding", "norm", "bias")
# Keys of config.json that say nothing of what a model computes, or only how it is trained.
WITHOUT_MEANING = """
_name_or_path architectures attention_dropout attn_pdrop aux_loss_alpha auto_map bos_token_id dtype embd_pdrop
eos_token_id ep_size initializer_range model_type n_ctx num_nextn_predict_layers output_router_logits pad_token_id
quantization_config resid_pdrop router_aux_loss_coef seq_aux summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj task_specific_params torch_dtype transformers_version use_cache
vocab_size
"""
MAX_WHOLE = 2**53  # in a config.json; what a model can have is less
# What a key can be, other than a number; of some of these, its family says more.
SWITCHES = {"attention_bias", "mlp_bias", "use_qk_norm", "rope_interleave", "use_sliding_window", "norm_topk_prob"}
SWITCHES |= {"tie_word_embeddings", "truncate"}
SWITCHES |= {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"}
WORDS = {"hidden_act", "activation_function", "scoring_func", "topk_method", "rope_type"}
OTHERS = {"rope_parameters", "rope_scaling", "layer_types"}


class Obstacle(NamedTuple):
    """A setting of a model that a family cannot express, and the one to choose instead."""

    setting: str
    value: Any
    instead: Any

    def __str__(self) -> str:
        return f"{self.setting}={typed(self.value)} ({self.setting}={typed(self.instead)})"


class Key(NamedTuple):
    """A key of config.json that is a setting of ours."""

    name: str
    setting: str
    default: Any = ...  # of transformers, where a config.json lacks the key; without one it must be there


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of model that transformers knows by its `model_type`."""

    model_type: str
    architecture: str
    # The values that it can express of a setting, the one to choose first; of settings that are not there, any:
    needs: Mapping[str, tuple[Any, ...]]
    keys: Sequence[Key]
    more: Callable[[Settings], dict[str, Any]]  # further keys of config.json
    read: Callable[[Content], Settings]  # what further keys say, and what is to be derived from several
    reads: frozenset[str]  # these keys
    biased: Callable[[Content], tuple[str, ...]]  # how the published names end of layers that have a bias
    names: Literal["llama", "gpt2"] = "llama"
    renamed: Mapping[str, str] = field(default_factory=dict)  # parts of names that differ from Llama's
    pairs: Callable[[Content], Layout] = lambda content: "half"  # which rows of its queries and keys rotate together
    gates: bool = False  # whether its MLP has a gate even where ours is relu2: relu(W x) · W x
    fits: Callable[[Settings], Obstacle | None] = lambda settings: None  # what else it cannot express

    def obstacles(self, config: ModelConfig) -> list[Obstacle]:
        """What it cannot express of a model."""
        settings = settings_of(config)
        found = [
            Obstacle(setting, settings[setting], allowed[0])
            for setting, allowed in self.needs.items()
            if setting in settings and settings[setting] not in allowed
        ]
        comparable = not {one.setting for one in found} & {"attention", "attention.position", "mlp"}
        further = self.fits(settings) if comparable else None
        return found if further is None else [*found, further]

    def config_json(self, config: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """The content of config.json of a model that it can express."""
        settings = settings_of(config)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            **{key.name: settings[key.setting] for key in self.keys if key.setting in settings},
            **self.more(settings),
        }

    def settings(self, content: Content) -> Settings:
        """Our settings of a config.json. Raises UserError for keys that are not known, or missing, and for what no
        setting of ours says."""
        known = {key.name for key in self.keys} | self.reads | set(WITHOUT_MEANING.split())
        for name in content:
            if name not in known:
                stated = f"{name}={str(content[name])[:80]}"
                raise UserError(f"{stated} is not known of {self.model_type}: remove it if it changes nothing")
        self._check_origin(content)
        named = {key.name for key in self.keys} | {"num_nextn_predict_layers"}
        for name in content.keys() & (self.reads | named) - OTHERS:
            check_kind(name, content[name])
        only = {setting: allowed[0] for setting, allowed in self.needs.items() if len(allowed) == 1}
        found: Settings = {setting: value for setting, value in only.items() if not setting.startswith("mlp.")}
        for key in self.keys:
            value = content.get(key.name, key.default)
            if value is ... or (value is None and key.default is not None):
                raise UserError(f"there is no {key.name}, without which no {self.model_type} can be built")
            found[key.setting] = value
        return found | self.read(content)

    def _check_origin(self, content: Content) -> None:
        """Raise UserError where code of its own, or another class, makes something else of these settings."""
        architectures = content.get("architectures") or [self.architecture]
        if architectures != [self.architecture]:
            raise UserError(f"architectures={str(architectures)[:80]}: only {self.architecture} is known")
        if content.get("auto_map") and self.model_type != "deepseek_v3":  # whose code became transformers'
            raise UserError(
                f"auto_map names code of its own, which is not run: remove it if this is a {self.model_type}"
            )

    def entries(self, model: TransformerLM, content: Content) -> list[Entry]:
        """Where each tensor of a model, which may be on the meta device, lies in the files beside its config.json."""
        settings, sizes = settings_of(model.config), {name: p.shape for name, p in model.named_parameters()}
        found: list[Entry] = []
        joined: dict[str, list[str]] = {}
        widths: dict[str, int] = {}  # rows of published matrices and norms
        for name, layout in model.layout().items():
            if name.startswith("mtp."):  # which no family that is known reads
                continue
            published = self.published_name(layout)
            is_bias = layout.kind is Kind.BIAS
            if published is None or (is_bias and not self._has(published, content)):
                found.append(Left(name, sizes[name]))
                continue
            if not is_bias:
                widths[published] = widths.get(published, 0) + sizes[name][0]
            if ".c_attn." in published:
                joined.setdefault(published, []).append(name)
            else:
                found.append(self._entry(name, published, layout, settings, self.pairs(content)))
        found += [_joined(published, joined, sizes) for published in joined]
        return found + self._chosen_by(model, content) + self._zeros(widths, content, found)

    def published_name(self, layout: ParamLayout) -> str | None:
        name = getattr(layout.published, self.names)
        for ours, theirs in self.renamed.items() if name else ():
            name = name.replace(ours, theirs)
        return name

    def _has(self, bias: str, content: Content) -> bool:
        return bias.removesuffix(".bias").endswith(self.biased(content))

    def _entry(self, name: str, published: str, layout: ParamLayout, settings: Settings, pairs: Layout) -> Entry:
        """pairs: which rows of the published matrices rotate together."""
        if layout.experts is not None:
            return PerExpert(name, published, layout.experts.count)
        if self.gates and settings["mlp"] == "relu2" and ".up_proj" in published:
            return Twice(name, published.replace("up_proj", "gate_proj"), published)
        rotated = rotated_rows(published, layout, settings)
        ours = settings["attention.rope_layout"]
        rows = None if rotated is None or ours == pairs else paired_otherwise(layout.rows, *rotated, ours)
        return Same(name, published, transposed=self.names == "gpt2" and layout.kind is Kind.MATRIX, rows=rows)

    def _chosen_by(self, model: TransformerLM, content: Content) -> list[Entry]:
        """The biases by which experts are chosen."""
        buffers = dict(model.named_buffers())
        found: list[Entry] = []
        for i, block in enumerate(model.layers):
            ours = f"layers.{i}.mlp.router.selection_bias"
            published = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
            if ours in buffers:
                found.append(Same(ours, published))
            elif hasattr(block.mlp, "router"):
                found.append(Zeros(published, (content["n_routed_experts"],)))
        return found

    def _zeros(self, widths: Mapping[str, int], content: Content, there: Sequence[Entry]) -> list[Entry]:
        """Biases that the published model has, and ours does not."""
        taken = {name for entry in there for name in entry.published}
        biases = {f"{name.removesuffix('weight')}bias": width for name, width in widths.items()}
        return [Zeros(n, (width,)) for n, width in biases.items() if n not in taken and self._has(n, content)]


def _joined(published: str, joined: Mapping[str, Sequence[str]], sizes: Mapping[str, Sequence[int]]) -> Joined:
    """joined: our names of each published one. Biases lie as their matrices do, zeros where ours has none."""
    kind = published.rpartition(".")[2]
    matrices = joined[f"{published.removesuffix(kind)}weight"]
    names = [name.removesuffix("weight") + kind for name in matrices]
    rows = [sizes[name][0] for name in matrices]
    return Joined([name if name in sizes else None for name in names], published, rows, transposed=kind == "weight")


def rotated_rows(published: str, layout: ParamLayout, settings: Settings) -> tuple[int, slice] | None:
    """Of a head of a matrix, bias or norm: its rows, and those of them that rotate; None where none do."""
    if settings["attention"] != "mla":
        rotates = published.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
        return (settings["attention.head_dim"], slice(settings["attention.rope_dim"])) if rotates else None
    head = sum(part.rows for part in layout.parts)
    last = layout.parts[-1]
    return (head, slice(head - last.rows, head)) if last.name in ("q_rope", "k_rope") else None


def paired_otherwise(rows: int, head_dim: int, rotated: slice, pairs: Layout) -> torch.Tensor:
    """(rows,) int64: the rows of heads, of which those `rotated` are pairs as `pairs` says, in the order of the other
    layout: neighbours, or coordinates i and i + n / 2 of n."""
    of_head = torch.arange(head_dim)
    of_head[rotated] = of_head[rotated].unflatten(0, (-1, 2) if pairs == "interleaved" else (2, -1)).mT.flatten()
    return (torch.arange(0, rows, head_dim)[:, None] + of_head).flatten()


def settings_of(config: ModelConfig) -> Settings:
    """The derived settings of a model that decide what it computes; of a stack, those of its first layer's attention,
    and `attention.windows` of each layer where all are GQA and differ in nothing else."""
    layers = [config.attention.of_layer(i) for i in range(config.n_layers)]
    alike = all(layer == layers[0] for layer in layers)
    but_windows = all(layer.model_copy(update={"window": layers[0].window}) == layers[0] for layer in layers)
    grouped = type(layers[0]) is GQAConfig
    attention, mlp = layers[0].model_dump(), config.mlp.model_dump()
    return {
        **{f"model.{name}": getattr(config, name) for name in (*OF_MODEL, "logit_softcap")},
        "model.norm_eps": config.norm_eps or (RMS_EPS if config.norm == "rms" else LAYER_EPS),
        "attention": CHOICES.get(type(layers[0]), type(layers[0]).__name__) if alike else "stack",
        "attention.indexer.top_k": attention.pop("indexer", {}).get("top_k"),
        **{f"attention.{name}": value for name, value in attention.items()},
        "attention.windows": tuple(layer.window for layer in layers) if grouped and but_windows else None,
        "mlp": CHOICES.get(type(config.mlp), type(config.mlp).__name__),
        **{f"mlp.{name}": value for name, value in mlp.items()},
    }


def check_kind(name: str, value: Any) -> None:
    """Raise UserError where the value of a key is neither null nor of its kind: a number, true or false, or a word."""
    stated = f"{name}={str(value)[:80]}"
    if value is None:
        return
    if name in SWITCHES:
        if type(value) is not bool:
            raise UserError(f"{stated}: true or false is what it can be")
    elif name in WORDS:
        if type(value) is not str:
            raise UserError(f"{stated} is no word")
    elif not (type(value) is int and abs(value) <= MAX_WHOLE) and not (type(value) is float and isfinite(value)):
        raise UserError(f"{stated} is no number, or too large a one")


def typed(value: Any) -> str:
    """A value as it is typed behind a setting."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
