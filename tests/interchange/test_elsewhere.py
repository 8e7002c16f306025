"""Trained runs are exported, and go on writing where there is nothing of this project."""

import json
import subprocess
import sys

import pytest

from interchange.hf_code import AUTO_MAP, CODE
from tests.support import call

pytest.importorskip("transformers")

# The format and the settings of each run: those that a family expresses, and one that none does.
RUNS = {
    "gqa": ("hf", ["attention=gqa"]),
    "mla": ("hf", ["attention=mla", "attention.qk_norm=latent", "attention.qk_bias=false"]),
    "moe": ("hf", ["mlp=moe"]),
    "stack": ("hf-code", ["attention=stack", "attention.parts.global.attention=mla", "model.logit_softcap=30"]),
}
SLOW = [pytest.param([name], marks=pytest.mark.slow) for name in ("mla", "moe")]
# What a user does who has torch and transformers alone. First what comes with a file of code, which must import by
# itself all that it needs.
ELSEWHERE = """
import json, sys, transformers
texts = {}
for name, format in json.loads(sys.argv[1]).items():
    options = {"trust_remote_code": True} if format == "hf-code" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(f"exported/{name}", **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"exported/{name}", **options)
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = write("The ", max_new_tokens=16, do_sample=False, return_full_text=False)
    texts[name] = found[0]["generated_text"]
assert not [name for name in sys.modules if name.partition(".")[0] in ("model", "interchange", "hydra", "pydantic")]
print(json.dumps(texts))
"""


@pytest.mark.parametrize("names", [["stack", "gqa"], *SLOW], ids=" ".join)
def test_trained_runs_are_exported_and_write_the_same_texts_elsewhere(names, workplace, monkeypatch, capsys):
    (workplace / "exported").mkdir()
    here = {}
    for name in names:
        format, settings = RUNS[name]
        train = ["experiment=smoke", "steps=30", f"run_dir=runs/{name}", "data.size=40", "eval_tokens=256", *settings]
        assert call("train", train, monkeypatch) == 0
        capsys.readouterr()
        if format == "hf-code":
            assert call("convert", ["export", "latest", "--to", "hf", f"exported/{name}"], monkeypatch) == 2
            assert "--to hf-code" in capsys.readouterr().err
        assert call("convert", ["export", "latest", "--to", format, f"exported/{name}"], monkeypatch) == 0
        capsys.readouterr()
        options = ["--run", f"runs/{name}", "--temperature", "0", "--max-new-tokens", "16"]
        assert call("sample", ["The ", *options], monkeypatch) == 0
        here[name] = capsys.readouterr().out.removeprefix("The ").removesuffix("\n")
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "cache")}
    command = [sys.executable, "-c", ELSEWHERE, json.dumps({name: RUNS[name][0] for name in names})]
    there = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=environment)
    assert there.returncode == 0 and json.loads(there.stdout) == here, there.stderr
    for name in names:
        check_folder(workplace / "exported" / name, RUNS[name][0])


def check_folder(folder, format):
    card, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    assert "| steps | 30 |" in card and "seed: 0" in card
    assert config["eos_token_id"] == 256
    if format == "hf-code":
        assert (folder / CODE.name).read_bytes() == CODE.read_bytes()
        assert "trust_remote_code=True" in card
        assert config["auto_map"] == AUTO_MAP
