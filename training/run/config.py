"""The border: whatever comes in as text or a tree of plain values leaves it typed, or as one clear line of error.

YAML names a config class (`_target_: model.attention.mla.MLAConfig`). It is resolved here and nowhere else: Hydra's
`instantiate` would call anything a configuration names, and a checkpoint's configuration is somebody's file.
"""

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from common.conf_files import choices
from common.errors import UserError, in_part
from common.invocation import ROOT
from common.settings import MAX_COUNT, Change, FrozenSettings
from common.suggestions import RENAMED, renamed
from data.sources.corpus import Corpus
from data.sources.mix import MixCorpus, Part
from data.tokenizers.base import TokenizerConfig
from model.attention.base import AttentionChoice, AttentionConfig, divisors
from model.attention.stack import StackConfig
from model.kernels.base import Kernel
from model.mlp import MLPConfig
from model.transformer import Dimensions, ModelConfig
from training.loggers.base import Logger
from training.optim.base import OptimConfig
from training.optim.schedule import Schedule
from training.run.composer import choice, compose_tree

MODEL_PARTS = {"attention": AttentionChoice, "mlp": MLPConfig, "kernel": Kernel}
RUN_PARTS = {
    "data": Corpus,
    "tokenizer": TokenizerConfig,
    "optim": OptimConfig,
    "schedule": Schedule,
    "logger": Logger,
}
HAVE_PARTS = {"attention": "stack", "data": "mix"}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
KINDS = {  # what a value is asked to be, by how pydantic's name for the error begins
    "int": "a whole number, written in digits",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "dict": "a dict, as {name: value}",
    "string": """text; what looks like something else goes in two pairs of quotes: '"7"'""",
}
MICRO_BATCH_TOKENS = 8192  # what an unset micro_batch_size amounts to


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
        _build(Dimensions, "model", dims, {})  # first: other parts' defaults refer to them
        parts = {name: _part(tree, name, base) for name, base in (MODEL_PARTS | RUN_PARTS).items()}
        model = _build(ModelConfig, "model", dims, {name: parts[name] for name in MODEL_PARTS})
        tree["micro_batch_size"] = _micro_batch_size(tree, model.context_length)
        return _build(cls, "", tree, {"model": model} | {name: parts[name] for name in RUN_PARTS})

    @field_validator("optim")
    @classmethod
    def _derive_optim(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        return optim.derive(info.data["model"].d_model) if "model" in info.data else optim

    @field_validator("schedule")
    @classmethod
    def _derive_schedule(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        return schedule.derive(info.data["steps"]) if "steps" in info.data else schedule

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

    def lr(self, step: int) -> float:
        """Learning rate of the update that step (counted from 0) makes."""
        return self.learning_rates(step)["lr"]

    def learning_rates(self, step: int) -> dict[str, float]:
        """All of them, where an optimizer has more than one, by their settings."""
        factor = self.schedule(step, self.steps)
        return {name: peak * factor for name, peak in self.optim.base_lrs.items()}


def compose(*overrides: str) -> Run:
    """The run that `python train.py *overrides` makes. Raises UserError."""
    tree = compose_tree(*overrides)
    if tree.pop("resume") is not None:
        raise UserError("resume= goes on with a run's own settings, which conf/ does not compose: leave it out")
    return Run.from_tree(tree)


def load(tree: Mapping[str, Any]) -> Run:
    """A tree as read from a run's config.yaml -> Run. Raises UserError."""
    return Run.from_tree(tree)


def dump(run: Run) -> dict[str, Any]:
    """The inverse of `Run.from_tree`: derived dimensions filled in, the form a run's config.yaml holds."""
    model = {name: getattr(run.model, name) for name in ModelConfig.model_fields if name not in MODEL_PARTS}
    scalars = {name: getattr(run, name) for name in Run.model_fields if name != "model" and name not in RUN_PARTS}
    parts = {name: getattr(run.model, name) for name in MODEL_PARTS} | {name: getattr(run, name) for name in RUN_PARTS}
    return {"model": model} | {name: _dump_part(part) for name, part in parts.items()} | scalars


def load_choice(group: str, name: str) -> Any:
    """One of a group's choices with its default settings, outside a run. Raises UserError for an unknown one."""
    if name not in choices(group):
        raise UserError(f"{group}={name}: choose one of {', '.join(choices(group))}")
    return _part({group: choice(group, name)}, group, (MODEL_PARTS | RUN_PARTS)[group])


def resolve_target(target: Any, base: type, key: str) -> type[BaseModel]:
    """The class a `_target_` names: defined in a file of this project's own packages, and a kind of `base`."""
    problem = UserError(f"{key}._target_={target!r} does not name a {base.__name__} of this project")
    if not isinstance(target, str) or not re.fullmatch(r"(model|data|training)(\.[a-z_0-9]+)+\.[A-Za-z_0-9]+", target):
        raise problem
    module_name, _, class_name = target.rpartition(".")
    if not ROOT.joinpath(*module_name.split(".")).with_suffix(".py").is_file():
        raise problem
    found = vars(importlib.import_module(module_name)).get(class_name)
    defined_there = inspect.isclass(found) and found.__module__ == module_name
    if not defined_there or not issubclass(found, base) or inspect.isabstract(found):
        raise problem
    return found


def _part(tree: dict[str, Any], name: str, base: type) -> BaseModel:
    section = tree.pop(name, None)
    if not isinstance(section, Mapping):
        raise UserError(f"{name}={section!r}: choose one of {', '.join(choices(name))}")
    return _typed(dict(section), name, base)


def _typed(section: dict[str, Any], key: str, base: type) -> BaseModel:
    cls = resolve_target(section.pop("_target_", None), base, key)
    if "parts" in section and key in HAVE_PARTS and "parts" not in cls.model_fields:
        raise UserError(f"{_first_setting(key, 'parts', section['parts'])}: parts are of {key}={HAVE_PARTS[key]}")
    if cls is MixCorpus and isinstance(section.get("parts"), Mapping):
        section["parts"] = {name: _mixed(f"{key}.parts.{name}", name, part) for name, part in section["parts"].items()}
    if cls is StackConfig:
        section |= _of_stack(key, section)
    if issubclass(cls, AttentionConfig):
        section = choice("mask", "study") | section  # off, where they are not in view
    return _build(cls, key, section, {})


def _first_setting(key: str, name: Any, value: Any) -> str:
    """As it was typed, of a tree of settings the first."""
    while isinstance(value, Mapping) and value:
        key, (name, value) = _dotted(key, name), next(iter(value.items()))
    return f"{_dotted(key, name)}={value!r}"


def _mixed(key: str, name: str, given: Any) -> Part:
    """A part of a mix, as typed (a quota, or a quota and settings of conf/data) or as dumped (a quota and a corpus)."""
    part = dict(given) if isinstance(given, Mapping) else {"quota": given}
    corpus = part.pop("corpus", None)
    if "quota" not in part:
        raise UserError(f"{key}.quota is not set: give {key}.quota=...")
    quota = {"quota": part.pop("quota")}
    if not isinstance(corpus, Mapping):
        corpus, part = _chosen(key, "data", {"data": name} | part, {}), {}
    return _build(Part, key, quota | part, {"corpus": _typed(dict(corpus), key, Corpus)})


def _of_stack(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The pattern and the parts of a stack. Its position is of all parts that do not say otherwise."""
    if not isinstance(section.get("pattern"), list):
        raise UserError(f"{key}.pattern={section.get('pattern')}: give a list of parts, as [local, local, global]")
    _check_no_mask(key, section)
    found: dict[str, Any] = {"pattern": tuple(section["pattern"])}  # YAML has no tuples
    if isinstance(section.get("parts"), Mapping):
        common = {"position": section["position"]} if "position" in section else {}
        found["parts"] = {name: _stacked(key, name, section["parts"], common) for name in section["parts"]}
    return found


def _check_no_mask(key: str, section: Mapping[str, Any]) -> None:
    switches = choice("mask", "study")
    given = [name for name in switches if name in section]
    if given:
        first = "mask=study" if len(given) == len(switches) else f"{key}.{given[0]}={_spelled(section[given[0]])}"
        own = f"{key}.parts.{next(iter(section.get('parts') or ['local']))}.{given[0]}="
        raise UserError(f"{first} does not go with a stack, whose parts have their own masks: set it there, as {own}")


def _stacked(key: str, name: str, parts: Mapping[str, Any], common: Mapping[str, Any]) -> AttentionConfig:
    """A part of a stack, as typed (a choice of conf/attention and settings of it) or as dumped (with its class)."""
    given, key = parts[name], f"{key}.parts.{name}"
    part = {"attention": given} if isinstance(given, str) else given
    if not isinstance(part, Mapping) or not part.keys() & {"attention", "_target_"}:
        close = difflib.get_close_matches(str(name), [str(other) for other in parts if other != name], n=1, cutoff=0.75)
        hint = f"did you mean part {close[0]}? Or " if close else ""
        raise UserError(f"{_first_setting('', key, given)}: {hint}choose its attention, as {key}.attention=gqa")
    if part.get("attention") == "stack":
        raise UserError(f"{key}.attention=stack: a part is one attention, choose another one")
    settings = _chosen(key, "attention", part, common) if "attention" in part else {**common, **part}
    return _typed(settings, key, AttentionConfig)


def _chosen(key: str, group: str, part: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of a group that `part` names, with what is said for all parts and the settings that `part` changes."""
    changes = dict(part)
    name = changes.pop(group)
    if name not in choices(group):
        raise UserError(
            f"{key}: there is no {group}={name}: choose one of {', '.join(choices(group))}, as {key}.{group}="
        )
    settings = {**choice(group, name), **common, **changes}
    missing = [setting for setting, value in settings.items() if value == "???"]
    if missing:
        raise UserError(f"{key}.{missing[0]} is not set: give it a value")
    return settings


def _micro_batch_size(tree: Mapping[str, Any], context_length: int) -> Any:
    """As set; unset, the most sequences that divide the batch within 8192 tokens."""
    given, tokens = tree.get("micro_batch_size"), tree.get("batch_tokens")
    if given is not None or not isinstance(tokens, int):
        return given
    sequences, most = max(1, tokens // context_length), max(1, MICRO_BATCH_TOKENS // context_length)
    return max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)


def _dump_part(part: BaseModel) -> dict[str, Any]:
    target = {"_target_": f"{type(part).__module__}.{type(part).__name__}"}
    if isinstance(part, MixCorpus):
        parts = {name: {"quota": one.quota, "corpus": _dump_part(one.corpus)} for name, one in part.parts.items()}
        return target | part.model_dump(exclude={"parts"}) | {"parts": parts}
    if isinstance(part, StackConfig):
        parts = {name: _dump_part(one) for name, one in part.parts.items()}
        return target | {"pattern": list(part.pattern), "position": part.position, "parts": parts}
    return target | part.model_dump()


def _build(cls: type, key: str, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    unknown = [name for name in settings if name not in cls.model_fields]
    if unknown:
        name, valid = unknown[0], [field for field in cls.model_fields if field not in parts]
        if _dotted(key, name) in RENAMED:
            raise UserError(renamed(_dotted(key, name)))
        close = difflib.get_close_matches(str(name), valid, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{_dotted(key, name)}={settings[name]!r}: no such key; {hint}valid: {', '.join(valid) or 'none'}"
        )
    try:
        return cls.model_validate({**settings, **parts})
    except ValidationError as error:
        raise UserError(_one_line(cls, key, error)) from None


def _one_line(cls: type[BaseModel], key: str, error: ValidationError) -> str:
    first, *rest = error.errors()
    if first["type"] == "value_error":  # ours: it names the value itself
        message = str(first["ctx"]["error"])
        message = in_part(key, message) if ".parts." in key else message
    else:
        message = _complaint(_dotted(key, *first["loc"]), first, _limits(cls, *first["loc"]))
    return message + (f" (and {len(rest)} more)" if rest else "")


def _limits(cls: type[BaseModel], field: Any, *_: Any) -> dict[str, Any]:
    """What a field's numbers are held to, by pydantic's names for it."""
    known = cls.model_fields[field].metadata if field in cls.model_fields else ()
    return {name: limit for one in known if isinstance(one, Ge | Gt | Le | Lt) for name, limit in asdict(one).items()}


def _complaint(where: str, error: Mapping[str, Any], field_limits: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words that know nothing of schemas. field_limits: of both sides, where there are
    two; the error tells only the one that was passed."""
    kind, limits, given = error["type"], error.get("ctx", {}), f"{where}={_spelled(error['input'])}"
    if kind == "missing":
        return f"{where} is not set: give {where}=..."
    if kind in ("string_too_short", "too_short"):
        return f"{given} is empty: give it a value"
    if kind == "literal_error":
        return f"{given}: choose " + limits["expected"].replace("'", "")
    if limits.keys() & LIMITS.keys():
        both = {name: limit for name, limit in {**field_limits, **limits}.items() if name in LIMITS}
        words = (f"{LIMITS[name]} {_in_digits(limit)}" for name, limit in both.items())
        return f"{given}: give {' and '.join(words)}"
    wanted = next((words for name, words in KINDS.items() if kind.startswith(name)), None)
    return f"{given}: give {wanted}" if wanted else f"{given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _in_digits(limit: float) -> str:
    """Write a whole number without a decimal point, and any other as short as it is exact."""
    return str(int(limit)) if limit == int(limit) and abs(limit) < 2**64 else str(limit)


def _spelled(value: Any) -> str:
    """As it is typed: YAML has its own words for None, True and False."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _dotted(*path: Any) -> str:
    return ".".join(str(part) for part in path if part != "")
