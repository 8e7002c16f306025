"""From runs to a report: which runs are compared, and every number of it.

A sweep has its cells; other runs are put together by their settings: those that differ in nothing but the seed are one
variant.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ablation.curves import curve_of
from ablation.decoding import decode_speeds
from ablation.match import measure
from ablation.outcome import Outcome, outcome_of
from ablation.pages.words import summary
from ablation.records import Record, read_record, short_name
from ablation.results import Cell, Report, Variant
from ablation.statistics import Comparison, Estimate, compare, estimate
from ablation.sweep.stored import Sweep, by_variant, hint_for, read_outcomes, read_sweep
from common.console import counted
from common.errors import UserError
from common.invocation import quoted
from model import cost
from training.run.config import flatten_config
from training.run.validation_errors import spelled

UNITS = {"val_bpb": "bits per byte", "val_loss": "nats per token"}
UNKNOWN = Estimate({}, math.nan, None, None)
CLASS = "._target_"  # the setting that names a choice's class
CHOSEN_LATER = (None, "auto")  # settings of a sweep that each run fills in
MACHINES = {"git_commit": "commit", "packages": "versions", "platform": "machine", "gpu": "GPU", "threads": "threads"}
EVEN = 1.5  # times its median, that the 90th percentile of a step's seconds may be on a machine that does nothing else
MAX_NAMED = 3  # runs
ENVIRONMENT = ("python", "platform", "packages", "threads", "gpu", "git_commit", "git_changes")


class Member(NamedTuple):
    """A run with its place in the comparison."""

    cell: Cell
    variant: str
    label: str
    seed: int
    record: Record


class Selection(NamedTuple):
    """What is compared, before anything is computed."""

    title: str
    members: list[Member]  # runs that have a result
    cells: list[Cell]  # all that were asked for
    notes: list[str]
    sweep: Sweep | None


def report_on(
    folders: Sequence[Path], *, baseline: str | None = None, force: bool = False, decode: bool = True
) -> Report:
    """folders: sweeps, or runs. baseline: a variant's name, or its label; unset: the first. force: compare across
    corpora and tokenizers. decode: measure the speed of decoding here. Raises UserError."""
    selection = select(folders)
    if not selection.members:
        outcomes = "; ".join(f"{cell.name}: {cell.detail or cell.state}" for cell in selection.cells[:3])
        more = f"; and {len(selection.cells) - 3} more" if len(selection.cells) > 3 else ""
        raise UserError(f"{selection.title} has nothing to compare: no run of it has finished ({outcomes}{more})")
    records = [member.record for member in selection.members]
    notes = [*selection.notes, *check_comparable(records, force)]
    groups = ordered(by_variant(selection.members), baseline)
    notes += baseline_note(selection, groups)
    variants = [variant_of(members, selection.sweep) for members in groups.values()]
    if decode:
        speeds = decode_speeds([members[0].record.folder for members in groups.values()])
        variants = [replace(one, decode_tokens_per_second=speed) for one, speed in zip(variants, speeds, strict=True)]
    metric = metric_of(selection.members)
    if len({record.tokenizer.hash for record in records}) > 1:
        variants = [replace(variant, val_loss=UNKNOWN) for variant in variants]  # nats per token of unlike tokens
    report = Report(
        accuracy=accuracy_of(variants, selection),
        title=selection.title,
        command=None if selection.sweep is None else "\n".join(map(_command, selection.sweep.commands)),
        hypothesis=None if selection.sweep is None else selection.sweep.hypothesis,
        match=[] if selection.sweep is None else selection.sweep.match,
        metric=metric,
        metric_name=UNITS[metric],
        comparison=comparison_of(variants, metric, selection),
        variants=variants,
        cells=selection.cells,
        summary=[],
        notes=[
            *notes,
            *start_notes(groups),
            *seed_notes(groups),
            *machine_notes(records),
            *load_notes(selection.members),
        ],
        config_differences=config_differences(groups),
        environment=environment_of(records),
        data=data_of(records),
    )
    return replace(report, summary=[*summary(report), *equal_time(selection.sweep, variants)])


def select(folders: Sequence[Path]) -> Selection:
    """Raises UserError for a folder that is neither a sweep nor a run, for sweeps beside runs, and for sweeps that have
    variants of one name."""
    sweeps = {folder: found for folder in folders if (found := read_sweep(folder)) is not None}
    if not sweeps:
        return select_runs(folders)
    run = next((folder for folder in folders if folder not in sweeps), None)
    if run is not None:
        raise UserError(
            f"{next(iter(sweeps))} is a sweep, and {run} is none: compare sweeps, or give runs, as in "
            "sweeps/NAME/*seed=1"
        )
    check_unlike(sweeps)
    labels = labels_of(dict.fromkeys(cell.variant for sweep in sweeps.values() for cell in sweep.cells))
    first, *others = [select_cells(folder, sweep, labels) for folder, sweep in sweeps.items()]
    return functools.reduce(together, others, first)


def check_unlike(sweeps: Mapping[Path, Sweep]) -> None:
    """Raise UserError for variants of one name in two sweeps."""
    having: dict[str, Path] = {}
    for folder, sweep in sweeps.items():
        for variant in by_variant(sweep.cells):
            if variant in having:
                raise UserError(
                    f"{having[variant]} and {folder} both have {variant}, which would be one variant: compare each "
                    "sweep alone, or give runs, as in sweeps/NAME/*seed=1"
                )
        having |= dict.fromkeys(by_variant(sweep.cells), folder)


def together(one: Selection, other: Selection) -> Selection:
    """Two sweeps as one: the baseline is the first's."""
    first, second = one.sweep, other.sweep
    both = first.model_copy(
        update={
            "commands": [*first.commands, *second.commands],
            "added": first.added | second.added,
            "match": first.match if first.match == second.match else [],
            "minutes": first.minutes if first.minutes == second.minutes else None,
            "hypothesis": "\n".join(dict.fromkeys(filter(None, (first.hypothesis, second.hypothesis)))) or None,
        }
    )
    return Selection(
        title=f"{one.title} and {other.title}",
        members=[*one.members, *other.members],
        cells=[*one.cells, *other.cells],
        notes=[*one.notes, *other.notes],
        sweep=both,
    )


def select_cells(folder: Path, sweep: Sweep, labels: Mapping[str, str]) -> Selection:
    outcomes = read_outcomes(folder)
    members, cells, notes = [], [], []
    for planned in sweep.cells:
        place = folder / planned.name
        found, record = recorded_outcome(place, outcomes.get(planned.name), sweep.settings[planned.variant])
        cell = new_cell(planned.name, planned.variant, planned.seed, place, found)
        if record is not None:
            cell, more = scored(cell, record)
            notes += more
            members.append(Member(cell, cell.variant, labels[cell.variant], record.run.seed, record))
        cells.append(cell)
    order = list(labels)  # by variant: whatever became of the first cells, the baseline comes first
    members.sort(key=lambda member: order.index(member.variant))
    return Selection(short_name(folder), members, cells, notes, sweep)


def recorded_outcome(folder: Path, recorded: str | None, settings: Mapping[str, Any]) -> tuple[Outcome, Record | None]:
    """What became of a sweep's cell, and its record where it counts. settings: the sweep's for its variant; a cell that
    somebody trained on with others is no longer a run of the sweep."""
    found = outcome_of(folder, recorded)
    if found.state != "finished":
        return found, None
    try:
        record = read_record(folder)
    except UserError as fault:
        return Outcome("damaged", str(fault)), None
    for key, value in flatten_config(settings).items():
        own = record.settings.get(key, value)
        if value not in CHOSEN_LATER and json.dumps(own) != json.dumps(value):
            return Outcome("altered", f"trained with {key}={own}, the sweep has {value}"), None
    return found, record


def new_cell(name: str, variant: str, seed: int | None, folder: Path, found: Outcome) -> Cell:
    """A cell without its losses."""
    return Cell(
        name=name,
        variant=variant,
        seed=seed,
        folder=str(folder),
        state=found.state,
        detail=found.detail,
        val_loss=None,
        val_bpb=None,
    )


def select_runs(folders: Sequence[Path]) -> Selection:
    """Runs of their own. One without a final loss stands with its last evaluation, and is not compared."""
    members, cells, notes = [], [], []
    named = [folder for folder in folders if not os.path.isfile(folder)]  # sweeps/NAME/* has a report's files, too
    for folder in dict.fromkeys(named or folders):
        record = _record(folder)
        name = str(folder)
        cell = new_cell(name, name, record.run.seed, folder, record.outcome)
        if last_scored(record) is None:
            notes.append(f"{folder} is passed over: it has no validation loss yet")
            cells.append(cell)
            continue
        cell, more = scored(cell, record)
        notes += more
        if record.final is None:
            notes.append(f"{folder} has not finished ({cell.detail}): what stands for it is its last evaluation")
        members.append(Member(cell, name, short_name(folder), record.run.seed, record))
        cells.append(cell)
    members = grouped(members)
    variants = {member.cell.name: member.variant for member in members}
    cells = [replace(cell, variant=variants.get(cell.name, cell.variant)) for cell in cells]
    title = " and ".join(dict.fromkeys(short_name(folder) for folder in folders)) if len(folders) <= 3 else ""
    return Selection(title or counted(len(folders), "run"), members, cells, notes, None)


def _record(folder: Path) -> Record:
    try:
        return read_record(folder)
    except UserError as error:
        raise UserError(f"{error}{hint_for(folder)}") from None


def grouped(members: list[Member]) -> list[Member]:
    """Put runs that differ in nothing but the seed together as one variant."""
    groups: list[list[Member]] = []
    for member in members:
        group = next((group for group in groups if _same_but_seed(group, member)), None)
        groups.append([member]) if group is None else group.append(member)
    names = _names([group[0] for group in groups], any(len(group) > 1 for group in groups))
    return [
        member._replace(variant=name, label=name if len(group) > 1 else member.label)
        for name, group in zip(names, groups, strict=True)
        for member in group
    ]


def _same_but_seed(group: list[Member], member: Member) -> bool:
    finished = member.record.final is not None and group[0].record.final is not None
    other_seed = member.seed not in {one.seed for one in group}
    return finished and other_seed and group[0].record.settings == member.record.settings


def _names(firsts: list[Member], several_seeds: bool) -> list[str]:
    """Of variants of ordinary runs: the choices they differ in, where these tell them apart; else folders' names."""
    folders = [member.variant for member in firsts]
    if not several_seeds:
        return folders
    choices = [member.record.environment.get("choices") or {} for member in firsts]
    keys = {key for one in choices for key in one if any(other.get(key) != one[key] for other in choices)}
    names = [",".join(f"{key}={one.get(key)}" for key in sorted(keys)) for one in choices]
    return names if keys and len(set(names)) == len(names) else folders


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """Shorter names: without the setting's, where all have one value of the same setting."""
    parts = [name.partition("=") for name in names]
    same_key = len({key for key, _, _ in parts}) == 1 and not any("," in value for _, _, value in parts)
    return {name: value if same_key and value else name for name, (_, _, value) in zip(names, parts, strict=True)}


def last_scored(record: Record) -> Mapping[str, Any] | None:
    return next((row for row in reversed(record.rows) if row.get("val_loss") is not None), None)


def scored(cell: Cell, record: Record) -> tuple[Cell, list[str]]:
    """The cell with its losses, and what is to be said of its metrics."""
    row = record.final or last_scored(record)
    notes = []
    if record.damaged_rows:
        rows = counted(record.damaged_rows, "damaged row")
        notes.append(f"{rows} of {record.folder}/metrics.jsonl: passed over; the curve has a gap there")
    numbers = {name: row.get(name) for name in ("val_loss", "val_bpb", "val_accuracy")}
    return replace(cell, **numbers), notes


def check_comparable(records: Sequence[Record], force: bool) -> list[str]:
    """Raise UserError for runs of different texts or vocabularies, unless forced -> what is to be said of them then."""
    first = records[0]
    notes = []
    for what, same in (("corpus", _same_corpus), ("tokenizer", _same_tokenizer)):
        other = next((record for record in records if not same(first, record)), None)
        if other is None:
            continue
        if not force:
            raise UserError(
                f"{first.folder} and {other.folder} have not the same {what}, so their losses are of different "
                "things: compare runs of one, or give --force, which compares bits per byte only"
            )
        notes.append(f"the runs have not the same {what}: only bits per byte are comparable, and those with care")
    return notes


def metric_of(members: Sequence[Member]) -> str:
    """Bits per byte; nats per token where a run of an old format has only these. Raises UserError where these would be
    of unlike tokens."""
    if all(_scored(member, "val_bpb") for member in members):
        return "val_bpb"
    if len({member.record.tokenizer.hash for member in members}) > 1:
        raise UserError("these runs have not the same tokenizer, and not all of them recorded bits per byte")
    return "val_loss"


def _same_corpus(one: Record, other: Record) -> bool:
    """By their fingerprints; by their settings where a run has no checkpoint that holds one."""
    if one.corpus is None or other.corpus is None:
        return one.run.data == other.run.data
    return one.corpus == other.corpus


def _same_tokenizer(one: Record, other: Record) -> bool:
    return one.tokenizer.hash == other.tokenizer.hash


def baseline_note(selection: Selection, groups: Mapping[str, list[Member]]) -> list[str]:
    """Where the sweep's own baseline has no run that counts."""
    reference = None if selection.sweep is None else selection.sweep.reference
    if reference is None or reference in groups:
        return []
    return [f"{reference}, the sweep's baseline, has no finished run: {next(iter(groups))} stands in its place"]


def ordered(groups: dict[str, list[Member]], baseline: str | None) -> dict[str, list[Member]]:
    """The baseline first. Raises UserError for one that is no variant."""
    if baseline is None:
        return groups
    names = {members[0].label: name for name, members in groups.items()} | {name: name for name in groups}
    if baseline not in names:
        raise UserError(f"--baseline {baseline} is no variant here: choose one of {', '.join(groups)}")
    first = names[baseline]
    return {first: groups[first], **groups}


def variant_of(members: list[Member], sweep: Sweep | None) -> Variant:
    first = members[0].record
    run = first.run
    added = [] if sweep is None else sweep.added.get(members[0].variant, [])
    cache = cost.cache_bytes(first.model, run.model.context_length)
    return Variant(
        name=members[0].variant,
        label=members[0].label,
        val_bpb=by_seed(members, lambda member: member.cell.val_bpb) or UNKNOWN,
        val_loss=by_seed(members, lambda member: member.cell.val_loss),
        val_accuracy=by_seed(members, lambda member: member.cell.val_accuracy),
        parameters=sum(first.parameters.values()),
        parameters_without_embedding=measure("params", run.model, first.tokenizer.vocab_size),
        flops_per_token=first.flops_per_token,
        cache_bytes_per_token=cache / run.model.context_length,
        cache_bytes_full=cache,
        context_length=run.model.context_length,
        steps=first.rows[-1]["step"],
        tokens=first.rows[-1]["step"] * run.batch_tokens,
        minutes=by_seed(members, lambda member: member.record.seconds[-1] / 60),
        tokens_per_second=by_seed(members, _speed),
        decode_tokens_per_second=None,
        memory_bytes=by_seed(members, lambda member: member.record.memory_bytes),
        matched=dict(word.split("=", 1) for word in added if not word.startswith("steps=")),
        active_parameters=cost.active_parameters(first.model) if cost.has_experts(first.model) else None,
        curves=[curve_of(member.record, member.seed) for member in members],
    )


def by_seed(members: Sequence[Member], number: Callable[[Member], float | None]) -> Estimate | None:
    found = {member.seed: value for member in members if (value := number(member)) is not None}
    return estimate(found) if found else None


def _speed(member: Member) -> float | None:
    seconds = member.record.seconds[-1]
    return member.record.rows[-1]["tokens"] / seconds if seconds else None


def _scored(member: Member, metric: str) -> bool:
    return getattr(member.cell, metric) is not None


def comparison_of(variants: Sequence[Variant], metric: str, selection: Selection) -> Comparison | None:
    """None where there is nothing to compare: one variant, or runs that have not finished."""
    if len(variants) < 2 or _any_unfinished(selection):
        return None
    table = {variant.name: getattr(variant, metric).values for variant in variants}
    return compare(table, variants[0].name)


def accuracy_of(variants: Sequence[Variant], selection: Selection) -> Comparison | None:
    """Likewise, and where some run has no answers."""
    measured = all(member.cell.val_accuracy is not None for member in selection.members)
    return comparison_of(variants, "val_accuracy", selection) if measured else None


def _any_unfinished(selection: Selection) -> bool:
    return any(member.record.final is None for member in selection.members)


def start_notes(groups: Mapping[str, list[Member]]) -> list[str]:
    """Where the optimizers that are compared chose the scale of the first logits, each its own."""
    unlike = config_differences(groups)
    starts = unlike.get("model.own_logit_init", {})
    if not starts or "optim" not in unlike or any("own_logit_init" in name for name in groups):
        return []
    values = ", ".join(f"{spelled(value)} of {name}" for name, value in starts.items())
    return [f"models begin unlike, model.own_logit_init is {values}: set it, and optimizers alone are compared"]


def seed_notes(groups: Mapping[str, list[Member]]) -> list[str]:
    """What the seeds leave open."""
    seeds = {name: {member.seed for member in members} for name, members in groups.items()}
    every = set().union(*seeds.values())
    if all(len(own) == 1 for own in seeds.values()):
        each = " of each variant" if len(seeds) > 1 else ""
        unlike = "; the seeds are not the same" if len(every) > 1 else ""
        return [f"one seed{each}: no interval and no p; the noise between seeds is not known{unlike}"]
    return [
        f"{name} lacks {'seed' if len(every - own) == 1 else 'seeds'} {', '.join(map(str, sorted(every - own)))}"
        for name, own in seeds.items()
        if own != every
    ]


def machine_notes(records: Sequence[Record]) -> list[str]:
    """Where runs come from unlike programs or machines, which can move losses a little and speeds a lot."""
    found = environment_of(records)
    unlike = [words for key, words in MACHINES.items() if isinstance(found[key], list)]
    return [f"the runs have not the same {' and '.join(unlike)}: see the environment"] if unlike else []


def load_notes(members: Sequence[Member]) -> list[str]:
    """Where runs went so unevenly that something else must have used the machine: losses are not touched by that."""
    slow = {member.cell.name: member.record.slowdown or 1 for member in members}
    busy = {name: found for name, found in slow.items() if found > EVEN}
    if not busy:
        return []
    names = ", ".join(list(busy)[:MAX_NAMED]) + (f" and {len(busy) - MAX_NAMED} more" if len(busy) > MAX_NAMED else "")
    return [
        f"the machine was busy while it trained {names}: a tenth of the steps took {max(busy.values()):.1f} times the "
        "median or longer; do not compare minutes and tokens per second"
    ]


def equal_time(sweep: Sweep | None, variants: Sequence[Variant]) -> list[str]:
    """The sentence on a budget of minutes."""
    if sweep is None or sweep.minutes is None:
        return []
    steps = ", ".join(f"{variant.name} {variant.steps:,}" for variant in variants)
    return [f"At equal training time, {sweep.minutes:g} minutes as measured before the first run: steps of {steps}."]


def config_differences(groups: Mapping[str, list[Member]]) -> dict[str, dict[str, Any]]:
    """Settings in which the variants differ; derived ones too, which is where a choice shows its consequences."""
    settings = {name: members[0].record.settings for name, members in groups.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    found = {key: {name: one.get(key, "-") for name, one in settings.items()} for key in keys}
    unlike = {key: values for key, values in found.items() if len(set(map(repr, values.values()))) > 1}
    kinds = {key.removesuffix(CLASS): _kinds(values) for key, values in unlike.items() if key.endswith(CLASS)}
    return kinds | {key: values for key, values in unlike.items() if not key.endswith(CLASS)}


def _kinds(values: Mapping[str, str]) -> dict[str, str]:
    """Classes as people say them: MLA for model.attention.mla.MLAConfig."""
    return {name: value.rpartition(".")[2].removesuffix("Config") for name, value in values.items()}


def _command(typed: Sequence[str]) -> str:
    """A sweep's command as it is written down: a report is read on other machines."""
    return " ".join(("python train.py -m", *map(quoted, typed)))


def environment_of(records: Sequence[Record]) -> dict[str, Any]:
    """Each thing once; where runs differ, a list."""
    found = {}
    for key in ENVIRONMENT:
        values = []
        for record in records:
            value = record.environment.get(key)
            if value not in values:
                values.append(value)
        found[key] = values[0] if len(values) == 1 else values
    return found


def data_of(records: Sequence[Record]) -> dict[str, Any]:
    first = records[0]
    return {
        "corpus": first.run.data.name,
        "fingerprint": first.corpus,
        "vocabulary": first.tokenizer.vocab_size,
        "tokenizer": first.tokenizer.hash,
        "validation tokens": (first.final or {}).get("val_tokens"),
    }
