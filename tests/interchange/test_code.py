"""Runs are exported with the file of code that computes them: transformers opens it, without this program, and it gives
the logits and the text of our own model."""

import ast
import sys

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from common.settings import FrozenSettings
from interchange.hf_code import CODE, config_json, obstacles, with_code
from interchange.hf_family import chosen_family
from tests.interchange.published import VOCAB, ours, transformers
from tests.interchange.test_export import exported
from tests.support import assert_one_line, composed_run, logits_of, relative_error, some_tokens
from training.run.load import load_run

PATTERN = ("attention.window=8", "attention.dilation=2", "attention.global_tokens=2")
HEADS_OF_NO_POWER_OF_TWO = ("model.n_heads=6", "model.d_model=96")
PARTS = "{a: {attention: gqa, window: 6, rope_scaling: ntk, rope_factor: 2}, b: {attention: mla, rope_theta: 500}}"
# What decides the computation, each setting with each of its values in some model.
MODELS = {
    "grouped heads with biases, part of which rotates, beneath a window": (
        *("attention=gqa", "model.bias=true", "attention.rope_dim=8", "attention.rope_layout=interleaved", *PATTERN),
        *("attention.rope_scaling=linear", "attention.rope_factor=2", "model.logit_softcap=5", "mlp=gelu"),
        *("model.norm=layer", "model.norm_eps=1e-2"),
    ),
    "alibi without a diagonal": (
        *("attention=gqa", "position=alibi", "model.qk_norm=false", "attention.mask_diagonal=true", "mlp=relu"),
        *(*HEADS_OF_NO_POWER_OF_TWO, "attention.n_kv_heads=2", "attention.v_bias=true"),
    ),
    "alibi on latents, geometric": (
        *("attention=mla", "position=alibi", "attention.qk_norm=head", "attention.alibi_slopes=geometric"),
        *(*HEADS_OF_NO_POWER_OF_TWO, "model.tie_embeddings=false"),
    ),
    "latents with whole heads normed, softmax of grouped experts, yarn": (
        *("attention=mla", "attention.k_rope_from=latent", "attention.qk_norm_groups=2", "mlp=moe"),
        *("mlp.router=softmax", "mlp.n_groups=4", "mlp.top_groups=2", "mlp.n_shared_experts=0", "mlp.bias_rate=0"),
        *("mlp.renormalise=false", "attention.rope_scaling=yarn", "attention.rope_factor=4"),
        *("attention.rope_theta=100", "attention.rope_original_context=512"),
    ),
    "latents of queries too, parts of heads normed, llama3": (
        *("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=2", "attention.q_lora_rank=24"),
        *("model.bias=true", "attention.rope_layout=interleaved", "mlp=swiglu", "model.norm=layer"),
        *("attention.rope_scaling=llama3", "attention.rope_factor=4"),
    ),
    "latents alone normed, sigmoid of experts, a window": (
        *("attention=mla", "attention.qk_norm=latent", "attention.window=12", "mlp=moe", "mlp.n_dense_layers=1"),
        *("mlp.n_shared_experts=2", "mlp.n_groups=2", "mlp.scaling=2.5", "mlp.bias=true"),
    ),
    "a stack": (
        *("attention=stack", "attention.pattern=[a,a,b]", f"+attention.parts={PARTS}", "model.n_layers=6"),
        "model.tie_embeddings=false",
    ),
    "a position of each token that is learned": ("attention=mha", "position=learned", "model.bias=true"),
    "a position of each token that is a wave": (
        *("attention=mla", "position=sinusoidal", "model.bias=true", "mlp.bias=false"),
    ),
    "no positions": ("attention=mqa", "position=none", "attention.head_dim=24"),
}


@pytest.fixture(autouse=True)
def _code_is_copied_here(tmp_path, monkeypatch):
    """transformers imports a copy of the code, which it keeps in the user's folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def opened(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def greedy(model, prompt, count):
    """By the whole text each time: (1, T) -> (1, T + count)."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, logits_of(model, tokens)[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_code_has_the_logits_and_the_cached_text_of_our_model_beside_padding_too(name, tmp_path, monkeypatch):
    model = ours(MODELS[name])
    exported(model, tmp_path, monkeypatch, with_code)
    theirs, loading = opened(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    tokens = some_tokens(2, 40, VOCAB)
    with torch.no_grad():
        expected = logits_of(model, tokens)
        assert relative_error(theirs(tokens).logits, expected) <= 1e-4
        prompts = [tokens[:1, :9], tokens[1:, :14]]
        texts = [greedy(model, prompt, 16) for prompt in prompts]
    batch = torch.cat((F.pad(prompts[0], (5, 0), value=256), prompts[1]))
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    with torch.no_grad():
        assert relative_error(theirs(batch, attention_mask=mask).logits[0, 5:], expected[0, :9]) <= 1e-4
        behind = theirs(batch.roll(-5, 1), attention_mask=mask.roll(-5, 1)).logits[0, :9]
        assert relative_error(behind, expected[0, :9]) <= 1e-4
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    found = theirs.generate(batch, attention_mask=mask, **options)
    assert torch.equal(found[:1, 5:], texts[0]) and torch.equal(found[1:], texts[1])
    assert torch.equal(theirs.generate(prompts[1], **options), texts[1])


def test_models_of_these_tests_have_each_value_that_config_json_can_have():
    """A setting that is added, and that the code does not know, is found here."""
    attentions, mlps = [], []
    for overrides in MODELS.values():
        content = config_json(composed_run("model=mini", *overrides).model, VOCAB)
        attentions, mlps = [*attentions, *content["attention"]], [*mlps, content["mlp"]]
    code = CODE.read_text()
    assert all(f'"{name}"' in code for settings in (*attentions, *mlps) for name in settings)
    assert {s["kind"] for s in attentions} == {"gqa", "mla"}
    assert {s["kind"] for s in mlps} == {"swiglu", "relu", "relu2", "gelu", "moe"}
    assert {s["rope_scaling"] for s in attentions} == {"none", "linear", "ntk", "yarn", "llama3"}
    assert {s["qk_norm"] for s in attentions} == {True, False, "latent", "head", "whole"}


def test_code_imports_torch_and_transformers_alone():
    imported = set()
    for node in ast.walk(ast.parse(CODE.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_folder_with_code_is_not_read_back_which_is_said(tmp_path, monkeypatch):
    exported(ours(["attention=gqa"]), tmp_path, monkeypatch, with_code)
    with pytest.raises(UserError, match="model_type=headroom is not known, and its own code is not run") as refusal:
        load_run(f"hf:{tmp_path / 'out'}")
    assert_one_line(refusal.value)


@pytest.fixture
def learned(tmp_path, monkeypatch):
    exported(ours(MODELS["a position of each token that is learned"]), tmp_path, monkeypatch, with_code)
    return opened(tmp_path / "out")


def test_code_refuses_arguments_that_it_would_not_heed(learned):
    tokens = some_tokens(1, 8, VOCAB)
    with pytest.raises(TypeError, match="no output_hidden_states, position_ids"):
        learned(tokens, position_ids=tokens, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"shape \(1, 7\), and must be \(texts, 8\)"):
        learned(tokens, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="longer than the 64 positions"):
        learned(some_tokens(1, 65, VOCAB))


def test_code_can_be_trained_and_saved_again(learned, tmp_path):
    tokens = some_tokens(2, 12, VOCAB)
    found = learned(tokens, labels=tokens)
    expected = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(found.loss - expected) <= 1e-6
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in learned.parameters())
    learned.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE.name).is_file()
    assert torch.equal(opened(tmp_path / "again")(tokens).logits, found.logits)


def test_code_opens_files_in_lower_precision_without_multi_token_prediction(tmp_path, monkeypatch, caplog):
    model = ours(["attention=mla", "mlp=moe", "model.mtp_depth=1"])
    found = exported(model, tmp_path, monkeypatch, with_code, dtype="bf16", file_bytes=60_000)
    assert "multi-token prediction is left out" in caplog.text and len(found.weights) > 2
    theirs = opened(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    tokens = some_tokens(1, 20, VOCAB)
    with torch.no_grad():
        assert relative_error(theirs(tokens).logits, logits_of(model, tokens)) <= 0.1


REFUSED = {
    "random blocks": (
        ["attention.window=8", "attention.random_blocks=0.25"],
        "attention.random_blocks=0.25 (attention.random_blocks=0)",
    ),
    "an indexer": (["attention=dsa"], "(attention.indexer.top_k=null)"),
    "random blocks of a part": (
        ["attention=stack", "attention.parts.local.random_blocks=0.25"],
        "attention.parts.local.random_blocks=0.25 (attention.parts.local.random_blocks=0)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_model_that_the_code_cannot_express_is_refused_with_the_switch(case):
    overrides, message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        with_code(ours(overrides))
    assert_one_line(refusal.value)
    assert message in str(refusal.value)


def test_attention_and_mlp_of_ones_own_are_refused(monkeypatch):
    config = composed_run("model=mini", "attention=gqa").model
    own = type("Own", (type(config.attention),), {})(**config.attention.model_dump())
    mlp = type("OwnMLP", (type(config.mlp),), {})(**config.mlp.model_dump())
    assert isinstance(own, FrozenSettings)
    found = obstacles(config.model_copy(update={"attention": own, "mlp": mlp}))
    assert [message.partition(" (")[0] for message in found] == ["attention of type Own", "mlp of type OwnMLP"]


def test_refusal_of_families_names_this_format_where_it_is_a_way_out():
    with pytest.raises(UserError, match=r"attention\.position=rope\); as it is, --to hf-code exports it") as refusal:
        chosen_family(composed_run("model=mini", "position=alibi").model, None)
    assert_one_line(refusal.value)
    with pytest.raises(UserError) as refusal:
        chosen_family(composed_run("model=mini", "attention=dsa").model, None)
    assert "hf-code" not in str(refusal.value)
