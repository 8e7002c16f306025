"""Property tests in two modes: a few fixed examples in `make test`, and 10,000 random cases in total with

pytest -m long tests/fuzz                   # about four minutes on one core, or with -n auto
pytest -m long tests/fuzz -k text --hypothesis-seed=3
"""

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from tests.support import ROOT

# Hypothesis also tries the constants it finds in the project's imported modules: for the fixed examples to be the same
# whichever tests ran before, all are imported.
ROOMS = ("common", "runtime", "model", "data", "training", "generation")
for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
for program in ("train", "sample"):
    importlib.import_module(program)


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.long)])
def fuzz(request, record_property):
    """fuzz(check, values, short=40, long=2000) passes that many sampled values to `check`, which raises AssertionError
    or returns the outcome as a word: `refused`, `legal`, ... A failing value is shrunk, unless shrink=False: for slow
    checks."""
    is_long = request.param == "long"

    def run(check: Callable[[Any], str], values: SearchStrategy, *, short: int, long: int, shrink: bool = True) -> None:
        outcomes = Counter()

        @settings(
            max_examples=long if is_long else short,
            derandomize=not is_long,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(values)
        def example(value):
            outcomes[check(value)] += 1

        try:
            example()
        finally:
            record_property("outcomes", dict(outcomes))  # part of the report, also from a worker process

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the outcomes of the long mode."""
    reports = [
        report
        for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed"))
        if report.when == "call" and "[long]" in report.nodeid
    ]
    tallies = [(report, dict(report.user_properties).get("outcomes")) for report in reports]
    tallies = [(report, outcomes) for report, outcomes in tallies if outcomes is not None]
    if not tallies:
        return
    terminalreporter.section("fuzz cases")
    for report, outcomes in tallies:
        name = report.nodeid.rpartition("::")[2].removesuffix("[long]")
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        verdict = "FAILED after " if report.failed else ""
        terminalreporter.write_line(f"{name}: {verdict}{sum(outcomes.values()):,} ({counts})")
    cases = sum(sum(outcomes.values()) for _, outcomes in tallies)
    failures = sum(report.failed for report, _ in tallies)
    terminalreporter.write_line(f"{cases:,} cases in {len(tallies)} properties, failures: {failures}")
