"""Runs are exported: transformers opens them by itself, and they have the same logits and write the same text there."""

import json
import subprocess
import sys

import pytest
import torch

from common.errors import UserError
from data.tokenizers.bpe import BPEConfig
from interchange import hf_folder
from interchange.hf_family import in_family
from model.published.families import FAMILIES, family_of
from tests.interchange.published import OURS_AS, VOCAB, ours, transformers
from tests.support import assert_one_line, call, composed_run, logits_of, relative_error, some_tokens
from training.run.load import load_run


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


def test_exported_files_hold_at_most_so_many_bytes_and_lower_precision(tmp_path, monkeypatch):
    model = ours(["attention=gqa"])
    found = exported(model, tmp_path, monkeypatch, dtype="bf16", file_bytes=60_000)
    shards = [tmp_path / "out" / name for name in found.weights]
    assert len(shards) > 2 and all(shard.stat().st_size <= 70_000 for shard in shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
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
    "stack of two windows": (
        ["attention=stack", "mlp=swiglu", "attention.parts.global.window=9"],
        "attention=stack (attention=gqa)",
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
        UserError, match=r"mlp\.up_proj\.bias is not zero, .*apertus.*: model\.bias=false trains"
    ) as refusal:
        exported(ours(["attention=gqa", "model.bias=true"]), tmp_path, monkeypatch)
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


# What a user does who has transformers and nothing of this project.
ELSEWHERE = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
found = write(sys.argv[2], max_new_tokens=16, do_sample=False, return_full_text=False)
sys.stdout.write(found[0]["generated_text"])
"""


@pytest.mark.parametrize(
    "settings",
    [
        ["attention=gqa"],
        pytest.param(["attention=mla", "attention.qk_norm=latent", "attention.qk_bias=false"], marks=pytest.mark.slow),
        pytest.param(["mlp=moe"], marks=pytest.mark.slow),
    ],
    ids=["gqa", "mla", "moe"],
)
def test_trained_run_is_exported_and_writes_the_same_text_elsewhere(settings, workplace, monkeypatch, capsys):
    train = ["experiment=smoke", "steps=30", "run_dir=run", "data.size=40", "eval_tokens=256", *settings]
    assert call("train", train, monkeypatch) == 0
    (workplace / "runs").symlink_to(workplace)
    assert call("convert", ["export", "latest", "--to", "hf", "out"], monkeypatch) == 0
    capsys.readouterr()
    options = ["--run", "run", "--temperature", "0", "--max-new-tokens", "16"]
    assert call("sample", ["The ", *options], monkeypatch) == 0
    here = capsys.readouterr().out.removeprefix("The ").removesuffix("\n")
    command = [sys.executable, "-c", ELSEWHERE, "out", "The "]
    there = subprocess.run(
        command, cwd=workplace, capture_output=True, text=True, env={"PATH": "", "HF_HUB_OFFLINE": "1"}
    )
    assert there.stdout == here, there.stderr
    card = (workplace / "out/README.md").read_text()
    assert "| steps | 30 |" in card and "seed: 0" in card
    assert json.loads((workplace / "out/config.json").read_text())["eos_token_id"] == 256


BAD = {
    "a format": (["export", "run", "--to", "onnx", "out"], "there is no such format"),
    "a run that hf: does not name": (["export", "hf:", "--to", "hf", "out"], "hf: names no folder"),
    "a file": (["export", "hf:run/file", "--to", "hf", "out"], "is a file"),
    "the newest run of none": (["export", "latest", "--to", "hf", "out"], "runs"),
    "no output": (["export", "run", "--to", "hf", ""], "names no folder"),
    "a run": (["export", "nowhere", "--to", "hf", "out"], "nowhere is not a run"),
    "a family": (["export", "run", "--to", "hf", "out", "--family", "opt"], "there is no such family"),
    "a family of code": (["export", "run", "--to", "hf-code", "out", "--family", "llama"], "is of --to hf"),
    "a folder": (["export", "run", "--to", "hf", "no/out"], "there is no folder no"),
    "an output": (["export", "run", "--to", "hf", "."], "is there already"),
    "a size": (["export", "run", "--to", "hf", "out", "--file-bytes", "0"], "is not a whole number of at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_with_bad_arguments_says_so_in_one_line(case, workplace, monkeypatch, capsys):
    (workplace / "run").mkdir()
    (workplace / "run/file").touch()
    arguments, message = BAD[case]
    assert call("convert", arguments, monkeypatch) == 2
    assert message in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
