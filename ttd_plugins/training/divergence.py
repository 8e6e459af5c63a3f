"""A watch for runs that diverge, and for the checkpoints from before that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ttd_plugins.training.collapse_watch import SPREAD_FLOOR, SPREAD_SHARE

RECENT = 10
"""Steps over which a run is judged."""
LOSS_FACTOR, LOSS_MARGIN = 2.0, 1.0
"""A loss above factor * (loss of the first step) + margin is unhealthy."""
LARGEST_GROWTH = 100.0
"""Trained weights whose norm grew by more than this factor are useless; a run that learns stays far below it."""


@dataclass
class DivergenceWatch:
    """Detects weights that became useless: an exploded loss, flat caption maps, exploded or non-finite weights.

    The first step measures the weights before any change, so later steps are compared with it. A run has diverged
    where most of the last :data:`RECENT` steps are unhealthy, or its weights exploded.

    Attributes:
        first_loss, first_spread: loss of the first finite step, and spread (max - min over patches, cosine) of its
            caption maps.
        first_norm, last_norm: norm of the trained weights before the first step and when it was last measured.
        recent: for each of the last steps, oldest first, whether it was unhealthy.
        protected: steps of the checkpoints from before the steps that are unhealthy now, which must not be deleted.
        after_skip: steps of the checkpoints from before the first skipped step, which are never deleted.
    """

    first_loss: float | None = None
    first_spread: float | None = None
    first_norm: float | None = None
    last_norm: float | None = None
    recent: list[bool] = field(default_factory=list)
    protected: list[int] = field(default_factory=list)
    after_skip: list[int] = field(default_factory=list)

    def add(
        self, step: int, loss: float, metrics: Mapping[str, float], checkpoints: Sequence[int], *, skipped: bool
    ) -> bool:
        """Add a step, and protect the checkpoints from before it where trouble begins with it.

        Args:
            step: its number, from 1.
            loss: its loss, computed with the weights after ``step - 1``; NaN where it was skipped.
            metrics: its statistics.
            checkpoints: steps of the checkpoints that exist.
            skipped: whether it was skipped.

        Returns:
            Whether the run diverges with this step.
        """
        before, had_trouble = self.diverged, any(self.recent)
        spread = metrics.get("caption_map_spread")
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss, self.first_spread = loss, spread
        unhealthy = not math.isfinite(loss) or self._exploded(loss) or self._flat(spread)
        self.recent = [*self.recent, unhealthy][-RECENT:]
        if not any(self.recent) and not self._grown():
            self.protected = []
        # The weights after the step before may be the bad ones already, so the checkpoint before those is kept too.
        until = [[one for one in checkpoints if one <= last] for last in (step - 1, step - 2)]
        earlier = sorted({max(found) for found in until if found})
        if unhealthy and not had_trouble:
            self.protected = earlier
        if skipped and not self.after_skip:
            self.after_skip = self.protected or earlier
        return self.diverged and not before

    def weigh(self, norm: float, checkpoints: Sequence[int]) -> bool:
        """Add the norm of the trained weights, the first time before the first step.

        Returns:
            Whether the run diverges with it.
        """
        before = self.diverged
        self.first_norm, self.last_norm = norm if self.first_norm is None else self.first_norm, norm
        if self._grown() and not self.protected:
            self.protected = sorted(checkpoints)[:1]
        return self.diverged and not before

    @property
    def diverged(self) -> bool:
        """Whether most of the last steps are unhealthy, or the weights exploded."""
        return 2 * sum(self.recent) > len(self.recent) or self._grown()

    @property
    def kept(self) -> list[int]:
        """Steps of the checkpoints that must not be deleted."""
        return sorted({*self.protected, *self.after_skip})

    def sentence(self, loss: float, spread: float | None) -> str:
        """Describe why the run is unhealthy, from the loss and the spread of a step."""
        if self._grown():
            return f"the norm of the trained weights is {self.last_norm:.4g}, and {self.first_norm:.4g} at the start"
        if not math.isfinite(loss):
            return "most of the last steps are not finite"
        if self._exploded(loss):
            return f"the loss is {loss:.4g}, and {self.first_loss:.4g} in the first step"
        return (
            f"the caption maps are flat (spread of cosines {spread or 0.0:.4f}, in the first step "
            f"{self.first_spread or 0.0:.4f})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return values that JSON can store."""
        return asdict(self)

    def _grown(self) -> bool:
        if self.first_norm is None or self.last_norm is None:
            return False
        # A norm that is not a number counts as grown.
        return not self.last_norm <= LARGEST_GROWTH * max(self.first_norm, 1e-3)

    def _exploded(self, loss: float) -> bool:
        return self.first_loss is not None and loss > LOSS_FACTOR * max(self.first_loss, 0.0) + LOSS_MARGIN

    def _flat(self, spread: float | None) -> bool:
        if spread is None or self.first_spread is None:
            return False
        # Maps that are flat before any training are the backbone's own.
        floor = max(SPREAD_FLOOR, SPREAD_SHARE * self.first_spread)
        return self.first_spread > floor and not spread >= floor
