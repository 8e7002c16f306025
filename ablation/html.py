"""A report as one self-contained page: report.html."""

from ablation.results import Report


def page(report: Report, x: str, y: str, log: bool) -> str:
    return "<!DOCTYPE html>\n"
