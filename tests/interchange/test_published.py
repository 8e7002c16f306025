"""Published models are read: logits and texts are those of transformers; what is damaged or unknown is refused."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as Theirs

from common.errors import UserError
from data.shards.build import _encode_document
from data.sources.corpus import Document
from data.tokenizers.load import load_tokenizer
from data.tokenizers.published import PublishedTokenizer, parse_stored
from data.tokenizers.published_kinds import DECODER, PREFIX, SPELL_SPACES, STRIP_PREFIX
from generation.text_stream import TextStream
from model.published.families import FAMILIES, _share
from runtime.memory import allocated_peak
from tests.interchange.published import (
    LINEAR,
    THEIRS,
    VOCAB,
    YARN,
    fallback_tokenizer,
    save,
    theirs,
    transformers,
)
from tests.support import assert_one_line, call, logits_of, relative_error, some_tokens
from training.run.load import load_run
from training.run.published import dequantised, load_published, look_at


@pytest.mark.parametrize("name", THEIRS)
def test_published_model_gives_its_logits_and_its_greedy_text(name, tmp_path):
    model = theirs(name)
    mine, tokenizer = load_run(f"hf:{save(model, tmp_path / 'model')}")
    tokens = some_tokens(2, 40, VOCAB)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        assert relative_error(logits_of(mine, tokens), expected) <= 1e-4
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (VOCAB, 256)


def test_published_model_in_several_files_and_bfloat16_is_read(tmp_path):
    model = theirs("qwen3").to(torch.bfloat16)
    folder = save(model, tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    mine, _ = load_run(f"hf:{folder}")
    tokens = some_tokens(1, 20, VOCAB)
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = again(tokens, use_cache=False).logits
    assert relative_error(logits_of(mine, tokens), expected) <= 1e-4


def test_published_gpt2_without_a_prefix_and_with_its_constants_is_read(tmp_path):
    model = theirs("gpt2")
    folder = save(model, tmp_path / "model")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, folder / "model.safetensors")
    tokens = some_tokens(1, 20, VOCAB)
    with torch.no_grad():
        assert relative_error(logits_of(load_run(f"hf:{folder}")[0], tokens), model(tokens).logits) <= 1e-4


@pytest.mark.parametrize("context", [100, 4096])
def test_published_model_of_any_context_is_read(context, tmp_path):
    folder = save(theirs("qwen2", max_position_embeddings=context), tmp_path / "model")
    assert load_run(f"hf:{folder}")[0].config.context_length == context


def test_published_head_that_is_tied_and_differs_is_refused(tmp_path):
    folder = save(theirs("llama tied, linear"), tmp_path / "model")
    _replaced(folder, lambda all: {**all, "lm_head.weight": all["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"hold lm_head\.weight, which this model does not have"):
        load_run(f"hf:{folder}")


@pytest.mark.parametrize(("part", "whole"), [(30, 88), (30, 44), (102, 168), (16, 32)])
def test_share_of_a_head_that_rotates_is_read_back(part, whole):
    assert int(whole * _share(part, whole)) == part


def test_dequantised_equals_the_product_of_each_number_and_the_scale_of_its_tile():
    numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    found = dequantised(numbers, scales, (2, 4))
    for i in range(5):
        for j in range(7):
            assert found[i, j] == numbers[i, j].float() * scales[i // 2, j // 4]


def test_published_matrices_of_8_bit_numbers_are_read_with_their_scales(tmp_path):
    model = theirs("llama", attention_bias=False)
    folder = save(model, tmp_path / "model")
    tensors = model.state_dict()
    name, scales = "model.layers.0.mlp.up_proj.weight", torch.rand(6, 4) + 0.5
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale_inv": scales}, folder / "model.safetensors")
    _change(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    mine, _ = load_run(f"hf:{folder}")
    assert torch.equal(mine.layers[0].mlp.up_proj.weight, dequantised(tensors[name], scales, (16, 16)))


def test_tokenizer_of_a_published_model_encodes_as_tokenizers_does(tmp_path):
    folder = save(theirs("llama"), tmp_path / "model")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    _change(folder / "tokenizer.json", normalizer={"type": "NFC"}, added_tokens=ADDED, truncation=cut)
    tokenizer, text = load_tokenizer(folder / "tokenizer.json"), "def f(x):\n    return 'é' <|endoftext|>"
    expected = Theirs.from_file(str(folder / "tokenizer.json"))
    expected.encode_special_tokens = True
    expected.no_truncation()
    assert tokenizer.encode(text).tolist() == expected.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_lengths.sum() == 256 and tokenizer.decode([256, 97]) == "a"
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.hash == tokenizer.hash and np.array_equal(again.encode(text), tokenizer.encode(text))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize("changed", [{}, {"normalizer": None, "pre_tokenizer": METASPACE}], ids=["llama", "metaspace"])
def test_tokenizer_with_bytes_as_fallback_has_transformers_tokens_and_gives_the_text_back(
    changed, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.tokenizers.published.PIECE", 5)
    content = fallback_tokenizer(**changed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, draw = PublishedTokenizer(content, 2), random.Random(0)
    for length in [*range(40)] * 5:
        letters = [*" \ndef (xé語", chr(draw.randrange(0x2600, 0xD800))]  # no ▁, a token's spelling of a space
        text = "".join(draw.choice(letters) for _ in range(length))
        tokens = tokenizer.encode(text)
        if not (changed and text.startswith(" ")):  # of two such spaces Metaspace makes one
            assert tokens.tolist() == expected(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.decode(tokens) == text
        goes_on = tokenizer.encode_continuation(text)
        assert tokenizer.decode_bytes(goes_on).decode() == text
        written = TextStream(tokenizer)  # as after other text, the space belongs to it
        assert "".join([written.feed(token) for token in tokens.tolist()]) == (f" {text}" if text else "")
    assert tokenizer.decode(tokenizer.encode("<s>▁<0x41>")) == "<s> <0x41>"
    assert parse_stored(tokenizer.content()).hash == tokenizer.hash


def test_tokenizer_that_puts_a_space_before_a_text_puts_none_before_an_answer_or_a_further_piece():
    tokenizer = PublishedTokenizer(fallback_tokenizer(), 2)

    def prepared(**options) -> str:
        encoded = _encode_document(tokenizer, Document("a.txt", "def ex", held_out=False, **options))
        return "|".join(tokenizer.decode_bytes(tokens).decode() for tokens in encoded)

    assert (prepared(), prepared(is_continuation=True), prepared(prompt=4)) == ("| def ex", "|def ex", " def |ex")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"pre_tokenizer": {**METASPACE, "split": True}}, "pre_tokenizer Metaspace"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [PREFIX, PREFIX, SPELL_SPACES]}},
            "normalizer Prepend, Pre",
        ),
        ({"decoder": {"type": "Fuse"}}, "decoder of Fuse"),
        ({"decoder": {"type": "Sequence", "decoders": [*DECODER, {**STRIP_PREFIX, "start": 2}]}}, "decoder of Replace"),
        ({"added_tokens": [{"id": 0, "content": "<unk>", "special": False}]}, "added tokens that are not special"),
        ({"model": {**fallback_tokenizer()["model"], "ignore_merges": True}}, "ignore_merges"),
    ],
)
def test_tokenizer_with_bytes_as_fallback_that_changes_a_text_is_refused(changed, fault):
    with pytest.raises(ValueError, match=f"{fault}.*would change a text"):
        PublishedTokenizer(fallback_tokenizer(**changed), 2)


def test_train_and_sample_from_a_published_model(workplace, monkeypatch, capsys):
    """The vocabulary has rows without a token, as published ones do."""
    model = theirs("qwen3", vocab_size=VOCAB + 7, attention_bias=False)
    save(model, workplace / "model")
    prompt = torch.tensor([list(b"def f(")])
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 0
        written = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=0)[0, 6:]
    save(model, workplace / "model")
    around = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    _change(workplace / "model/tokenizer.json", post_processor=around)
    assert (
        call("sample", ["def f(", "--run", "hf:model", "--temperature", "0", "--max-new-tokens", "12"], monkeypatch)
        == 0
    )
    expected = bytes(token for token in written.tolist() if token < 256).decode(errors="replace")
    assert capsys.readouterr().out.removeprefix("def f(").removesuffix("\n") == expected
    (workplace / "text.txt").write_text("def f(x): return x")
    assert call("sample", ["--score", "text.txt", "--run", "hf:model"], monkeypatch) == 0
    options = ["experiment=smoke", "init_from=hf:model", "steps=3", "run_dir=tuned", "eval_tokens=256", "data.size=40"]
    assert call("train", options, monkeypatch) == 0
    assert call("sample", ["a", "--run", "tuned", "--max-new-tokens", "4"], monkeypatch) == 0
    shutil.rmtree(workplace / "model")  # the run stands by itself
    assert call("train", ["resume=tuned", "steps=5"], monkeypatch) == 0
    assert call("convert", ["export", "tuned", "--to", "hf", "out"], monkeypatch) == 0
    nats = []
    for source in ("tuned", "hf:out"):
        capsys.readouterr()
        assert call("sample", ["--score", "text.txt", "--json", "--run", source], monkeypatch) == 0
        nats.append(json.loads(capsys.readouterr().out)["nats_per_token"])
    assert nats[1] == pytest.approx(nats[0], abs=1e-5)


def test_train_from_a_folder_that_is_not_whole_is_refused_before_text_is_prepared(workplace, monkeypatch, capsys):
    folder = save(theirs("qwen3"), workplace / "model", max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    assert call("train", ["experiment=smoke", "init_from=hf:model", "data.size=40"], monkeypatch) == 2
    assert "model is not whole: its index names" in capsys.readouterr().err
    assert not (workplace / "cache").exists()


def test_published_model_is_in_memory_once_while_it_is_read(tmp_path):
    """Besides, a tensor or two; and the map of the file, which the profiler counts and the system can drop."""
    folder = save(theirs("llama", num_hidden_layers=12, attention_bias=False), tmp_path / "model")
    found, loaded = look_at(f"hf:{folder}"), []
    peak = allocated_peak(lambda: loaded.append(load_published(found, found.run.model)))
    peak -= (folder / "model.safetensors").stat().st_size
    assert peak <= 1.2 * sum(p.nbytes for p in loaded[0].parameters())


ADDED = [
    {"id": 256, "content": "<|endoftext|>", "special": True}
    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
]


def _change(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def _without(file, *names):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name not in names}))


def _replaced(folder, change):
    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file(change(tensors), folder / "model.safetensors")


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(*names):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        places = {str(i): name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return change


def _truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def _rope(scaling, **more):
    return lambda folder: _change(folder / "config.json", rope_parameters={**scaling, **more})


def _dangling(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def _pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _tokenizer(**changes):
    def change(folder):
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        _change(folder / "tokenizer.json", model={**model, **changes})

    return change


def _without_a_byte(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    del model["vocab"]["z"]
    _change(folder / "tokenizer.json", model=model)


def _pointer(name):
    content = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    return lambda folder: (folder / name).write_text(content)


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
FAULTS = {
    "weights pickled": (_pickled, "has its weights pickled"),
    "half a set": (_index("a.safetensors", "b.safetensors"), "is not whole: its index names b.safetensors"),
    "an index that leads out": (_index("../a.safetensors"), "is no safetensors file of its folder"),
    "an absolute index": (_index("/etc/a.safetensors"), "is no safetensors file of its folder"),
    "an empty index": (_index(), "has no weight_map"),
    "weights that Git LFS did not fetch": (_pointer("model.safetensors"), "run git lfs pull"),
    "a tokenizer that Git LFS did not fetch": (_pointer("tokenizer.json"), "run git lfs pull"),
    "truncated weights": (_truncated, "model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "another model": (
        lambda folder: _change(folder / "config.json", model_type="mamba"),
        "model_type=mamba is not known",
    ),
    "an unknown key": (lambda folder: _change(folder / "config.json", clip_qkv=8), "clip_qkv=8 is not known of llama"),
    "a missing key": (
        lambda folder: _without(folder / "config.json", "intermediate_size"),
        "there is no intermediate_size",
    ),
    "another activation": (lambda folder: _change(folder / "config.json", hidden_act="gelu"), "hidden_act=gelu"),
    "another scaling": (
        lambda folder: _change(folder / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 9.0}),
        "rope_type=dynamic",
    ),
    "both spellings": (
        lambda folder: _change(folder / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "say different things",
    ),
    "yarn with a factor of its own": (_rope(YARN, attention_factor=1.0), "attention_factor=1.0"),
    "yarn with DeepSeek's scales": (_rope(YARN, mscale=1.0), "mscale=1.0"),
    "a parameter of no scaling": (_rope(LINEAR, sharpness=2), "sharpness=2"),
    "a switch of no scaling": (_rope(YARN, finetuned=True), "finetuned=True: only it left out"),
    "another class": (lambda folder: _change(folder / "config.json", architectures=["LlamaBiModel"]), "LlamaBiModel"),
    "code of its own": (lambda folder: _change(folder / "config.json", auto_map={"AutoModel": "a.B"}), "auto_map"),
    "a type that is a list": (lambda folder: _change(folder / "config.json", model_type=[]), "is not known"),
    "an interpolation": (lambda folder: _change(folder / "config.json", hidden_size="${oc.env:HOME}"), "is no number"),
    "null": (lambda folder: _change(folder / "config.json", intermediate_size=None), "there is no intermediate_size"),
    "fewer layers than there are": (
        lambda folder: _change(folder / "config.json", num_hidden_layers=1),
        "hold model.layers.1.",
    ),
    "another quantization": (
        lambda folder: _change(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "only quant_method=fp8",
    ),
    "no key heads": (lambda folder: _change(folder / "config.json", num_key_value_heads=0), "config.json: "),
    "a switch that is a word": (lambda folder: _change(folder / "config.json", attention_bias="yes"), "true or false"),
    "two thetas": (lambda folder: _change(folder / "config.json", rope_theta=5.0), "remove the one"),
    "a number beyond all": (lambda folder: _change(folder / "config.json", num_hidden_layers=10**20), "too large"),
    "an endless theta": (
        lambda folder: _change(folder / "config.json", rope_parameters={"rope_theta": 10**400}),
        "too large a one",
    ),
    "an activation that is a list": (lambda folder: _change(folder / "config.json", hidden_act=["silu"]), "is no word"),
    "a theta that is a word": (
        lambda folder: _change(folder / "config.json", rope_parameters={"rope_theta": "x"}),
        "rope_theta=x is no number",
    ),
    "a link to nothing": (_dangling, "cannot be read"),
    "a pipe": (_pipe, "cannot be read"),
    "numbers that are not finite": (
        lambda folder: _replaced(folder, lambda all: {**all, Q_BIAS: torch.full((64,), torch.nan)}),
        "not finite",
    ),
    "8-bit numbers without scales": (
        lambda folder: _replaced(folder, lambda all: {**all, Q_BIAS: torch.ones(64).to(torch.float8_e4m3fn)}),
        "needs scales",
    ),
    "nesting": (lambda folder: (folder / "tokenizer_config.json").write_text("[" * 9999), "is damaged"),
    "a tokenizer that lacks a byte": (_without_a_byte, "it lacks 1 of the 256 bytes"),
    "a tokenizer that draws": (_tokenizer(dropout=0.5), "dropout"),
    "a tokenizer of lower case": (
        lambda folder: _change(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
        "normalizer Lowercase",
    ),
    "a width that is none": (lambda folder: _change(folder / "config.json", hidden_size=-64), "config.json: "),
    "heads of no number": (lambda folder: _change(folder / "config.json", num_attention_heads=0), "config.json: "),
    "a smaller vocabulary": (
        lambda folder: _change(folder / "config.json", vocab_size=200),
        "belong to different models",
    ),
    "another width": (lambda folder: _change(folder / "config.json", intermediate_size=100), "has shape"),
    "a tensor too few": (
        lambda folder: _replaced(folder, lambda all: {n: t for n, t in all.items() if n != Q_BIAS}),
        f"lack {Q_BIAS}",
    ),
    "a tensor too many": (
        lambda folder: _replaced(folder, lambda all: {**all, "model.layers.0.extra": torch.ones(2)}),
        "hold model.layers.0.extra",
    ),
    "integers": (
        lambda folder: _replaced(folder, lambda all: {**all, Q_BIAS: torch.ones(64, dtype=torch.int32)}),
        "holds no weights",
    ),
    "no end of text": (
        lambda folder: [_without(folder / "config.json", "eos_token_id"), _no_end(folder)],
        "ends a text",
    ),
    "another tokenizer": (
        lambda folder: _change(folder / "tokenizer.json", model={"type": "WordPiece", "vocab": {}}),
        "byte-level BPE is known",
    ),
}


def _no_end(folder):
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save(theirs("llama"), tmp_path_factory.mktemp("published") / "model")


@pytest.mark.parametrize("fault", FAULTS)
def test_published_model_with_a_fault_is_refused_in_one_line(fault, published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(UserError) as refusal:
        load_run(f"hf:{folder}")
    assert_one_line(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers=0: 1 to 1,048,576"),
        ({"num_hidden_layers": 2**40, "layer_types": None}, "num_hidden_layers=1099511627776: 1 to 1,048,576"),
        ({"layer_types": ["linear_attention"] * 2, "use_sliding_window": False}, "layer_types with linear_attention"),
    ],
)
def test_published_layers_that_cannot_be_are_refused_in_one_line(changed, message):
    content = {**theirs("qwen2", num_hidden_layers=2).config.to_diff_dict(), "use_sliding_window": True, **changed}
    with pytest.raises(UserError, match=message):
        FAMILIES["qwen2"].settings(content)


def test_published_theta_of_a_long_context_is_read():
    content = {**theirs("llama").config.to_diff_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 1e10}}
    assert FAMILIES["llama"].settings(content)["attention.rope_theta"] == 1e10
