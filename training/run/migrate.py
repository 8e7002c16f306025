"""Stored settings of older runs, in the terms of this program: the one place that knows old keys and old defaults.

What a run's config.yaml and the manifests of its checkpoints hold was written by the Headroom of its day. A key that it
lacks had no setting then, and the value below is how the program behaved. What is typed is never migrated.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

FORMAT = 3  # of config.yaml and manifest.json
DEEPEST = 32  # how far settings are nested at most; mixes within mixes are the deepest
UNSTATED = 2  # of those that say none: manifests called it their version, config.yaml said nothing

RUN_2 = {
    "autotune": False,
    "peak_flops": None,
    "profile_steps": 0,
    "log_attention": False,
    "checkpoint_activations": False,
    "dry_run": False,
    "eval_before": False,
}
MODEL_2 = {
    "position_embedding": "none",
    "dropout": 0.0,
    "norm": "rms",
    "bias": False,
    "logit_softcap": None,
    "zero_init": True,
}
ATTENTION_2 = {
    "position": "rope",
    "rope_scaling": "none",
    "rope_factor": None,
    "rope_original_context": None,
    "window": None,
    "dilation": 1,
    "global_tokens": 0,
    "random_blocks": 0.0,
    "block_size": 64,
    "pattern_seed": 0,
    "mask_diagonal": False,
    "dropout": 0.0,
    "qk_bias": False,
}
PARTS_2 = {  # by class
    "model.attention.gqa.GQAConfig": ATTENTION_2 | {"rope_dim": None},
    "model.attention.mla.MLAConfig": ATTENTION_2 | {"k_rope_from": "hidden", "qk_norm": "latent", "qk_norm_groups": 1},
    "model.attention.stack.StackConfig": {"position": "rope"},
    "model.mlp.GELUConfig": {"approximate": "none"},
    "training.optim.AdamWConfig": {"qk_clip": None},
    "training.muon.MuonConfig": {"qk_clip": None},
    "data.tokenizer.BPEConfig": {"cut": "line_ends"},
    "data.published.GPT2Config": {"cut": "words"},
    "data.published.CL100KConfig": {"cut": "words"},
    "data.published.O200KConfig": {"cut": "words"},
    "data.corpus.SympyCorpus": {"document_mask": False},
    "data.corpus.StdlibCorpus": {"document_mask": False},
    "data.corpus.SyntheticCorpus": {"document_mask": False},
    "data.files.FilesCorpus": {"document_mask": False, "held_out_by": "index", "reading": 2},
    "data.hub.HubCorpus": {"document_mask": False, "held_out_by": "index"},
    "data.mix.MixCorpus": {"document_mask": False},
}
ATTENTIONS_2 = ("model.attention.gqa.GQAConfig", "model.attention.mla.MLAConfig")  # whose ALiBi was geometric


MOVED_4 = {  # classes, to where they are now
    "data.corpus.SympyCorpus": "data.sources.python_source.SympyCorpus",
    "data.corpus.StdlibCorpus": "data.sources.python_source.StdlibCorpus",
    "data.corpus.SyntheticCorpus": "data.sources.synthetic.SyntheticCorpus",
    "data.files.FilesCorpus": "data.sources.files.FilesCorpus",
    "data.hub.HubCorpus": "data.sources.hub.HubCorpus",
    "data.mix.MixCorpus": "data.sources.mix.MixCorpus",
    "data.tokenizer.ByteConfig": "data.tokenizers.byte.ByteConfig",
    "data.tokenizer.BPEConfig": "data.tokenizers.bpe.BPEConfig",
    "data.tokenizer.StoredConfig": "data.tokenizers.load.StoredConfig",
    "data.published.GPT2Config": "data.tokenizers.tiktoken_files.GPT2Config",
    "data.published.CL100KConfig": "data.tokenizers.tiktoken_files.CL100KConfig",
    "training.optim.AdamWConfig": "training.optim.adamw.AdamWConfig",
    "training.muon.MuonConfig": "training.optim.muon.MuonConfig",
    "training.schedule.Cosine": "training.optim.schedule.Cosine",
    "training.schedule.Linear": "training.optim.schedule.Linear",
    "training.schedule.WSD": "training.optim.schedule.WSD",
    "training.log.NoLogger": "training.loggers.base.NoLogger",
    "training.log.WandbLogger": "training.loggers.wandb.WandbLogger",
    "training.log.TensorboardLogger": "training.loggers.tensorboard.TensorboardLogger",
    "data.published.O200KConfig": "data.tokenizers.tiktoken_files.O200KConfig",
}


def migrate(tree: Mapping[str, Any], format: int) -> dict[str, Any]:
    """A run's stored settings, as written in `format`, as this program writes them. What is not of the form that was
    written then is left for the border to refuse. Raises ValueError for what is nested too deeply for any code to walk
    through."""
    tree = dict(tree)
    _refuse_deep(tree)
    if format < 3:
        tree = _each_part(RUN_2 | tree, _to_3)
        if isinstance(tree.get("model"), Mapping):
            tree["model"] = MODEL_2 | tree["model"]
    if format <= 3:
        tree = _each_part(tree, _moved)
    return tree


def stated_format(content: dict[str, Any]) -> Any:
    """Takes out of what a config.yaml or a manifest holds the format that it says, which may be none that there is."""
    return content.pop("format" if "format" in content else "version", UNSTATED)


def _refuse_deep(tree: Any) -> None:
    level = [tree]
    for _ in range(DEEPEST):
        level = [value for node in level if isinstance(node, Mapping | list | tuple) for value in _within(node)]
    if level:
        raise ValueError("it is nested too deeply")


def _within(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, Mapping) else node


def _to_3(part: dict[str, Any]) -> dict[str, Any]:
    target = part.get("_target_")
    if not isinstance(target, str):
        return part
    old = PARTS_2.get(target, {}) | part
    if old.get("position") == "alibi" and target in ATTENTIONS_2:
        old = {"alibi_slopes": "geometric"} | old
    return old


def _moved(part: dict[str, Any]) -> dict[str, Any]:
    target = part.get("_target_")
    return {**part, "_target_": MOVED_4[target]} if isinstance(target, str) and target in MOVED_4 else part


def _each_part(tree: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The tree with every mapping in it changed, those within before those around them."""
    if not isinstance(tree, Mapping):
        return tree
    return change({key: _each_part(value, change) for key, value in tree.items()})
