"""How sure a comparison of variants is: intervals, paired differences to a baseline, corrected p-values, and the
difference that could have been seen. Numbers in, numbers out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Table = Mapping[str, Mapping[int, float]]  # by variant, then by seed: one number of each run
Method = Literal["paired, pooled sd", "paired, own sd", "Welch", "identical", "constant", "too few"]


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
    sd: float | None  # of a difference at one seed, as used for p: sqrt(2) times the pooled sd, or the own one
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
    pooled_sd: float | None  # of one run about its variant and seed, over all variants
    pooled_df: int  # (k - 1)(n - 1) where no cell is missing
    differences: dict[str, Difference]  # by variant, without the baseline
