"""Runs are exported: transformers opens them by itself, and they have the same logits there."""

import functools
import json
import re

import pytest
import torch
from safetensors import safe_open

from common.errors import UserError
from data.tokenizers.bpe import BPEConfig
from interchange import hf_folder
from interchange.hf_family import in_family
from model.published.families import FAMILIES, family_of
from tests.interchange.published import OURS_AS, THEIRS, VOCAB, ours, save, theirs, transformers
from tests.support import assert_one_line, call, composed_run, logits_of, relative_error, some_tokens, spread_out
from training.run.load import load_run
from training.run.published import load_published, look_at


def exported(model, folder, monkeypatch, form_of=in_family, **options):
    """The folder of a model that was trained by no run."""
    tokenizer = BPEConfig(vocab_size=VOCAB, train_bytes=2**16, cut="exact").train(["def f(x):\n    return x\n" * 50])
    tokenizer.tokens = tokenizer.tokens[: VOCAB - 1]
    monkeypatch.setattr(hf_folder, "load_run", lambda run, which: (model, tokenizer))
    monkeypatch.setattr(hf_folder, "card", lambda run, which, form, dtype: "")
    return hf_folder.export(folder / "run", folder / "out", form_of, **options)


@pytest.mark.parametrize("name", OURS_AS)
def test_exported_model_has_its_logits_in_transformers_and_here(name, tmp_path, monkeypatch):
    model = ours(OURS_AS[name])
    found = exported(model, tmp_path, monkeypatch)
    assert found.form.model_type == name.partition(" ")[0].partition(",")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = some_tokens(2, 40, VOCAB)
    with torch.no_grad():
        expected = logits_of(model, tokens)
        assert relative_error(theirs(tokens, use_cache=False).logits, expected) <= 1e-4
        assert relative_error(logits_of(load_run(f"hf:{tmp_path / 'out'}")[0], tokens), expected) <= 1e-5


@pytest.mark.parametrize("name", THEIRS)
def test_published_model_that_was_trained_fits_its_family_again(name, tmp_path, monkeypatch):
    """Whatever training moves has a place there: biases too, which begin at zero."""
    found = look_at(f"hf:{save(theirs(name), tmp_path / 'model')}")
    model = spread_out(load_published(found, found.run.model))
    exported(model, tmp_path, monkeypatch, functools.partial(in_family, name=found.family.model_type))
    tokens = some_tokens(2, 40, VOCAB)
    with torch.no_grad():
        again = logits_of(load_run(f"hf:{tmp_path / 'out'}")[0], tokens)
        assert relative_error(again, logits_of(model, tokens)) <= 1e-5


def test_exported_files_hold_at_most_so_many_bytes_and_lower_precision(tmp_path, monkeypatch):
    model = ours(["attention=gqa"])
    found = exported(model, tmp_path / "folders/made", monkeypatch, dtype="bf16", file_bytes=60_000)
    out = tmp_path / "folders/made/out"
    shards = [out / name for name in found.weights]
    assert len(shards) > 2 and all(shard.stat().st_size <= 70_000 for shard in shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight.bfloat16())


def test_module_of_multi_token_prediction_is_left_out_and_said(tmp_path, monkeypatch, caplog):
    model = ours(["attention=gqa", "model.mtp_depth=1"])
    exported(model, tmp_path, monkeypatch)
    assert "multi-token prediction is left out" in caplog.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = some_tokens(1, 20, VOCAB)
    with torch.no_grad():
        assert relative_error(theirs(tokens, use_cache=False).logits, logits_of(model, tokens)) <= 1e-4


# What vLLM 0.33 (vllm/model_executor/models) and llama.cpp's converter (as in llama-cpp-python 0.3.36) read of each
# family, by name, or ask for a value of; and the names of the weights that they load.
OF_DECODERS = """
architectures vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
rms_norm_eps max_position_embeddings rope_parameters tie_word_embeddings hidden_act=silu
"""
OF_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
OF_EXPERTS = """
n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size first_k_dense_replace n_group topk_group
norm_topk_prob routed_scaling_factor num_nextn_predict_layers=0
"""
NORMS = r"(input|post_attention)_layernorm\.weight"
MLP = r"mlp\.((shared_experts|experts\.\d+)\.)?(gate|up|down)_proj\.weight|mlp\.gate\.(weight|e_score_correction_bias)"
DENSE = ("attention=gqa", "mlp=swiglu", "model.qk_bias=false")
LATENT = ("attention=mla", "model.qk_norm=false", "model.qk_bias=false", "attention.q_lora_rank=24", "mlp=moe")
READ_ELSEWHERE = {  # by family: a model, the keys, and the names in a layer
    "llama": (
        (*DENSE[:2], "model.qk_norm=false", "model.bias=true"),
        f"{OF_DECODERS} head_dim attention_bias mlp_bias",
        rf"self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.(weight|bias)|{NORMS}",
    ),
    "mistral": (
        (*DENSE, "model.qk_norm=false", "attention.window=8"),
        f"{OF_DECODERS} head_dim sliding_window",
        rf"self_attn\.[qkvo]_proj\.weight|{MLP}|{NORMS}",
    ),
    "qwen2": (
        (*DENSE[:2], "model.qk_norm=false", "attention.window=8"),
        f"{OF_DECODERS} {OF_WINDOWS}",
        rf"self_attn\.[qkv]_proj\.(weight|bias)|self_attn\.o_proj\.weight|{MLP}|{NORMS}",
    ),
    "qwen3": (
        DENSE,
        f"{OF_DECODERS} {OF_WINDOWS} head_dim attention_bias",
        rf"self_attn\.([qkvo]_proj|[qk]_norm)\.weight|{MLP}|{NORMS}",
    ),
    "glm4_moe": (
        ("attention=gqa", "mlp=moe"),
        f"{OF_DECODERS} {OF_EXPERTS} head_dim attention_bias use_qk_norm partial_rotary_factor",
        rf"self_attn\.([qkvo]_proj|[qk]_norm)\.weight|self_attn\.[qkv]_proj\.bias|{MLP}|{NORMS}",
    ),
    "deepseek_v3": (
        LATENT,
        f"{OF_DECODERS} {OF_EXPERTS} q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "scoring_func=sigmoid topk_method=noaux_tc rope_interleave=True",
        rf"self_attn\.((q_a|q_b|kv_b|o)_proj|kv_a_proj_with_mqa|(q|kv)_a_layernorm)\.weight|{MLP}|{NORMS}",
    ),
    "gpt2": (
        OURS_AS["gpt2"],
        "architectures vocab_size n_ctx n_positions n_embd n_layer n_head n_inner layer_norm_epsilon "
        "activation_function tie_word_embeddings",
        r"(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))\.(weight|bias)",
    ),
}
OUTSIDE = r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|transformer\.(wte|wpe|ln_f)\.(weight|bias)"


@pytest.mark.parametrize("family", READ_ELSEWHERE)
def test_exported_folder_has_the_keys_and_names_that_other_tools_read(family, tmp_path, monkeypatch):
    overrides, keys, names = READ_ELSEWHERE[family]
    exported(ours(overrides), tmp_path, monkeypatch, functools.partial(in_family, name=family))
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key, _, value in (word.partition("=") for word in keys.split()):
        assert key in config
        assert value in ("", str(config[key])), key
    with safe_open(tmp_path / "out/model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            assert re.fullmatch(rf"(model\.layers|transformer\.h)\.\d+\.({names})|{OUTSIDE}", name), name
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|endoftext|>" and tokenizer["add_bos_token"] is False


REFUSED = {
    "softcap": (["model.logit_softcap=30"], "model.logit_softcap=30.0 (model.logit_softcap=null)"),
    "alibi": (["position=alibi"], "attention.position=alibi (attention.position=rope)"),
    "window of normed heads with squared relu": (["attention.window=8"], "attention.window=8 (attention.window=null)"),
    "mla": (["attention=mla"], "attention.qk_norm=whole (attention.qk_norm=latent)"),
    "mla with biases": (
        ["attention=mla", "attention.qk_norm=latent"],
        "attention.qk_bias=true (attention.qk_bias=false)",
    ),
    "dsa": (["attention=dsa", "attention.qk_norm=latent", "attention.qk_bias=false"], "attention.indexer.top_k"),
    "stack of two attentions": (
        ["attention=stack", "mlp=swiglu", "attention.parts.global.attention=mla"],
        "attention=stack (attention=gqa)",
    ),
    "stack of latents": (
        ["attention=stack", "mlp=swiglu", *(f"attention.parts.{part}.attention=mla" for part in ("global", "local"))],
        "attention=stack (attention=gqa)",
    ),
    "stack of two windows": (
        ["attention=stack", "mlp=swiglu", "attention.parts.global.window=9"],
        "attention.window=9 and 64 (attention.window=9)",
    ),
    "softmax of experts": (["mlp=moe", "mlp.router=softmax"], "mlp.router=softmax (mlp.router=sigmoid)"),
    "no shared expert": (["mlp=moe", "mlp.n_shared_experts=0"], "mlp.n_shared_experts=0 (mlp.n_shared_experts=1)"),
    "partial rotation": (["mlp=swiglu", "attention.rope_dim=8"], "attention.rope_dim=8 (attention.rope_dim=null)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_model_that_no_family_expresses_is_refused_with_the_switch(case):
    overrides, message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        family_of(composed_run("model=mini", *overrides).model)
    assert_one_line(refusal.value)
    assert message in str(refusal.value)


def test_bias_that_would_be_lost_is_refused_with_the_switch(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"mlp\.up_proj\.bias is not zero, .*apertus.*: mlp\.bias=false trains"
    ) as refusal:
        exported(ours(["attention=gqa", "model.bias=true"]), tmp_path / "folders/above", monkeypatch)
    assert_one_line(refusal.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_every_family_says_what_it_needs_of_settings_that_there_are():
    of_all = {name for overrides in OURS_AS.values() for name in _settings(overrides)}
    for family in FAMILIES.values():
        assert family.needs.keys() <= of_all
        assert {key.setting for key in family.keys} <= of_all


def _settings(overrides):
    from model.published.family import settings_of

    shape = () if "model=classic_gpt" in overrides else ("model=mini",)
    return settings_of(composed_run(*shape, *overrides).model)


BAD = {
    "a format": (["export", "run", "--to", "onnx", "out"], "there is no such format"),
    "a run that hf: does not name": (["export", "hf:", "--to", "hf", "out"], "hf: names no folder"),
    "a file": (["export", "hf:run/file", "--to", "hf", "out"], "is a file"),
    "the newest run of none": (["export", "latest", "--to", "hf", "out"], "checkpoint"),
    "no output": (["export", "run", "--to", "hf", ""], "names no folder"),
    "a run": (["export", "nowhere", "--to", "hf", "out"], "nowhere is not a run"),
    "a family": (["export", "run", "--to", "hf", "out", "--family", "opt"], "there is no such family"),
    "a family of code": (["export", "run", "--to", "hf-code", "out", "--family", "llama"], "is of --to hf"),
    "a folder in a file": (["export", "run", "--to", "hf", "run/file/out"], "run/file/out cannot be written: "),
    "a folder where none can be made": (["export", "run", "--to", "hf", "/proc/out"], "/proc/out cannot be written: "),
    "an output": (["export", "run", "--to", "hf", "."], "is there already"),
    "a size": (["export", "run", "--to", "hf", "out", "--file-bytes", "0"], "'0' is no number of bytes: write it as"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_with_bad_arguments_says_so_in_one_line(case, workplace, monkeypatch, capsys):
    (workplace / "run").mkdir()
    (workplace / "run/file").touch()
    arguments, message = BAD[case]
    assert call("convert", arguments, monkeypatch) == 2
    assert message in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
