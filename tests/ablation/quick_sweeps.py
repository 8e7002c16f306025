"""Sweeps of tiny runs, without what would take most of their time."""

from pytest import MonkeyPatch

from ablation.sweep.pace import Pace
from tests.support import composed_tree
from training.run.checkpoint import PICTURE


def without_pictures(patch: MonkeyPatch) -> None:
    """Give each run an empty picture of its loss."""
    patch.setattr("training.monitor.monitor.plot_loss", lambda run: (run / PICTURE).touch())


def without_timing(patch: MonkeyPatch) -> None:
    """State a pace of each variant, without a step of it."""
    patch.setattr("ablation.sweep.plan.paces_of", lambda variants: dict.fromkeys(variants, Pace(0.01, 10_000)))


def composing_once(patch: MonkeyPatch) -> None:
    """Compose what several cells, or several sweeps, share only once."""
    for user in ("training.run.config", "training.run.start", "ablation.sweep.request"):
        patch.setattr(f"{user}.compose_tree", composed_tree)
