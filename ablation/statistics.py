"""How sure a comparison of variants is: intervals, paired differences to a baseline, corrected p-values, and the
difference that could have been seen. Numbers in, numbers out.

docs/statistics.md explains it to a reader of reports, with measured rates of false alarms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import nct, ttest_ind

Table = Mapping[str, Mapping[int, float]]  # by variant, then by seed: one number of each run
Method = Literal["paired, pooled sd", "paired, own sd", "Welch", "identical", "constant", "too few"]

LEVEL = 0.05  # false alarms that are accepted: in an interval, and over all comparisons of a table
POWER = 0.8  # of the detectable difference
WIDE = 2  # times the others' sd: from there on a variant is judged by its own
ROUNDING = 1e-12  # relative to the values: a spread below it comes of float64, not of the runs


@dataclass(frozen=True)
class Estimate:
    """One number of a variant over its seeds."""

    values: dict[int, float]  # by seed
    mean: float
    sd: float | None  # with n - 1 in the denominator; None for one seed
    interval: (
        tuple[float, float] | None
    )  # 95 % of the mean, by Student's t with this variant's own sd; None for one seed


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline."""

    mean: float  # over `seeds`; where no seeds are common (Welch), of the two means
    seeds: list[int]  # common to both; empty where none are
    method: Method
    sd: float | None  # of a difference at one seed, as used for p: sqrt(2) times the pooled sd, or the own one; of
    # Welch the root of the sum of both variances
    own_sd: float | None  # of the differences of this variant alone; None with fewer than two
    df: float | None  # degrees of freedom
    interval: tuple[float, float] | None  # 95 %, not corrected for the number of comparisons
    p: float | None  # two-sided, not corrected
    p_corrected: float | None  # Holm's, over all variants of the table that have a p
    detectable: float | None  # the difference that this table would have seen with 80 % power, at 5 % corrected


@dataclass(frozen=True)
class Comparison:
    """A table's variants against its baseline."""

    baseline: str
    pooled_sd: float | None  # of one run about its variant and seed, over all variants but those that repeat another
    pooled_df: int  # (k - 1)(n - 1) where no cell is missing
    differences: dict[str, Difference]  # by variant, without the baseline


class _Spread(NamedTuple):
    """Residual sd of runs about their variant and seed."""

    sd: float
    df: int


class _Test(NamedTuple):
    """What a two-sided t test needs; the last three None where there is none."""

    method: Method
    seeds: list[int]
    mean: float
    own_sd: float | None
    sd: float | None = None
    df: float | None = None
    standard_error: float | None = None  # of `mean`

    @property
    def p(self) -> float | None:
        if self.standard_error is None:
            return None
        return float(2 * stdtr(self.df, -abs(self.mean / self.standard_error)))


def estimate(values: Mapping[int, float]) -> Estimate:
    """Mean, sd and 95 % interval of a variant over its seeds: mean ± t(0.975, n − 1) · sd / sqrt(n).

    The values are in whatever unit, and so are the results. Raises ValueError where there is no value, or one that is
    not finite.
    """
    _check_values(values, "a variant")
    numbers = np.array(list(values.values()), float)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Estimate(dict(values), mean, None, None)
    sd = float(numbers.std(ddof=1))
    return Estimate(dict(values), mean, sd, _interval(mean, sd / len(numbers) ** 0.5, len(numbers) - 1))


def compare(table: Table, baseline: str) -> Comparison:
    """Compare each variant with the baseline: by a two-sided t test of the paired differences on the seeds both have.

    Runs of one seed see the same text in the same order, and share the initial weights that they can: y = variant +
    seed + e, the additive model of randomized blocks (Fisher 1935, The Design of Experiments). A difference is the mean
    of n paired ones, its standard error s · sqrt(2 / n), where s is the sd of e, pooled over all variants: the residual
    sd of the model fitted by least squares, with (k − 1)(n − 1) degrees of freedom where no cell is missing. With two
    variants this is the ordinary paired t test.

    s is one number for variants that may differ in spread. So a variant whose own differences have an sd of more than
    twice sqrt(2) · s is tested by its own, with n − 1 degrees of freedom; s is here that of the others, for with itself
    in the pool one erratic variant of k has at most sqrt(k / 2) times the pooled sd, which is never twice it below k =
    9. Where any difference is as wide against the table without the baseline, it is the baseline that varies, and all
    are tested by their own. What is wide stays in the pool: left out, s would be that of variants picked for varying
    little, and there would be more than 5 % of false alarms. The price is that beside an erratic variant, small
    differences of the others are not found; a comparison without it finds them.

    p-values are corrected for their number by Holm (1979, Scand. J. Statist. 6). Variants that have no seed in common
    with the baseline are compared by Welch's test (1947, Biometrika 34), which pairs and pools nothing.

    Raises ValueError for a baseline that is not in the table, a variant without runs, and a value that is not finite.
    """
    if baseline not in table:
        raise ValueError(f"the baseline {baseline} is none of the variants {', '.join(table)}")
    for name, values in table.items():
        _check_values(values, name)
    distinct = _distinct(table)
    pool = _pool(distinct)
    wide = _wide(table, distinct, baseline)
    tests = {
        name: _test(values, table[baseline], pool, name in wide) for name, values in table.items() if name != baseline
    }
    corrected = holm({name: test.p for name, test in tests.items() if test.p is not None})
    differences = {name: _difference(test, corrected.get(name), len(corrected)) for name, test in tests.items()}
    return Comparison(baseline, pool and pool.sd, pool.df if pool else 0, differences)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number m: the i-th smallest (from 0) is multiplied by m − i, and is at least as large
    as those before it and at most 1 (Holm 1979). The chance that any of those without a true difference is below 0.05
    is then at most 5 %, however they depend on each other."""
    corrected = {}
    largest = 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = largest
    return corrected


@lru_cache(maxsize=10_000)
def detectable_ratio(df: float, level: float) -> float:
    """The true difference, in standard errors, at which a two-sided t test at this level rejects with probability
    POWER: the root in δ of P(|T| > t(1 − level/2, df)) = POWER for T of the noncentral t distribution with δ."""
    critical = float(stdtrit(df, 1 - level / 2))

    def missing(shift: float) -> float:
        # The lower tail, mirrored: scipy's cdf is NaN for some shifts far above it.
        return nct.sf(critical, df, shift) + nct.sf(critical, df, -shift) - POWER

    return float(brentq(missing, 0, 3 * critical + 3))


def _check_values(values: Mapping[int, float], variant: str) -> None:
    if not values:
        raise ValueError(f"{variant} has no runs")
    for seed, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f"{variant} has the value {value} at seed {seed}: only finite ones can be compared")


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Differences at the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def _constant(differences: Mapping[int, float], values: Mapping[int, float]) -> bool:
    """Whether differences are the same at every seed, to within the rounding of the values they are of: of two or more
    seeds, or all zero."""
    numbers = differences.values()
    if not any(numbers):
        return bool(numbers)
    return len(numbers) > 1 and max(numbers) - min(numbers) <= ROUNDING * max(map(abs, values.values()))


def _repeats(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    return _constant(_paired(one, other), other)


def _distinct(table: Table) -> Table:
    """The table without the variants that repeat an earlier one: two names of one model are one model, and would make
    the pooled sd look smaller, and surer, than it is."""
    distinct: dict[str, Mapping[int, float]] = {}
    for name, values in table.items():
        if not any(_repeats(values, other) for other in distinct.values()):
            distinct[name] = values
    return distinct


def _pool(table: Table) -> _Spread | None:
    """The residual sd s = sqrt(RSS / df) of the additive model of variant and seed, fitted by least squares to the
    cells of seeds that two or more variants have; df is their number less the rank of the design. None where df is 0.
    """
    seeds = {seed: None for values in table.values() for seed in values}
    shared = {seed: i for i, seed in enumerate(seeds) if sum(seed in values for values in table.values()) > 1}
    columns = {seed: i for i, seed in enumerate(shared)}
    cells = [
        (columns[seed], len(columns) + i, value)
        for i, values in enumerate(table.values())
        for seed, value in values.items()
        if seed in columns
    ]
    if not cells:
        return None
    numbers = np.array([value for *_, value in cells], float)
    design = np.zeros((len(cells), len(columns) + len(table)))
    for row, (seed, variant, _) in zip(design, cells, strict=True):
        row[[seed, variant]] = 1
    fitted, _, rank, _ = np.linalg.lstsq(design, numbers)
    df = len(cells) - int(rank)
    if not df:
        return None
    sd = float(np.linalg.norm(numbers - design @ fitted)) / df**0.5
    return _Spread(sd if sd > ROUNDING * np.abs(numbers).max() else 0.0, df)


def _own_sd(differences: Mapping[int, float], values: Mapping[int, float]) -> float | None:
    if len(differences) < 2:
        return None
    return 0.0 if _constant(differences, values) else float(np.std(list(differences.values()), ddof=1))


def _wide(table: Table, distinct: Table, baseline: str) -> set[str]:
    """The variants to be tested by their own sd, as `compare` says."""
    own = {name: _own_sd(_paired(values, table[baseline]), table[baseline]) for name, values in table.items()}
    own = {name: sd for name, sd in own.items() if sd}

    def without(name: str) -> float:
        """The sd from which on a difference is wide, by the variants that are not this one."""
        pool = _pool({other: values for other, values in distinct.items() if not _repeats(values, table[name])})
        return WIDE * 2**0.5 * pool.sd if pool else np.inf

    if any(sd > without(baseline) for sd in own.values()):
        return set(table)
    return {name for name, sd in own.items() if sd > without(name)}


def _test(values: Mapping[int, float], base: Mapping[int, float], pool: _Spread | None, wide: bool) -> _Test:
    """Choose the test of a variant against the baseline."""
    differences = _paired(values, base)
    if not differences:
        return _welch(values, base)
    own_sd = _own_sd(differences, base)
    test = _Test("too few", list(differences), float(np.mean(list(differences.values()))), own_sd)
    n = len(differences)
    if _constant(differences, base):
        # A t of infinity and a p of 0 would say that no seed could ever differ, which two or five of them cannot show.
        return test._replace(method="constant" if test.mean else "identical")
    if wide and own_sd is not None:
        return test._replace(method="paired, own sd", sd=own_sd, df=n - 1, standard_error=own_sd / n**0.5)
    if wide or pool is None:
        return test
    if not pool.sd:
        return test._replace(method="constant")
    sd = 2**0.5 * pool.sd
    return test._replace(method="paired, pooled sd", sd=sd, df=pool.df, standard_error=sd / n**0.5)


def _welch(values: Mapping[int, float], base: Mapping[int, float]) -> _Test:
    """Welch's test of two independent means, whose sds may differ: standard error sqrt(s₁²/n₁ + s₂²/n₂)."""
    one = np.array(list(values.values()), float)
    other = np.array(list(base.values()), float)
    test = _Test("too few", [], float(one.mean() - other.mean()), None)
    if min(len(one), len(other)) < 2:
        return test
    variances = (one.var(ddof=1), other.var(ddof=1))
    sd = float(sum(variances)) ** 0.5
    if sd <= ROUNDING * np.abs(other).max():
        return test._replace(method="constant" if test.mean else "identical")
    standard_error = float(variances[0] / len(one) + variances[1] / len(other)) ** 0.5
    df = float(ttest_ind(one, other, equal_var=False).df)
    return test._replace(method="Welch", sd=sd, df=df, standard_error=standard_error)


def _difference(test: _Test, p_corrected: float | None, comparisons: int) -> Difference:
    """What is reported of a test, one of so many that have a p."""
    interval = None
    detectable = None
    if test.standard_error is not None:
        interval = _interval(test.mean, test.standard_error, test.df)
        detectable = test.standard_error * detectable_ratio(test.df, LEVEL / comparisons)
    return Difference(
        mean=test.mean,
        seeds=test.seeds,
        method=test.method,
        sd=test.sd,
        own_sd=test.own_sd,
        df=test.df,
        interval=interval,
        p=test.p,
        p_corrected=p_corrected,
        detectable=detectable,
    )


def _interval(mean: float, standard_error: float, df: float) -> tuple[float, float]:
    half = float(stdtrit(df, 1 - LEVEL / 2)) * standard_error
    return mean - half, mean + half
