"""Documentation: links lead to the lines they name, and numbers are the ones that commands print."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.attention_by_numbers import SECTIONS, show
from docs import code_tour
from model import cost
from model.transformer import ModelConfig
from tests.support import ROOT, composed_run, small_model
from training.run.checkpoint import MANIFEST, MODEL, OPTIMIZER, Manifest
from training.run.folder import FILES_BEFORE_CONFIG
from training.run.migrate import FORMAT

MAP_OF_TESTS = ROOT / "tests" / "README.md"
PAGES = [ROOT / "README.md", MAP_OF_TESTS, *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = {"crossover"}  # times, which no other run gives again


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs_links_lead_to_files_and_the_lines_they_name(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, place = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        line = place.removeprefix("L") if file.suffix == ".py" else ""
        if file.suffix == ".md" and place:
            assert place in anchors(file), f"{page.name} links {target}"
        if text.startswith("`") and file.suffix == ".py":
            assert line, f"{page.name}: {text} names no line of {path}"
            assert text.strip("`") in file.read_text().splitlines()[int(line) - 1], (
                f"{page.name}: {text} is not at {target}"
            )


def test_the_index_links_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text()))
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "studies").glob("*.md")]
    assert {str(page.relative_to(ROOT / "docs")) for page in pages} - {"index.md"} <= linked


def test_map_of_the_tests_names_every_file_of_them():
    text = MAP_OF_TESTS.read_text()
    assert not [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.stem not in text]


@pytest.mark.parametrize("section", code_tour.SECTIONS)
def test_code_tour_frames_are_those_of_the_code(section, capsys):
    code_tour.SECTIONS[section]()
    assert f"```\n{capsys.readouterr().out.strip()}\n```" in (ROOT / "docs" / "code_tour.md").read_text()


def test_code_tour_training_loss_is_few_frames_from_the_command():
    depths = {name: len(found) for name, found in code_tour.frames_of_training().items()}
    assert depths["forward"] + 1 <= 6  # above it, and itself
    assert depths["loss"] + 1 <= 8


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in MEASURED])
def test_attention_page_numbers_are_those_that_are_printed(section, capsys):
    torch.manual_seed(0)
    show(section)
    printed = capsys.readouterr().out.strip()
    assert printed in (Path(ROOT) / "docs" / "attention.md").read_text()


OPTIONS_PAGE = (ROOT / "docs" / "attention_options.md").read_text()


@pytest.mark.parametrize("model", ["tiny", "small", "gpt2", "gpt2_medium"])
def test_the_page_on_options_gives_the_cache_of_every_attention(model):
    models = [composed_run(f"model={model}", f"attention={name}").model for name in ("mha", "gqa", "mqa", "mla")]
    found = [cost.cache_bytes_per_token(cost.on_meta(config, 4096)) for config in models]
    (row,) = re.findall(rf"^\| `model={model}` \| (.+) \|$", OPTIONS_PAGE, re.M)
    assert row.replace("*", "").split(" | ") == [f"{count:,}" for count in found]


@pytest.mark.parametrize(
    ("overrides", "stated"),
    [
        ("attention.window=128", "589,824"),
        ("attention=mla attention.window=128", "131,328"),
        ("attention.window=64 attention.global_tokens=4", "344,064"),
        ("attention.window=64 attention.random_blocks=0.2", "1,048,576"),
        ("attention=stack", "344,064"),
    ],
)
def test_the_page_on_options_gives_the_cache_of_a_full_context(overrides, stated):
    config = composed_run(*overrides.split()).model
    assert f"{cost.cache_bytes(cost.on_meta(config, 4096), config.context_length):,}" == stated
    assert stated in OPTIONS_PAGE


@pytest.mark.parametrize(
    ("override", "stated"),
    [("qk_norm=latent", "896"), ("qk_norm=whole", "912"), ("qk_norm=head", "912"), ("qk_norm_groups=4", "960")],
)
def test_the_page_on_options_gives_the_cache_of_norms_of_mla(override, stated):
    config = composed_run("attention=mla", f"attention.{override}").model
    assert f"{cost.cache_bytes_per_token(cost.on_meta(config, 4096))}" == stated
    assert f"| {stated} |" in OPTIONS_PAGE


RUN_FORMAT = (ROOT / "docs" / "run_format.md").read_text()
MODELS = [  # that have every tensor between them
    ("attention=gqa", "mlp=swiglu", "model.tie_embeddings=false"),
    ("attention=mha", "position=learned", "model.norm=layer", "model.bias=true"),
    ("attention=mla", "attention.q_lora_rank=24", "model.bias=true"),
    ("attention=mla", "attention.k_rope_from=latent", "attention.qk_rope_head_dim=8"),
    ("attention=gqa", "mlp=moe", "mlp.n_shared_experts=2", "model.bias=true"),
    ("attention=mla", "attention.qk_norm=head"),
    ("attention=mla", "attention.qk_norm=whole"),
    ("attention=gqa", "model.mtp_depth=1"),
]


def test_run_format_page_gives_the_shape_of_every_tensor():
    rows = [row.split(" | ") for row in RUN_FORMAT.splitlines() if row.startswith("| `") and "` | (" in row]
    unseen = {name for names, *_ in rows for name in re.findall(r"`(.+?)`", names)}
    for options in MODELS:
        model = small_model(*options, vocab_size=300)
        numbers = _sizes(model.config)
        for name, tensor in model.state_dict().items():
            weight = re.sub(r"^(layers\.\d+|mtp\.block)\.", "layers.N.", name)
            weight = re.sub(r"\.bias$", ".weight", weight)
            shapes = [
                eval(shape.replace("·", "*"), dict(numbers)) for names, shape, _ in rows if f"`{weight}`" in names
            ]
            assert tuple(tensor.shape) in [shape[: tensor.ndim] for shape in shapes], (options, name)
            unseen.discard(weight)
    assert not unseen


def _sizes(config: ModelConfig) -> dict[str, float]:
    """By the page's letters; NaN, which no size is, for one that the attention does not have."""
    attention = config.attention.model_dump()
    letters = {"Hk": "n_kv_heads", "D": "head_dim", "q": "q_lora_rank", "c": "kv_lora_rank", "n": "qk_nope_head_dim"}
    letters |= {"r": "qk_rope_head_dim", "v": "v_head_dim"}
    sizes = {"V": 300, "T": config.context_length, "d": config.d_model, "f": config.mlp.d_ff, "H": config.n_heads}
    sizes |= {"E": getattr(config.mlp, "n_experts", math.nan), "S": getattr(config.mlp, "n_shared_experts", math.nan)}
    return sizes | {letter: attention.get(name, math.nan) for letter, name in letters.items()}


def test_run_format_page_states_the_format():
    assert f"the version of this format, {FORMAT} today" in (ROOT / "docs/run_format.md").read_text()


def test_run_format_page_names_the_files_and_the_manifests_keys():
    named = set(re.findall(r"`([\w./]+)`", RUN_FORMAT))
    assert named >= {*FILES_BEFORE_CONFIG, "config.yaml", "metrics.jsonl", "loss.png", MODEL, OPTIMIZER, MANIFEST}
    assert named >= Manifest.model_fields.keys()
