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
        "(95 % interval −0.0331 to −0.0069 if taken alone; corrected for 3 comparisons, p = 0.031)."
    )
    assert said[2] == (
        "attention=mqa is not distinguishable from attention=mha: difference +0.0042 (95 % interval −0.0089 to 0.0173 "
        "if taken alone; corrected for 3 comparisons, p = 0.63); true differences of 0.0211 or more would have been "
        "found in 80 % of such sweeps."
    )
    assert said[3].startswith("attention=mla ends 0.0406 bits per byte above attention=mha: worse (95 % interval 0.0")
    assert "corrected for 3 comparisons, p < 0.001" in said[3]


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


def test_summary_explains_the_correction_where_only_that_is_below_the_limit():
    found = support.difference(0.02, 0.06, p=0.02)
    others = {**support.four().comparison.differences, "attention=gqa": found}
    made = replace(support.four(), comparison=Comparison("attention=mha", 0.0066, 6, others))
    words = "(taken alone, 95 % interval 0.0069 to 0.0331 and p = 0.020; but one of 3 comparisons looks so by chance "
    assert f"{words}more often: corrected, p = 0.060)" in "\n".join(summary(made))


def lowest(p: dict[str, float | None], baseline: str = "attention=mha") -> str:
    """The first sentence after the loss, for comparisons with such p; gqa ends lowest."""
    differences = {name: support.difference(0.01, value) for name, value in p.items()}
    made = replace(support.four(), comparison=Comparison(baseline, 0.0066, 6, differences))
    return summary(made)[0].partition("seeds)")[2]


def test_summary_of_a_baseline_that_is_lowest_names_those_that_may_be_as_low():
    others = ["attention=mha", "attention=mqa", "attention=mla"]
    for p, words in [
        ([0.4, 0.4, 0.4], ", from which no other is distinguishable."),
        ([0.4, 0.01, 0.4], ", from which attention=mha and attention=mla are not distinguishable."),
        ([0.4, 0.01, None], ", from which attention=mha is not distinguishable."),
        ([0.01, 0.01, 0.01], "."),
        ([None, None, None], "."),
    ]:
        assert lowest(dict(zip(others, p, strict=True)), "attention=gqa") == words


def test_summary_says_where_the_lowest_is_not_distinguishable_from_the_baseline():
    for p, words in [(0.4, ", but is not distinguishable from attention=mha."), (0.01, "."), (None, ".")]:
        assert lowest({"attention=gqa": p, "attention=mqa": 0.4, "attention=mla": 0.001}) == words


def test_summary_of_many_variants_puts_the_indistinguishable_into_one_sentence():
    said = support.many().summary
    assert "from which 9 of the others are not distinguishable." in said[0]
    assert sum("not distinguishable" in sentence for sentence in said[1:]) == 1
    assert "9 variants are not distinguishable from attention.window=1: attention.window=2 (+0.0107), " in "".join(said)
    assert "; true differences of 0.0211 or more would have been found in 80 % of such sweeps." in "".join(said)


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
    assert "4 of 16 runs have no result: 1 failed, 1 diverged, 1 missing, 1 altered." in support.broken().summary


def test_summary_of_nothing_but_failures_is_about_them():
    made = support.broken()
    failed = [cell for cell in made.cells if cell.state != "finished"]
    made = replace(made, variants=[], comparison=None, cells=failed)
    assert summary(made) == ["4 of 4 runs have no result: 1 failed, 1 diverged, 1 missing, 1 altered."]


def test_verdict_is_a_few_words():
    for found, words in [
        (None, "baseline"),
        (support.difference(0.03, 0.004), "worse, p = 0.004"),
        (support.difference(-0.03, 0.0004), "better, p < 0.001"),
        (support.difference(0.03, 0.4), "not distinguishable, p = 0.40"),
        (support.difference(0.03, None), "too few seeds: no p"),
        (support.difference(0.0, None, method="identical"), "identical"),
        (support.difference(0.1, None, method="constant"), "constant difference: no p"),
    ]:
        assert verdict(found) == words
