"""Numbers of a report as text for people: the same digits everywhere, a real minus sign, no false precision."""

import math

from ablation.results import Report

MIN_PLACES = 3
MAX_PLACES = 6


def places(report: Report) -> int:
    """Decimals of losses in this report: two significant digits of what one run of it is uncertain by."""
    sd = report.comparison.pooled_sd if report.comparison else None
    if not sd or not math.isfinite(sd):
        return 4
    return min(MAX_PLACES, max(MIN_PLACES, 1 - math.floor(math.log10(sd))))


def fixed(value: float, decimals: int) -> str:
    """A number with that many decimals: −0.0123. What is rounded to zero has no sign."""
    text = f"{value:,.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else f"−{text[1:]}"
    return text


def signed(value: float, decimals: int) -> str:
    """A difference: always with its sign, except where it is rounded to zero."""
    text = fixed(value, decimals)
    return text if text.startswith("−") or not text.strip("0.,") else f"+{text}"


def interval(bounds: tuple[float, float] | None, decimals: int) -> str:
    return f"{fixed(bounds[0], decimals)} to {fixed(bounds[1], decimals)}" if bounds else ""


def p_value(p: float) -> str:
    """p = 0.041, p = 0.63, or p < 0.001."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def degrees(df: float) -> str:
    """Degrees of freedom, which are whole numbers but for Welch's."""
    return f"{df:,.0f}" if df == round(df) else f"{df:,.1f}"


def duration(seconds: float) -> str:
    """A time of training: 4.2 s, 12 s, 3.4 min, 1.2 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 59.95 else f"{minutes / 60:,.1f} h"


def compact(value: float) -> str:
    """Three significant digits with a letter: 952, 12.3k, 1.23M, 4.56G."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{three_digits(value / factor)}{letter}"
    return three_digits(value)


def bytes_(value: float) -> str:
    """A size in memory: 640 B, 4 KiB, 1.5 MiB, 2.25 GiB."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{three_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent, and without zeros at the end of a fraction."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact(value: float | None) -> str:
    """All digits of a number, as in report.json."""
    return "" if value is None else repr(value)
