"""Configuration of one run: whatever comes in as a tree of plain values leaves as a Run, or as one line of error."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from common.conf_files import choices
from common.errors import UserError
from common.settings import MAX_COUNT, Change, FrozenSettings
from data.sources.corpus import Corpus
from data.tokenizers.base import Tokenizer, TokenizerConfig
from model.attention.base import divisors
from model.cost import on_meta
from model.transformer import Dimensions, ModelConfig
from training.loggers.base import Logger
from training.optim.base import OptimConfig
from training.optim.schedule import Schedule
from training.parallel.config import Parallel
from training.run.composer import compose_tree
from training.run.parts import MODEL_PARTS, RUN_PARTS, dump_part, pop_part
from training.run.validation_errors import validated

MICRO_BATCH_TOKENS = 8192  # what an unset micro_batch_size amounts to
# Settings of a command, which no run stores. Those of a sweep are at these values in a command for one run.
OF_SWEEPS = {"sweep": None, "match": "none", "max_minutes": None, "hypothesis": None}
OF_COMMANDS = ("resume", "minutes", *OF_SWEEPS)


class Run(FrozenSettings):
    """Everything one training run depends on. The comments in conf/train.yaml describe each setting; the marks say when
    it may change."""

    steps: Annotated[int, Change.ON_RESUME] = Field(ge=1, le=MAX_COUNT)  # before the parts that derive from it
    model: Annotated[ModelConfig, Change.NEVER]
    data: Annotated[Corpus, Change.FINE_TUNING]
    tokenizer: Annotated[TokenizerConfig, Change.NEVER]
    optim: Annotated[OptimConfig, Change.FINE_TUNING]
    schedule: Annotated[Schedule, Change.FINE_TUNING]
    logger: Annotated[Logger, Change.ON_RESUME]
    parallel: Annotated[Parallel, Change.ON_RESUME]
    batch_tokens: Annotated[int, Change.FINE_TUNING] = Field(ge=1, le=MAX_COUNT)
    micro_batch_size: Annotated[int, Change.FINE_TUNING] = Field(ge=1, le=MAX_COUNT)
    clip_norm: Annotated[float, Change.FINE_TUNING] = Field(ge=0)
    max_skipped_updates: Annotated[int, Change.ON_RESUME] = Field(ge=1, le=MAX_COUNT)
    eval_every: Annotated[int, Change.ON_RESUME] = Field(ge=0, le=MAX_COUNT)
    eval_tokens: Annotated[int, Change.FINE_TUNING] = Field(ge=1, le=MAX_COUNT)
    eval_before: Annotated[bool | None, Change.FINE_TUNING]
    save_every: Annotated[int, Change.ON_RESUME] = Field(ge=1, le=MAX_COUNT)
    keep_last: Annotated[int, Change.ON_RESUME] = Field(ge=1, le=MAX_COUNT)
    sample_every: Annotated[int, Change.ON_RESUME] = Field(ge=0, le=MAX_COUNT)
    sample_prompt: Annotated[str | None, Change.FINE_TUNING]
    seed: Annotated[int, Change.FINE_TUNING] = Field(ge=0, lt=2**63)
    device: Annotated[str, Change.ON_RESUME]
    deterministic: Annotated[bool, Change.FINE_TUNING]
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32", "fp8"], Change.FINE_TUNING]
    compile: Annotated[bool, Change.FINE_TUNING]
    autotune: Annotated[bool, Change.FINE_TUNING]
    tune_malloc: Annotated[bool, Change.FINE_TUNING]
    init_from: Annotated[str | None, Change.FINE_TUNING]
    peak_flops: Annotated[float | None, Change.ON_RESUME] = Field(ge=1)
    profile_steps: Annotated[int, Change.ON_RESUME] = Field(ge=0, le=1000)
    log_attention: Annotated[bool, Change.ON_RESUME]
    activation_checkpointing: Annotated[bool, Change.ON_RESUME]
    document_mask: Annotated[bool, Change.FINE_TUNING]
    threads: Annotated[int | None, Change.ON_RESUME] = Field(ge=1, le=1024)
    dry_run: Annotated[bool, Change.ON_RESUME]
    run_dir: Annotated[str | None, Change.FINE_TUNING] = Field(min_length=1)
    cache_dir: Annotated[str, Change.ON_RESUME] = Field(min_length=1)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Self:
        """A tree of plain values, as composed from conf/ or read from a run's config.yaml -> Run. Raises UserError."""
        tree = dict(tree)
        dims = tree.pop("model", {})
        if not isinstance(dims, Mapping):
            raise UserError(f"model={dims!r}: choose one of {', '.join(choices('model'))}")
        validated(Dimensions, "model", dims)  # first: other parts' defaults refer to them
        parts = {name: pop_part(tree, name) for name in MODEL_PARTS | RUN_PARTS}
        model = validated(ModelConfig, "model", dims, {name: parts[name] for name in MODEL_PARTS})
        if model.own_logit_init == "auto":
            chosen = parts["optim"].own_logit_init if model.tie_embeddings else None
            model = model.model_copy(update={"own_logit_init": chosen})
        tree["micro_batch_size"] = _micro_batch_size(tree, model.context_length)
        return validated(cls, "", tree, {"model": model} | {name: parts[name] for name in RUN_PARTS})

    @field_validator("data")
    @classmethod
    def _derive_data(cls, data: Corpus, info: ValidationInfo) -> Corpus:
        return data.derive(info.data["model"].context_length) if "model" in info.data else data

    @field_validator("tokenizer")
    @classmethod
    def _derive_tokenizer(cls, tokenizer: TokenizerConfig, info: ValidationInfo) -> TokenizerConfig:
        data = info.data.get("data")
        return tokenizer if data is None else tokenizer.derive(data.name, data.numbers)

    @field_validator("optim")
    @classmethod
    def _derive_optim(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        return optim.derive(info.data["model"].d_model) if "model" in info.data else optim

    @field_validator("schedule")
    @classmethod
    def _derive_schedule(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        return schedule.derive(info.data["steps"]) if "steps" in info.data else schedule

    @model_validator(mode="after")
    def _tokenizer_has_text_to_learn(self) -> Self:
        if self.tokenizer.is_trained and not self.data.has_text:
            raise ValueError(
                f"data={self.data.name} has no text to train a tokenizer on: name the one that its tokens were made "
                "with, as tokenizer=gpt2"
            )
        return self

    @model_validator(mode="after")
    def _compiles_once(self) -> Self:
        kernel = self.model.kernel
        if self.compile and kernel.compiles_itself:
            name = type(kernel).__name__.lower()
            raise ValueError(f"kernel={name} compiles itself: choose compile=false, or kernel=auto")
        return self

    @model_validator(mode="after")
    def _autotunes_what_is_compiled(self) -> Self:
        if self.autotune and not self.compile:
            raise ValueError("autotune=true chooses among compiled kernels: set compile=true, or leave it")
        return self

    @model_validator(mode="after")
    def _clips_what_can_be(self) -> Self:
        reason = None if self.optim.qk_clip is None else self.model.attention.qk_clip_obstacle()
        if reason:
            raise ValueError(f"optim.qk_clip={self.optim.qk_clip}: {reason}, or leave optim.qk_clip unset")
        return self

    @model_validator(mode="after")
    def _groups_have_parameters(self) -> Self:
        if self.optim.groups:
            self.optim.check_groups(on_meta(self.model, vocab_size=1))  # the names are those of any vocabulary
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        window = self.model.context_length
        if self.batch_tokens < window:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is less than one window of model.context_length={window}: "
                "choose a multiple of it, or a shorter context"
            )
        if self.batch_tokens % window:
            below = self.batch_tokens // window * window
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of model.context_length={window}: "
                f"choose {below} or {below + window}"
            )
        if self.eval_tokens < window:
            raise ValueError(f"eval_tokens={self.eval_tokens} is less than model.context_length={window}")
        if self.sequences % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide the {self.sequences} sequences of "
                f"batch_tokens={self.batch_tokens}: choose one of "
                f"{', '.join(map(str, divisors(self.sequences)))}"
            )
        return self

    @property
    def sequences(self) -> int:
        """Training windows per optimizer step."""
        return self.batch_tokens // self.model.context_length

    @property
    def evaluates_before(self) -> bool:
        """Whether the validation set is scored before the first step."""
        return self.init_from is not None if self.eval_before is None else self.eval_before

    @property
    def compilation(self) -> tuple[bool, bool]:
        """Whether to compile, and whether to try several kernels."""
        return self.compile, self.autotune

    def lr_factor(self, step: int) -> float:
        """Fraction of its peak that every learning rate is at in the update that step (counted from 0) makes."""
        return self.schedule(step, self.steps)

    def document_start(self, tokenizer: Tokenizer) -> int | None:
        """The token that begins a document, where documents do not see each other (document_mask)."""
        return tokenizer.end_of_text if self.document_mask else None

    @property
    def counted_targets(self) -> Tensor | None:
        """Which targets of every window count, (T,) bool; None: all. Those that are chosen have one right answer, and
        evaluation measures accuracy."""
        counted = self.data.counted(self.model.context_length)
        return None if counted is None else torch.from_numpy(counted)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rates of the update that step makes, by their settings."""
        factor = self.lr_factor(step)
        return {name: peak * factor for name, peak in self.optim.base_lrs.items()}


def compose(*overrides: str) -> Run:
    """The run that `python train.py *overrides` makes; settings of the command, such as match=, are ignored. Raises
    UserError."""
    tree = compose_tree(*overrides)
    given = pop_command_settings(tree)
    if given["resume"] is not None:
        raise UserError("resume= goes on with a run's own settings, which conf/ does not compose: leave it out")
    return Run.from_tree(tree)


def pop_command_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Take the settings that belong to a command, not to a run, out of a composed tree -> these."""
    return {name: tree.pop(name) for name in OF_COMMANDS}


def check_not_of_sweep(given: Mapping[str, Any]) -> None:
    """Raise UserError where settings of a sweep were given to a single run."""
    for name, unset in OF_SWEEPS.items():
        if given[name] != unset:
            raise UserError(
                f"{name}={given[name]} is of a sweep: add -m, and, unless an experiment states them, several values "
                "to compare, as in attention=mha,mla"
            )


def dump(run: Run) -> dict[str, Any]:
    """The inverse of `Run.from_tree`: derived dimensions filled in, the form a run's config.yaml holds."""
    model = {name: getattr(run.model, name) for name in ModelConfig.model_fields if name not in MODEL_PARTS}
    scalars = {name: getattr(run, name) for name in Run.model_fields if name != "model" and name not in RUN_PARTS}
    parts = {name: getattr(run.model, name) for name in MODEL_PARTS} | {name: getattr(run, name) for name in RUN_PARTS}
    return {"model": model} | {name: dump_part(part) for name, part in parts.items()} | scalars


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of settings to `group.key`: value."""
    found = {}
    for key, value in tree.items():
        found |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _micro_batch_size(tree: Mapping[str, Any], context_length: int) -> Any:
    """As set; unset, the most sequences that divide the batch within 8192 tokens."""
    given, tokens = tree.get("micro_batch_size"), tree.get("batch_tokens")
    if given is not None or not isinstance(tokens, int):
        return given
    sequences, most = max(1, tokens // context_length), max(1, MICRO_BATCH_TOKENS // context_length)
    return max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)
