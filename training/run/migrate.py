"""Migration of the stored settings of older runs: the one place that knows old keys, classes and defaults.

What a run's config.yaml and the manifests of its checkpoints hold was written by the Headroom of its day. A key that it
lacks had no setting then, and the value below is how the program behaved. What is typed is never migrated.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

FORMAT = 12  # of config.yaml and manifest.json
MAX_DEPTH = 32  # how far settings are nested at most; mixes within mixes are the deepest
UNSTATED = 2  # of files without the key: then manifests called it `version`, and config.yaml had none

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
ATTENTIONS_2 = ("model.attention.gqa.GQAConfig", "model.attention.mla.MLAConfig")  # their ALiBi was geometric

RUN_3 = {"threads": None}
RUN_RENAMED_4 = {"most_skipped": "max_skipped_updates", "checkpoint_activations": "activation_checkpointing"}
PART_RENAMED_4 = {"training.optim.muon.MuonConfig": {"logical_blocks": "per_head"}}  # by class
MODEL_4 = {"qk_norm": True, "qk_bias": True, "attention_dropout": 0.0}  # what conf/ set in each attention
CLASSIC_MODEL_4 = {"qk_norm": False, "qk_bias": False, "attention_dropout": 0.1}  # with model=classic_gpt
CLASSIC_GPT_4 = {"norm": "layer", "bias": True, "zero_init": False}  # by which that model is recognised
# Until 5 biases learned at the rate lr; until 7 there were no groups:
OPTIMIZERS_7 = ("training.optim.adamw.AdamWConfig", "training.optim.muon.MuonConfig")
MODEL_7 = {"own_logit_init": None}  # the last norm started at one
INDEXED_9 = ("model.attention.gqa.GQAConfig", "model.attention.mla.MLAConfig")
MODEL_10 = {"norm_eps": None}  # it was 1e-6 of rms, 1e-5 of layer
V_BIAS_10 = {"v_bias": None}  # of GQA: as model.bias
FILES_10 = {"prompt": None, "prompt_end": "\\n"}  # of data=files: no row had a prompt
MLPS_11 = (*(f"model.mlp.{kind}Config" for kind in ("SwiGLU", "ReLU", "ReLU2", "GELU")), "model.moe.MoEConfig")
BIAS_11 = {"bias": None}  # of an MLP: as model.bias
MODEL_8 = {"mtp_depth": 0, "mtp_weight": 0.3}  # there was no multi-token prediction
ONE_PROCESS_9 = {"parallel": {"_target_": "training.parallel.config.OneProcess"}}
NO_TILES_9, TILES_10 = {"tiles": False}, {"tiles": True}  # of kernel=auto
NO_INDEXER_8 = {"indexer": {"top_k": None, "n_heads": 4, "head_dim": None, "stage": "sparse", "weight": 1.0}}
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
    """Convert a run's stored settings from `format` to the one that this program writes. What is not of the form that
    was written then is left for the border to refuse. Raises ValueError for what is nested too deeply for any code to
    walk through."""
    tree = dict(tree)
    _check_depth(tree)
    if format < 3:
        tree = _each_part(RUN_2 | tree, _to_3)
        if isinstance(tree.get("model"), Mapping):
            tree["model"] = MODEL_2 | tree["model"]
    if format < 4:
        tree = _renamed(RUN_3 | _each_part(tree, _to_4), RUN_RENAMED_4)
    if format < 5 and isinstance(tree.get("model"), Mapping):
        classic = CLASSIC_GPT_4.items() <= tree["model"].items()
        tree["model"] = (CLASSIC_MODEL_4 if classic else MODEL_4) | tree["model"]
    if format < 6:
        tree = _each_part(tree, _to_6)
    if format < 7:
        tree = _to_7(tree)
    return _since_7(tree, format)


def _since_7(tree: dict[str, Any], format: int) -> dict[str, Any]:
    if format < 8:
        tree = _to_8(tree)
    if format < 9:
        tree = _to_9(tree)
    if format < 10:
        tree = ONE_PROCESS_9 | _each_part(tree, _without_tiles)
    if format < 11:
        tree = _to_11(tree)
    return _each_part(tree, _with_mlp_bias) if format < 12 else tree


def stated_format(content: dict[str, Any]) -> Any:
    """Pop the format from the content of a config.yaml or a manifest; it may be one that does not exist."""
    return content.pop("format" if "format" in content else "version", UNSTATED)


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH):
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
    if target in ATTENTIONS_2:
        old = {"alibi_slopes": "geometric" if old.get("position") == "alibi" else "published"} | old
    return old


def _to_4(part: dict[str, Any]) -> dict[str, Any]:
    target = part.get("_target_")
    if not isinstance(target, str):
        return part
    target = MOVED_4.get(target, target)
    return _renamed(part, PART_RENAMED_4.get(target, {})) | {"_target_": target}


def _to_6(part: dict[str, Any]) -> dict[str, Any]:
    return {"bias_lr": part["lr"]} | part if part.get("_target_") in OPTIMIZERS_7 and "lr" in part else part


def _to_7(tree: dict[str, Any]) -> dict[str, Any]:
    """Move the document mask from the corpus, where parts of a mix had one too, to the run."""
    data = tree.get("data")
    mask = {"document_mask": data["document_mask"]} if isinstance(data, Mapping) and "document_mask" in data else {}
    return mask | tree | ({"data": _each_part(data, _without_mask)} if mask else {})


def _to_8(tree: dict[str, Any]) -> dict[str, Any]:
    tree = _each_part(tree, _with_groups)
    model = tree.get("model")
    return tree | {"model": MODEL_7 | model} if isinstance(model, Mapping) else tree


def _to_9(tree: dict[str, Any]) -> dict[str, Any]:
    tree = _each_part(tree, _with_indexer)
    model = tree.get("model")
    return tree | {"model": MODEL_8 | model} if isinstance(model, Mapping) else tree


def _to_11(tree: dict[str, Any]) -> dict[str, Any]:
    for older in (_with_v_bias, _without_prompts, _with_tiles):
        tree = _each_part(tree, older)
    model = tree.get("model")
    return tree | {"model": MODEL_10 | model} if isinstance(model, Mapping) else tree


def _with_v_bias(part: dict[str, Any]) -> dict[str, Any]:
    return V_BIAS_10 | part if part.get("_target_") == "model.attention.gqa.GQAConfig" else part


def _with_mlp_bias(part: dict[str, Any]) -> dict[str, Any]:
    return BIAS_11 | part if part.get("_target_") in MLPS_11 else part


def _without_prompts(part: dict[str, Any]) -> dict[str, Any]:
    return FILES_10 | part if part.get("_target_") == "data.sources.files.FilesCorpus" else part


def _with_indexer(part: dict[str, Any]) -> dict[str, Any]:
    return NO_INDEXER_8 | part if part.get("_target_") in INDEXED_9 else part


def _without_tiles(part: dict[str, Any]) -> dict[str, Any]:
    return NO_TILES_9 | part if part.get("_target_") == "model.kernels.auto.Auto" else part


def _with_tiles(part: dict[str, Any]) -> dict[str, Any]:
    return TILES_10 | part if part.get("_target_") == "model.kernels.auto.Auto" else part


def _with_groups(part: dict[str, Any]) -> dict[str, Any]:
    return {"groups": []} | part if part.get("_target_") in OPTIMIZERS_7 else part


def _without_mask(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "document_mask"}


def _renamed(part: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys. Where the new one is there as well, it stays as it is."""
    return {names.get(key, key): value for key, value in part.items() if names.get(key) not in part}


def _each_part(tree: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Apply `change` to every mapping of the tree, inner ones first."""
    if not isinstance(tree, Mapping):
        return tree
    return change({key: _each_part(value, change) for key, value in tree.items()})
