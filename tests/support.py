"""What several tests share: composed configurations, small sharpened models, and the program called in-process."""

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import training.step_memory  # noqa: F401  which takes its loss function now, before a test replaces that
from common.conf_files import choices, content
from common.errors import Unsupported, UserError
from data.batches import Batch
from model.attention.base import AttentionConfig
from model.initialise import initialised
from model.kernels.naive import Naive
from model.placement import Placement
from model.transformer import ModelConfig, TransformerLM
from runtime.precision import MixedPrecision
from tests.composition import request_of, tree_of
from training.run import folder
from training.run.composer import choice, merged
from training.run.config import Run, pop_command_settings
from training.run.parts import MODEL_PARTS, RUN_PARTS
from training.state import TrainState

# Autograd begins here, where there is nothing but the CPU: with threads for another device, which a test may make up,
# no process could be forked any more.
torch.ones((), requires_grad=True).backward()

ROOT = Path(__file__).resolve().parent.parent
ATTENTIONS = choices("attention")
# What a choice cannot do without.
NEEDS = {
    ("data", "files"): ("data.path='*.txt'",),
    ("data", "hub"): ("data.path=owner/name",),
    ("data", "mix"): ("data.parts={sympy: 2, texts: {quota: 0.5, data: files, path: '*.txt'}}",),
    ("data", "tokens"): ("data.path='*.bin'", "tokenizer=gpt2"),
    **{("data", name): ("tokenizer=numbers",) for name in ("mqar", "needle", "copy")},
    ("tokenizer", "numbers"): ("data=mqar",),
    ("optim", "torch"): ("optim.name=Adagrad",),
    ("experiment", "shakespeare_char"): ("data.path='*.txt'",),
}
SMOKE = ["experiment=smoke", "tune_malloc=false"]
# Of fewer tokens, and few enough documents that scoring all of the validation text takes no longer than some steps.
QUICK = [*SMOKE, "data.size=40", "batch_tokens=256", "eval_tokens=256"]
TINY = [*QUICK, "steps=4", "eval_every=2", "save_every=2"]
SMALL = ("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.context_length=64")
# Every attention as it comes, and the choices within one that change its arithmetic.
# An indexer chooses so few keys that a short text has more.
EACH = [(f"attention={name}", *["attention.indexer.top_k=4"] * (name == "dsa")) for name in ATTENTIONS]
CASES = [
    *EACH,
    ("attention=gqa", "attention.rope_layout=interleaved", "attention.qk_norm=false"),
    ("attention=mla", "attention.q_lora_rank=24", "attention.rope_layout=interleaved"),
    ("attention=mla", "attention.execution=naive"),
    ("attention=mla", "attention.execution=expanded", "attention.v_head_dim=24"),
    ("attention=mla", "attention.execution=absorbed", "attention.qk_norm=latent", "attention.q_lora_rank=24"),
    ("attention=gqa", "attention.window=5"),
    ("attention=mla", "attention.window=6"),
    ("attention=mqa", "attention.window=4", "attention.global_tokens=2"),
    ("attention=mha", "attention.window=9", "attention.dilation=2"),
    ("attention=gqa", "attention.window=3", "attention.random_blocks=0.4", "attention.block_size=2"),
    ("attention=mla", "attention.mask_diagonal=true"),
    ("attention=stack", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
    ("attention=gqa", "attention.rope_dim=6", "attention.rope_layout=interleaved"),
    ("attention=mqa", "attention.rope_scaling=linear", "attention.rope_factor=4"),
    ("attention=mha", "attention.rope_scaling=ntk", "attention.rope_factor=4", "attention.rope_dim=8"),
    ("attention=gqa", "attention.rope_scaling=yarn", "attention.rope_factor=4", "attention.rope_theta=100"),
    ("attention=mla", "attention.rope_scaling=yarn", "attention.rope_factor=4", "attention.qk_rope_head_dim=8"),
    ("attention=mla", "attention.k_rope_from=latent", "attention.qk_rope_head_dim=8"),
    ("attention=gqa", "position=alibi"),
    ("attention=mla", "position=alibi"),
    ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
    ("attention=mha", "position=none"),
    ("attention=mla", "position=none", "attention.q_lora_rank=24"),
    ("attention=gqa", "position=learned"),
    ("attention=mla", "position=sinusoidal"),
    ("attention=gqa", "model.norm=layer", "model.bias=true", "model.logit_softcap=5"),
    ("attention=mha", "position=learned", "model.norm=layer"),
    ("attention=mla", "model.norm=layer", "model.bias=true", "attention.q_lora_rank=24"),
    ("attention=mla", "attention.qk_norm=head"),
    ("attention=mla", "attention.qk_norm=head", "position=alibi"),
    ("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=2", "attention.execution=absorbed"),
    ("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=4", "attention.window=6", "model.bias=true"),
    ("attention=mla", "attention.qk_norm=latent"),
    ("attention=mla", "attention.qk_norm=latent", "position=alibi", "attention.q_lora_rank=24"),
    ("attention=mla", "attention.qk_norm=latent", "attention.k_rope_from=latent", "attention.window=6"),
    ("attention=mla", "attention.qk_norm=latent", "position=none", "attention.execution=expanded"),
    ("attention=mla", "attention.qk_norm=whole", "attention.qk_norm_groups=2", "attention.execution=absorbed"),
    ("attention=mla", "attention.qk_norm=whole", "attention.qk_norm_groups=4", "attention.k_rope_from=latent"),
]

# Those for which no other stands: in what is cached, where a token stands, what it sees and how keys are normed.
DISTINCT = [
    *EACH,
    ("attention=mla", "attention.execution=absorbed", "attention.qk_norm=latent", "attention.q_lora_rank=24"),
    ("attention=mla", "attention.window=6"),
    ("attention=mqa", "attention.window=4", "attention.global_tokens=2"),
    ("attention=gqa", "attention.window=3", "attention.random_blocks=0.4", "attention.block_size=2"),
    ("attention=stack", "position=alibi", "attention.parts.local.window=5", "attention.parts.global.attention=mla"),
    ("attention=mha", "position=learned", "model.norm=layer"),
    ("attention=mla", "attention.qk_norm=head", "attention.qk_norm_groups=4", "attention.window=6", "model.bias=true"),
    ("attention=mla", "attention.qk_norm=whole", "attention.qk_norm_groups=4", "attention.k_rope_from=latent"),
]
assert all(case in CASES for case in DISTINCT)


def mostly_slow(cases: Sequence[tuple[str, ...]] = CASES, often: Sequence[tuple[str, ...]] = DISTINCT) -> list[Any]:
    """The cases as parameters of a test that takes long with each: those for which others stand are slow."""
    assert all(case in [*CASES, *cases] for case in often)  # a misspelt one would be left out unseen
    slow = {case: () if case in often else pytest.mark.slow for case in cases}
    return [pytest.param(case, marks=marks, id=" ".join(case)) for case, marks in slow.items()]


@functools.lru_cache(maxsize=1000)
def _run(*overrides: str) -> Run:
    tree = composed_tree(*overrides)
    pop_command_settings(tree)
    return Run.from_tree(tree)


def composed_tree(*overrides: str) -> dict[str, Any]:
    """The tree that `python train.py *overrides` composes, to be changed at will. Of overrides of one setting, which
    train.py refuses, the last counts."""
    return tree_of(*merged(*overrides))


def composed_run(*overrides: str) -> Run:
    """The run that `python train.py *overrides` makes, of overrides as above. Cached."""
    return _run(*merged(*overrides))


def configured(cls: type, **given: Any) -> Any:
    """Construct a settings class; what is not given is as in the choice of conf/ that has its name, or its base's."""
    return cls(**_defaults(cls) | given)


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    for base in cls.__mro__:
        target = f"{base.__module__}.{base.__name__}"
        found = [(group, name) for group, name, one in _targets() if one == target]
        if found:
            named = [(group, name) for group, name in found if base.__name__.lower().startswith(name)]
            offer = choice(*(named or found)[0])
            masks = choice("mask", "sparse") if issubclass(cls, AttentionConfig) else {}
            return masks | {key: value for key, value in offer.items() if key != "_target_" and value != "???"}
    raise ValueError(f"{cls} is in no choice of conf/")


@functools.cache
def _targets() -> list[tuple[str, str, str]]:
    """Each choice of a class: its group, its name, and the class. To compose them all would take seconds."""
    offers = [(group, name) for group in MODEL_PARTS | RUN_PARTS for name in choices(group)]
    return [(*one, content(*one)["_target_"]) for one in offers if "_target_" in content(*one)]  # not another's changed


def small_config(*overrides: str, kernel=None, **fields: Any) -> ModelConfig:
    """fields: of ModelConfig, from which nothing else is derived. To compose anew takes a tenth of a second."""
    return composed_run(*SMALL, *overrides).model.model_copy(update={"kernel": kernel or Naive(), **fields})


def small_model(*overrides: str, kernel=None, vocab_size: int = 100, seed: int = 0, **fields: Any) -> TransformerLM:
    return sharpened(initialised(small_config(*overrides, kernel=kernel, **fields), vocab_size, seed), seed)


def sharpened(model: TransformerLM, seed: int = 0) -> TransformerLM:
    """The model, its attention looking somewhere: freshly initialised ones look everywhere alike, and hide errors."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "norm.weight":  # of a size that training gives it
                parameter.fill_(1)
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
            elif not parameter.any():  # what starts at zero would hide all before it
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[1] ** -0.5)
            elif ".attention." in name:
                parameter.mul_(2)
    return model


def some_tokens(batch: int, length: int, vocab_size: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def distinct_tokens(batch: int, length: int, vocab_size: int = 100, seed: int = 0) -> torch.Tensor:
    """Where nothing tells positions apart, a token that comes twice has two equal keys, and which one an indexer
    chooses hangs on the last bit."""
    drawn = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    return drawn[: batch * length].view(batch, length)


def logits_of(model: TransformerLM, tokens: torch.Tensor, at: Placement | None = None, **options) -> torch.Tensor:
    """(B, T) -> (B, T, V)."""
    return model.logits(model(tokens, at, **options).x)


def batches(count: int, micro: int, seed: int = 0) -> list[Batch]:
    """A step's micro-batches, for `train_step`."""
    tokens = some_tokens(count, 17, seed=seed)
    return [Batch(part[:, :-1], part[:, 1:]) for part in tokens.split(micro)]


def training_state(model: TransformerLM, optimizer=None, precision: str = "fp32", **fields: Any) -> TrainState:
    """The model in training, with that optimizer or plain gradient descent. fields: others of TrainState."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return TrainState(model, MixedPrecision(model, precision), optimizer, **fields)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected. NaN counts as infinite."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error.detach().nan_to_num(nan=float("inf")))


def changed(overrides: Sequence[str], *changes: str) -> list[str]:
    """The overrides and the changes, which take the place of those of the same setting: none may be given twice."""
    keys = {change.partition("=")[0] for change in changes}
    return [*(override for override in overrides if override.partition("=")[0] not in keys), *changes]


def assert_one_line(error: UserError | Unsupported) -> None:
    assert len(str(error).splitlines()) == 1, repr(str(error))


git_once = functools.cache(folder._git)  # each question, as long as tests run


def call(program: str, arguments: Sequence[str], monkeypatch, *, drawn: bool = False) -> int:
    """Runs train.py or sample.py in this process -> its exit code. drawn: with loss.png, which takes as long as ten
    steps. The text that training ends with is short."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr("train.compose_request", request_of)
        patch.setattr("generation.preview.MAX_NEW_TOKENS", 4)
        patch.setattr("training.run.folder._git", git_once)
        if not drawn:
            patch.setattr("training.monitor.monitor.plot_loss", lambda folder: None)
        try:
            importlib.import_module(program).main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def spread_out(model: torch.nn.Module) -> torch.nn.Module:
    """Models begin nearly uniform, which would hide differences."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if norm else noise * parameter.shape[-1] ** -0.5 * 2)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # by which experts are chosen
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    return model
