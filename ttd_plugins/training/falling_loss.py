"""Does the contrastive loss still fall steeply at the end of a run? TTD starts from a model that is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_LINES = 6
"""Log lines in the last half of a run, below which nothing can be said."""
STEEP = 0.1
"""Share of the loss by which it falls over the last half of the run."""
SIGNIFICANT = 4.0
"""Standard errors by which the slope differs from zero; plain noise reaches so many once in hundreds of runs."""


def fall_at_end(losses: Sequence[float]) -> float | None:
    """Return the share of the loss by which it falls over the last half of a run; ``None`` if it does not fall steeply.

    A straight line is fitted to the last half of the logged means. Its fall counts if it is at least :data:`STEEP` of
    the fitted loss at the middle of the run, and its slope is :data:`SIGNIFICANT` standard errors below zero.

    Args:
        losses: contrastive loss of each line of the log, each a mean over equally many steps, in order.
    """
    last = np.asarray(losses[len(losses) // 2 :], dtype=np.float64)
    if len(last) < LEAST_LINES or not np.isfinite(last).all():
        return None
    place = np.linspace(-0.5, 0.5, len(last))
    slope = float(place @ last / (place @ place))
    residual = last - last.mean() - slope * place
    error = math.sqrt(float(residual @ residual) / (len(last) - 2) / float(place @ place))
    start = float(last.mean()) - slope / 2
    if start <= 0 or -slope < STEEP * start or -slope <= SIGNIFICANT * error:
        return None
    return -slope / start


def falling_loss_sentence(losses: Sequence[float]) -> str | None:
    """Return one sentence where the contrastive loss still falls steeply at the end of a run, and else ``None``."""
    fall = fall_at_end(losses)
    if fall is None:
        return None
    return (
        f"the contrastive loss still fell by {fall:.0%} over the last half of the run, and TTD starts from a model "
        "whose held-out retrieval no longer rises: train with the contrastive term alone first (ttd.tag_weight=0, "
        "ttd.distill_weight=0), or TTD's losses compete with it"
    )
