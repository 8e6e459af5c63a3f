"""Figures of a run between two lines of its log, and a watch for maps and selections that collapse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SPREAD_FLOOR, SPREAD_SHARE = 0.005, 0.05


@dataclass
class Window:
    """Sums of figures since the last line of the log, and over how many steps."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """Count the figures of one step, or of one batch of it."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each figure."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return asdict(self)


@dataclass
class CollapseWatch:
    """Tells when training seems to have run into a degenerate answer.

    Two are known: maps of captions that are the same everywhere, and a selection that keeps every tag or none.

    Attributes:
        first_spread: spread (max - min over patches, cosine) of the captions' maps in the first window.
        told: kinds of trouble that are on now, so that each is told once.
    """

    first_spread: float | None = None
    told: list[str] = field(default_factory=list)

    def look(self, figures: Mapping[str, float]) -> list[str]:
        """Sentences about what is new in the figures of a window."""
        spread = figures.get("caption_map_spread")
        tags, selected = figures.get("tags_per_caption", 0.0), figures.get("selected_per_caption", 0.0)
        found: dict[str, str] = {}
        if spread is not None:
            if self.first_spread is None:
                self.first_spread = spread
            if spread < max(SPREAD_FLOOR, SPREAD_SHARE * self.first_spread):
                found["flat"] = (
                    f"the captions' maps are nearly flat (spread of cosines {spread:.4f}, at the start "
                    f"{self.first_spread:.4f}), which says that they collapse; lower the learning rate or "
                    "ttd.distill_weight"
                )
        if tags > 0 and selected < 1e-3 * tags:
            found["none"] = (
                f"hardly any tag is selected ({selected:.3f} of {tags:.1f} a caption), so that TTD teaches nothing; "
                "lower ttd.threshold or choose another ttd.rule"
            )
        # With one tag a caption there is nothing to leave out.
        if tags >= 1.5 and selected > 0.999 * tags:
            found["all"] = (
                f"every tag is selected ({tags:.1f} a caption), so that the selection says nothing; raise "
                "ttd.threshold or choose another ttd.rule"
            )
        new = [sentence for kind, sentence in found.items() if kind not in self.told]
        self.told = list(found)
        return new

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return asdict(self)
