"""What a comparison found: the content of report.json, and all that its pages, tables and pictures are made of."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ablation.outcome import State
from ablation.statistics import Comparison, Estimate


@dataclass(frozen=True)
class Curve:
    """One run's losses, thinned to at most some hundreds of points for pictures."""

    seed: int
    run: str  # its folder
    step: list[int]
    tokens: list[int]
    seconds: list[float]  # of training, evaluation and saving not counted
    flops: list[float]
    train_loss: list[float | None]  # nats per token, the mean over the steps since the point before
    train_bpb: list[float | None]  # the same in bits per byte
    val_step: list[int]  # of evaluations, the last of which is on the whole validation set
    val_tokens: list[int]  # trained on by then
    val_seconds: list[float]
    val_flops: list[float]
    val_loss: list[float]
    val_bpb: list[float | None]


@dataclass(frozen=True)
class Cell:
    """One run that was asked for, whatever became of it."""

    name: str  # attention=gqa,seed=1; of an ordinary run its folder's name
    variant: str
    seed: int | None
    folder: str
    state: State
    detail: str  # in words: exit code 2, diverged at step 120, 3 damaged rows of metrics; or ""
    val_loss: float | None  # final step, whole validation set
    val_bpb: float | None
    val_accuracy: float | None = None  # share of right answers; None for data that has none


@dataclass(frozen=True)
class Variant:
    """What the finished runs of a variant have in common, and their results over seeds."""

    name: str  # attention=gqa
    label: str  # gqa: shorter, as on axes and in tables
    val_bpb: Estimate
    val_loss: Estimate  # nats per token
    parameters: int
    parameters_without_embedding: int  # nor head nor positions
    flops_per_token: float  # of training
    cache_bytes_per_token: float  # KV cache in float32, all layers: of a full context, by its tokens
    cache_bytes_full: int  # of a full context
    context_length: int
    steps: int
    tokens: int  # trained on
    minutes: Estimate  # of training
    tokens_per_second: Estimate  # of training
    decode_tokens_per_second: float | None  # one text, measured on the machine of the report; None where not asked for
    memory_bytes: Estimate | None  # peak of training: of the process, or of the GPU
    matched: dict[str, Any]  # settings that the matching of budgets moved: {"mlp.d_ff": 528}
    active_parameters: int | None = None  # that one token meets, where experts make that fewer than all
    curves: list[Curve] = field(default_factory=list)
    val_accuracy: Estimate | None = None  # share of right answers; None for data that has none


@dataclass(frozen=True)
class Report:
    title: str  # the sweep's name, or "A and B"
    command: str | None  # that made the sweep; several, a line each, where later ones added to it
    hypothesis: str | None  # stated before it ran
    match: list[str]  # budgets that were matched
    metric: Literal["val_bpb", "val_loss"]  # what `comparison` is of
    metric_name: str  # bits per byte
    comparison: Comparison | None  # None where there is but one variant
    variants: list[Variant]  # the baseline first
    cells: list[Cell]  # all of them, in the order of the sweep
    summary: list[str]  # sentences, generated from the numbers
    notes: list[str]  # what limits the comparison: missing seeds, one seed only, damaged rows
    config_differences: dict[str, dict[str, Any]]  # setting -> value by variant, where the variants' settings differ
    environment: dict[str, Any]  # versions, commit, machine, threads; where runs differ, a list of values
    data: dict[str, Any]  # corpus, fingerprint, tokenizer, tokens of the validation set
    accuracy: Comparison | None = None  # of the shares of right answers, where the data has answers; higher is better
