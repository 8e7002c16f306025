"""Learning rates so far above the usual that a run most likely diverges: a warning, for an experiment may want that."""

import logging
from collections.abc import Sequence

from training.run.composer import choice
from training.run.config import Run

MAX_TIMES = 100  # the usual rate, up to which nothing is said
log = logging.getLogger("headroom")


def warn_large_rates(run: Run, overrides: Sequence[str], chosen: str) -> None:
    """overrides: as typed on the command line; chosen: of conf/optim, whose rates are the usual ones."""
    typed = {word.partition("=")[0] for word in overrides}
    given = {name: rate for name, rate in run.optim.base_lrs.items() if f"optim.{name}" in typed}
    if not given or chosen == "torch":  # whose rate is one for all optimizers
        return
    offered = choice("optim", chosen)
    usual = run.optim.model_copy(update={name: offered[name] for name in given}).derive(run.model.d_model)
    for name, rate in given.items():
        times = rate / getattr(usual, name)
        if times > MAX_TIMES:
            log.warning(
                f"optim.{name}={rate:g} is {times:,.0f} times the {getattr(usual, name):.3g} that optim={chosen} has "
                "unset: the run will most likely diverge"
            )
