"""The summary in words, sentence by sentence."""

from dataclasses import replace

import pytest

from ablation.pages.words import summary, verdict
from ablation.statistics import Comparison
from tests.ablation import support


def sentences(report) -> str:
    return "\n".join(report.summary)


def test_summary_of_four_variants_says_what_each_comparison_found():
    said = support.four().summary
    assert said[0] == "Of 4 variants, attention=gqa ends lowest: 1.5840 ± 0.0020 bits per byte (mean ± sd of 3 seeds)."
    assert said[1] == (
        "attention=gqa ends 0.0200 bits per byte below attention=mha: better "
        "(95 % interval −0.0331 to −0.0069, p = 0.031 corrected for 3 comparisons)."
    )
    assert said[2] == (
        "attention=mqa is not distinguishable from attention=mha: difference +0.0042 (95 % interval −0.0089 to 0.0173, "
        "p = 0.63 corrected for 3 comparisons); this sweep could have seen 0.0211."
    )
    assert said[3].startswith("attention=mla ends 0.0406 bits per byte above attention=mha: worse (95 % interval 0.0")
    assert "p < 0.001 corrected for 3 comparisons" in said[3]


def test_summary_of_one_seed_each_gives_no_p():
    said = sentences(support.one_seed())
    assert "attention=mla ends 0.0497 bits per byte above attention=mha." in said
    assert "One seed each: no interval, and no p." in said and "p =" not in said and "distinguishable" not in said


def test_summary_of_some_variants_with_too_few_seeds_names_them():
    few = support.difference(0.05, None, seeds=[1])
    made = support.four()
    comparison = replace(made.comparison, differences={**made.comparison.differences, "attention=mla": few})
    said = "\n".join(summary(replace(made, comparison=comparison)))
    assert "above attention=mha at 1 common seed: no interval, and no p." in said
    assert "corrected for 2 comparisons" in said


def test_summary_of_identical_runs_says_so_and_names_no_lowest():
    said = sentences(support.identical())
    assert "compile=true is identical to compile=false at every seed." in said and "lowest" not in said


def test_summary_of_welch_says_why():
    assert "p = 0.041; Welch's test, since no seeds are common)" in sentences(support.welch())


def test_summary_of_a_constant_difference_has_no_p():
    found = support.difference(0.25, None, method="constant", seeds=[1, 2, 3])
    made = replace(support.four(), comparison=Comparison("attention=mha", None, 0, {"attention=gqa": found}))
    said = "attention=gqa ends 0.2500 bits per byte above attention=mha at every seed alike: no interval, and no p."
    assert said in summary(made)


def test_summary_gives_p_before_correction_where_only_that_is_below_the_limit():
    found = support.difference(0.02, 0.06, p=0.02)
    others = {**support.four().comparison.differences, "attention=gqa": found}
    made = replace(support.four(), comparison=Comparison("attention=mha", 0.0066, 6, others))
    assert "p = 0.060 corrected for 3 comparisons, 0.020 before)" in "\n".join(summary(made))


def test_summary_of_many_variants_puts_the_indistinguishable_into_one_sentence():
    said = support.many().summary
    assert sum("not distinguishable" in sentence for sentence in said) == 1
    assert "9 variants are not distinguishable from attention.window=1: attention.window=2 (+0.0107), " in "".join(said)
    assert "could have seen 0.0211." in "".join(said)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1000, 1000], "At equal parameters (without embedding, head and positions): 1k each."),
        ([1000, 1003], "At equal parameters (without embedding, head and positions): within 0.3 % of 1k."),
        (
            [1000, 1100],
            "Parameters (without embedding, head and positions) were to be matched, but differ by up to 10 %.",
        ),
    ],
)
def test_summary_says_how_well_a_budget_was_matched(numbers, said):
    made = support.welch()
    pairs = zip(made.variants, numbers, strict=True)
    made = replace(made, variants=[replace(each, parameters_without_embedding=count) for each, count in pairs])
    assert said in summary(made)


def test_summary_names_budgets_that_were_not_matched():
    made = support.one_seed()
    assert "Cache not matched: attention=mla caches 640 bytes per token, attention=mha 4,096." in made.summary
    made = replace(made, variants=[replace(made.variants[0], parameters_without_embedding=2_000_000), made.variants[1]])
    words = "Parameters (without embedding, head and positions) are not matched: from 950k (attention=mla) to 2M"
    assert f"{words} (attention=mha)." in summary(made)


def test_summary_counts_runs_without_a_result():
    assert "3 of 15 runs have no result: 1 failed, 1 diverged, 1 missing." in support.broken().summary


def test_summary_of_nothing_but_failures_is_about_them():
    made = support.broken()
    failed = [cell for cell in made.cells if cell.state != "finished"]
    made = replace(made, variants=[], comparison=None, cells=failed)
    assert summary(made) == ["3 of 3 runs have no result: 1 failed, 1 diverged, 1 missing."]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "baseline"),
        (support.difference(0.03, 0.004), "worse, p = 0.004"),
        (support.difference(-0.03, 0.0004), "better, p < 0.001"),
        (support.difference(0.03, 0.4), "not distinguishable, p = 0.40"),
        (support.difference(0.03, None), "too few seeds: no p"),
        (support.difference(0.0, None, method="identical"), "identical"),
        (support.difference(0.1, None, method="constant"), "constant difference: no p"),
    ],
)
def test_verdict_is_a_few_words(found, words):
    assert verdict(found) == words
