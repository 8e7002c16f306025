"""A comparison in plain words, generated from its numbers. Lower losses are better."""

from collections import Counter
from collections.abc import Callable, Sequence

from ablation.match import TOLERANCE
from ablation.pages.formats import compact, fixed, interval, p_value, places, signed
from ablation.results import Cell, Report, Variant
from ablation.statistics import LEVEL, Difference, Estimate
from common.console import counted

MAX_SENTENCES = 3  # of variants that are not distinguishable: more of them share one sentence
BUDGETS: dict[str, tuple[str, Callable[[Variant], float]]] = {
    "params": ("parameters (without embedding, head and positions)", lambda v: v.parameters_without_embedding),
    "flops": ("FLOPs per token", lambda v: v.flops_per_token),
    "cache": ("cache bytes per token", lambda v: v.cache_bytes_per_token),
}


def verdict(difference: Difference | None, higher_is_better: bool = False) -> str:
    """A few words on a variant against the baseline, for tables. None: it is the baseline itself."""
    if difference is None:
        return "baseline"
    if difference.p_corrected is None:
        return {"identical": "identical", "constant": "constant difference: no p"}.get(
            difference.method, "too few seeds: no p"
        )
    p = p_value(difference.p_corrected)
    direction = _direction(difference, higher_is_better)
    return f"{direction}, {p}" if is_distinguishable(difference) else f"not distinguishable, {p}"


def is_distinguishable(difference: Difference) -> bool:
    return difference.p_corrected is not None and difference.p_corrected < LEVEL


def _direction(difference: Difference, higher_is_better: bool = False) -> str:
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def summary(report: Report) -> list[str]:
    """Sentences that say what was found, how sure that is, and at which budgets. `report.summary` is not read."""
    sentences = _leader(report) if report.variants else []
    sentences += _comparisons(report)
    sentences += _accuracies(report)
    if len(report.variants) > 1:
        sentences += [_budget(report, name) for name in report.match if name in BUDGETS]
        sentences += _unmatched(report)
    return sentences + _without_result(report.cells)


def _leader(report: Report) -> list[str]:
    """The variant with the lowest loss, which need not be distinguishable from the next; nothing where two tie."""
    means = sorted(estimate(report, variant).mean for variant in report.variants)
    best = next(variant for variant in report.variants if estimate(report, variant).mean == means[0])
    found = estimate(report, best)
    spread = f" ± {fixed(found.sd, places(report))}" if found.sd is not None else ""
    value = f"{fixed(found.mean, places(report))}{spread} {report.metric_name} ({_of_seeds(len(found.values))})"
    if len(means) == 1:
        return [f"{best.name} ends at {value}."]
    noun = "variants" if report.command else "runs"
    first = f"Of {len(means)} {noun}, {best.name} ends lowest: {value}{_doubt(report, best.name)}."
    return [first] if means[0] < means[1] else []


def _doubt(report: Report, best: str) -> str:
    """Whether the lowest may be so by chance, as far as comparisons with the baseline tell."""
    alike = _not_distinguishable(report)
    if best in alike:
        return f", but is not distinguishable from {report.comparison.baseline}"
    if not alike or best != report.comparison.baseline:
        return ""
    if len(alike) == len(report.comparison.differences) > 1:
        return ", from which no other is distinguishable"
    if len(alike) > MAX_SENTENCES:
        return f", from which {len(alike)} of the others are not distinguishable"
    return f", from which {_listed(list(alike))} {'is' if len(alike) == 1 else 'are'} not distinguishable"


def _of_seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean ± sd of {count} seeds"


def estimate(report: Report, variant: Variant) -> Estimate:
    """The estimate of the report's metric."""
    return variant.val_bpb if report.metric == "val_bpb" else variant.val_loss


def frontier(report: Report) -> list[Variant]:
    """Variants whose mean loss no variant of as small a cache, or a smaller one, beats; the smallest cache first."""
    return _not_beaten(report, lambda variant: estimate(report, variant).mean)


def accuracy_frontier(report: Report) -> list[Variant]:
    """Likewise of the accuracy, of which more is better."""
    return _not_beaten(report, lambda variant: -variant.val_accuracy.mean)


def _not_beaten(report: Report, cost: Callable[[Variant], float]) -> list[Variant]:
    best: list[Variant] = []
    for variant in sorted(report.variants, key=lambda v: (v.cache_bytes_per_token, cost(v))):
        if not best or cost(variant) < cost(best[-1]):
            best.append(variant)
    return best


def has_accuracy(report: Report) -> bool:
    """Whether every variant was asked for answers."""
    return bool(report.variants) and all(variant.val_accuracy is not None for variant in report.variants)


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """Names without their middle where they are longer than the limit; as they are, where two would be the same."""
    short = [
        name if len(name) <= limit else f"{name[: limit // 2]}…{name[len(name) - (limit - 1) // 2 :]}" for name in names
    ]
    return short if len(set(short)) == len(names) else list(names)


def _comparisons(report: Report) -> list[str]:
    if report.comparison is None:
        return []
    differences = report.comparison.differences
    alike = _not_distinguishable(report)
    single = alike if len(alike) <= MAX_SENTENCES else {}
    sentences = [
        _comparison(report, name, found) for name, found in differences.items() if name not in alike or name in single
    ]
    if alike and not single:
        sentences.append(_alike(report, alike))
    if differences and all(found.method == "too few" for found in differences.values()):
        sentences.append(_too_few(report))
    return sentences


def _accuracies(report: Report) -> list[str]:
    """Shares of right answers, by name, and which of them differ from the baseline's."""
    if not has_accuracy(report):
        return []
    shares = [f"{variant.name} {fixed(variant.val_accuracy.mean, 3)}" for variant in report.variants]
    sentences = [f"Accuracy, the share of right answers: {', '.join(shares)}."]
    differences = {} if report.accuracy is None else report.accuracy.differences
    for name, found in differences.items():
        if is_distinguishable(found):
            bounds = f"95 % interval {interval(found.interval, 3)}, {p_value(found.p_corrected)}"
            direction = "more" if found.mean > 0 else "less"
            sentences.append(
                f"{name} is right {direction} often than {report.accuracy.baseline}: difference "
                f"{signed(found.mean, 3)} ({bounds})."
            )
    return sentences


def comparisons(report: Report) -> int:
    """How many p-values the report has, each of which is corrected for all."""
    return sum(found.p is not None for found in report.comparison.differences.values()) if report.comparison else 0


def _not_distinguishable(report: Report) -> dict[str, Difference]:
    """Variants whose p is too large to tell them from the baseline."""
    differences = report.comparison.differences if report.comparison else {}
    return {name: found for name, found in differences.items() if found.p is not None and not is_distinguishable(found)}


def power(report: Report) -> str:
    """The end of a sentence on true differences of a size."""
    return f"would have been found in 80 % of such {'sweeps' if report.command else 'comparisons'}"


def _comparison(report: Report, name: str, found: Difference) -> str:
    """One variant against the baseline."""
    baseline = report.comparison.baseline
    decimals = places(report)
    if found.method == "identical":
        return f"{name} is identical to {baseline} at every seed."
    if found.p is not None and not is_distinguishable(found):
        return (
            f"{name} is not distinguishable from {baseline}: difference {signed(found.mean, decimals)} "
            f"({_certainty(report, found)}){_could_have_seen(report, [found])}."
        )
    side = "above" if found.mean > 0 else "below"
    ends = f"{name} ends {fixed(abs(found.mean), decimals)} {report.metric_name} {side} {baseline}"
    if found.method == "constant":
        return f"{ends} at every seed alike: no interval, and no p."
    if found.p is None:
        return f"{ends}{_few_seeds(report, found)}."
    return f"{ends}: {_direction(found)} ({_certainty(report, found)})."


def _certainty(report: Report, found: Difference) -> str:
    method = "; Welch's test, since no seeds are common" if found.method == "Welch" else ""
    shown = f"95 % interval {interval(found.interval, places(report))}"
    p = p_value(found.p_corrected)
    compared = comparisons(report)
    if compared < 2:
        return f"{shown}, {p}{method}"
    if found.p < LEVEL <= found.p_corrected:
        alone = f"taken alone, {shown} and {p_value(found.p)}"
        return f"{alone}; but one of {compared} comparisons looks so by chance more often: corrected, {p}{method}"
    return f"{shown} if taken alone; corrected for {compared} comparisons, {p}{method}"


def _could_have_seen(report: Report, alike: Sequence[Difference]) -> str:
    sizes = [fixed(size, places(report)) for size in sorted(found.detectable for found in alike if found.detectable)]
    if not sizes:
        return ""
    several = f"{sizes[0]} to {sizes[-1]} or more, depending on the variant,"
    return f"; true differences of {f'{sizes[0]} or more' if sizes[0] == sizes[-1] else several} {power(report)}"


def _few_seeds(report: Report, found: Difference) -> str:
    """Why this variant has no p, unless that holds of all, which is said once for all."""
    if all(other.method == "too few" for other in report.comparison.differences.values()):
        return ""
    return f" at {counted(len(found.seeds), 'common seed')}: no interval, and no p"


def _too_few(report: Report) -> str:
    if all(len(estimate(report, variant).values) == 1 for variant in report.variants):
        return "One seed each: no interval, and no p. Two seeds of one variant may differ as much."
    return "Too few seeds are common: no interval, and no p."


def _alike(report: Report, alike: dict[str, Difference]) -> str:
    """Many variants that are not distinguishable, in one sentence."""
    decimals = places(report)
    shown = ", ".join(f"{name} ({signed(found.mean, decimals)})" for name, found in alike.items())
    limits = _could_have_seen(report, list(alike.values()))
    return f"{len(alike)} variants are not distinguishable from {report.comparison.baseline}: {shown}{limits}."


def _budget(report: Report, name: str) -> str:
    """A budget that was matched, and how well that succeeded."""
    words, value_of = BUDGETS[name]
    reference = value_of(report.variants[0])
    off = max(abs(value_of(variant) - reference) / max(reference, 1) for variant in report.variants)
    if off == 0:
        return f"At equal {words}: {compact(reference)} each."
    if off < TOLERANCE:
        return f"At equal {words}: within {_percent(off)} of {compact(reference)}."
    return f"{words[0].upper()}{words[1:]} were to be matched, but differ by up to {_percent(off)}."


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _unmatched(report: Report) -> list[str]:
    """The budgets that were not matched and differ: named, since a reader would compare at unequal ones."""
    sentences = []
    for name, (words, value_of) in BUDGETS.items():
        values = [value_of(variant) for variant in report.variants]
        if name in report.match or max(values) - min(values) <= TOLERANCE * max(values):
            continue
        sentences.append(_caches(report) if name == "cache" else _unequal(report, words, value_of))
    return sentences


def _caches(report: Report) -> str:
    """Cache bytes per token, by name; variants of equal ones together."""
    by_bytes: dict[int, list[str]] = {}
    for variant in report.variants:
        by_bytes.setdefault(round(variant.cache_bytes_per_token), []).append(variant.name)
    groups = sorted(by_bytes.items())
    if len(report.variants) > 6:
        return _unequal(report, *BUDGETS["cache"])
    (least, names), *rest = groups
    separator = ", " if len(groups) == len(report.variants) else "; "
    others = separator.join(f"{_listed(names)} {count:,}" for count, names in rest)
    verb = "caches" if len(names) == 1 else "cache"
    return f"Cache not matched: {_listed(names)} {verb} {counted(least, 'byte')} per token{separator}{others}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _unequal(report: Report, words: str, value_of: Callable[[Variant], float]) -> str:
    smallest = min(report.variants, key=value_of)
    largest = max(report.variants, key=value_of)
    return (
        f"{words[0].upper()}{words[1:]} are not matched: from {compact(value_of(smallest))} ({smallest.name}) "
        f"to {compact(value_of(largest))} ({largest.name})."
    )


def _without_result(cells: Sequence[Cell]) -> list[str]:
    """One sentence about the cells that did not finish, none where all did."""
    counts = Counter(cell.state for cell in cells if cell.state != "finished")
    if not counts:
        return []
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    return [f"{counts.total()} of {counted(len(cells), 'run')} have no result: {shown}."]


def outcome(cell: Cell) -> str:
    """attention=gqa,seed=1: failed, exit code 2."""
    detail = cell.detail.rstrip(".")
    if not detail or cell.state in detail:
        return f"{cell.name}: {detail or cell.state}"
    return f"{cell.name}: {cell.state}, {detail}"
