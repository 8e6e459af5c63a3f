"""What a comparison of backbones came to, apart from how it was run and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Arm = Literal["before", "control", "after"]
ARMS: tuple[Arm, ...] = ("before", "control", "after")
"""As it was loaded; the same steps with the contrastive term alone; with TTD."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation of one value or more; no deviation of a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Figure:
    """One column of the table.

    Attributes:
        key: its name in ``results.json``.
        label: its name on paper.
        better: the direction that is better; ``None`` where there is none.
        meaning: one sentence that says what it measures.
    """

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    meaning: str


@dataclass
class BackboneResult:
    """The figures of one backbone.

    Attributes:
        name: as it was asked for, the row of the table.
        about: parameters, patch size, input size and the like, for the table of backbones.
        figures: arm -> one mapping a seed from the key of a figure to its value, ``None`` where it is not defined.
            ``before`` has one mapping, since no seed touches it, and arms that were not run are absent.
        curves: arm -> one list a seed of ``{"step": ..., "loss": ..., part: ...}``.
        seconds: what was timed -> seconds.
        warnings: what the watch for collapse, or the measurement, told of it.
    """

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    figures: dict[Arm, list[dict[str, float | None]]] = field(default_factory=dict)
    curves: dict[Arm, list[list[dict[str, float]]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def mean(self, arm: Arm, key: str) -> float | None:
        """Mean over the seeds; ``None`` where the arm was not run or the figure is not defined for a seed."""
        values = self._values(arm, key)
        return mean_and_spread(values)[0] if values else None

    def spread(self, arm: Arm, key: str) -> float | None:
        """Sample standard deviation over the seeds; ``None`` with fewer than two."""
        values = self._values(arm, key)
        return mean_and_spread(values)[1] if values else None

    def _values(self, arm: Arm, key: str) -> list[float]:
        found = [row.get(key) for row in self.figures.get(arm, [])]
        return [float(value) for value in found if value is not None] if None not in found else []


@dataclass(frozen=True)
class TagView:
    """A tag of one caption as one backbone sees it.

    Attributes:
        text: the tag.
        start: its first character in the caption, or -1.
        score: probability of its nearest patch.
        selected: whether the selection rule kept it.
        heat: ``[rows, columns]`` float32 in 0 to 1, its min-max-normalised similarity map.
    """

    text: str
    start: int
    score: float
    selected: bool
    heat: NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """One picture and caption as one backbone sees it in one arm.

    Attributes:
        caption: ``[rows, columns]`` float32 in 0 to 1, the caption's similarity map.
        tags: its candidate tags, in the caption's order.
        iou: Caption IoU of this picture, or ``None`` without masks.
    """

    caption: NDArray[np.float32]
    tags: Sequence[TagView]
    iou: float | None = None


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery, with what every backbone made of it.

    Attributes:
        key: its name in the data set.
        image: ``[height, width, 3]`` uint8.
        caption: its caption.
        truth: true tag -> ``[height, width]`` bool mask; empty where nothing is known.
        views: name of the backbone -> arm -> view, of the first seed.
        why: why it is shown, as in "largest gain" or "largest loss".
    """

    key: str
    image: NDArray[np.uint8]
    caption: str
    truth: Mapping[str, NDArray[np.bool_]]
    views: Mapping[str, Mapping[Arm, View]]
    why: str = ""


@dataclass
class Comparison:
    """A finished comparison.

    Attributes:
        settings: everything that decides the result: data, seeds, steps, options of TTD, versions; and the ``command``
            that repeats it, quoted for a shell, where one does.
        figures: the columns, in the table's order.
        backbones: the rows, in the order asked for.
        gallery: pictures, failures included.
        trade_off: keys of the two figures of the trade-off plot: what TTD should raise, and what it may cost.
        attribution: who made the pictures, or "".
        failures: name of a backbone that failed -> why, in one sentence; it is no row.
    """

    settings: dict[str, Any]
    figures: Sequence[Figure]
    backbones: Sequence[BackboneResult]
    gallery: Sequence[Picture] = ()
    trade_off: tuple[str, str] = ("caption_iou", "retrieval_r1")
    attribution: str = ""
    failures: Mapping[str, str] = field(default_factory=dict)
