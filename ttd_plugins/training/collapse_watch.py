"""Averages of metrics between two lines of a log, and a watch for maps and selections that collapse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword

SPREAD_FLOOR, SPREAD_SHARE = 0.005, 0.05


@dataclass
class MetricAverager:
    """Running means of metrics since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one batch."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return values that JSON can store."""
        return asdict(self)


@renamed_keyword("told", "present")
@dataclass
class CollapseWatch:
    """Detects degenerate solutions: flat caption maps, and a selection of every tag or of none.

    Attributes:
        first_spread: spread (max - min over patches, cosine) of the caption maps in the first window.
        present: kinds of collapse that are present now, so that each is reported once.
    """

    first_spread: float | None = None
    present: list[str] = field(default_factory=list)

    told = RenamedAttribute("present")

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """Return one sentence for each kind of collapse that is new in the metrics of a window."""
        spread = metrics.get("caption_map_spread")
        tags, selected = metrics.get("tags_per_caption", 0.0), metrics.get("selected_per_caption", 0.0)
        found: dict[str, str] = {}
        if spread is not None:
            if self.first_spread is None:
                self.first_spread = spread
            if spread < max(SPREAD_FLOOR, SPREAD_SHARE * self.first_spread):
                found["flat"] = (
                    f"the caption maps are nearly flat (spread of cosines {spread:.4f}, at the start "
                    f"{self.first_spread:.4f}): they collapse; lower the learning rate or ttd.distill_weight"
                )
        if tags > 0 and selected < 1e-3 * tags:
            found["none"] = (
                f"hardly any tag is selected ({selected:.3f} of {tags:.1f} a caption), so TTD has no effect; "
                "lower ttd.threshold or choose another ttd.rule"
            )
        # With one tag a caption there is nothing to reject.
        if tags >= 1.5 and selected > 0.999 * tags:
            found["all"] = (
                f"every tag is selected ({tags:.1f} a caption), so the selection has no effect; raise "
                "ttd.threshold or choose another ttd.rule"
            )
        new = [sentence for kind, sentence in found.items() if kind not in self.present]
        self.present = list(found)
        return new

    def as_dict(self) -> dict[str, Any]:
        """Return values that JSON can store; the key ``told`` of checkpoints is :attr:`present`."""
        return {"first_spread": self.first_spread, "told": self.present}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the watch that :meth:`as_dict` stored."""
        return cls(first_spread=state["first_spread"], present=list(state["told"]))
