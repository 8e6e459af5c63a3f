"""The results of a comparison of backbones: metrics, curves and gallery; nothing here runs or draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.comparison.options import ARMS as ARMS
from ttd_plugins.comparison.options import Arm as Arm
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_names

TIE = 0.005
"""Differences smaller than half a percentage point count as no change."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the deviation is ``None`` for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_gain(
    rows: Sequence[Mapping[str, float | None]], baseline: Sequence[Mapping[str, float | None]], key: str
) -> tuple[float, float | None] | None:
    """Return the difference of a metric, row minus baseline of the same seed: mean and standard deviation over seeds.

    ``None`` without rows, or if the metric is undefined for a seed; see :func:`mean_and_spread`.
    """
    pairs = [(row.get(key), base.get(key)) for row, base in zip(rows, baseline, strict=False)]
    known = [value - base for value, base in pairs if value is not None and base is not None]
    return mean_and_spread(known) if known and len(known) == len(pairs) else None


@dataclass(frozen=True)
class Metric:
    """A metric: one column of the table.

    Attributes:
        key: name in ``results.json``.
        label: name in tables and charts.
        better: which direction is better; ``None`` if neither is.
        meaning: one sentence that says what it measures.
    """

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    meaning: str


@dataclass
class BackboneResult:
    """The results of one backbone.

    Attributes:
        name: name the user asked for; the row of the table.
        about: parameters, patch size, input size and the like, for the table of backbones.
        metrics: for each arm, one mapping per seed from a metric's key to its value, ``None`` if undefined.
            ``before`` has one mapping, since it is not trained. Arms that were not run are absent.
        curves: for each arm, one list per seed of ``{"step": ..., "loss": ..., part: ...}``.
        seconds: duration of each stage in seconds.
        warnings: collapse warnings and warnings of the measurement.
        bias: for each arm, one mapping per seed from a kind of word to the mean of the caption map inside tags of that
            kind (:attr:`SceneMetrics.caption_map_in_tag`), ``None`` if no such tag occurs. Empty on photographs.
        cost: ``images_per_second`` and ``memory_bytes`` of dense encoding; empty if it was not measured.
        scaled: factor of LoRA as text, such as ``"0.5"``, to the metrics of ``after`` at that factor, one mapping per
            seed; empty if only 1 was measured.
    """

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    metrics: dict[Arm, list[dict[str, float | None]]] = field(default_factory=dict)
    curves: dict[Arm, list[list[dict[str, float]]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bias: dict[Arm, list[dict[str, float | None]]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    scaled: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)

    figures = RenamedAttribute("metrics")

    def mean(self, arm: Arm, key: str) -> float | None:
        """Mean over the seeds; ``None`` if the arm was not run or the metric is undefined for a seed."""
        values = self._values(arm, key)
        return mean_and_spread(values)[0] if values else None

    def spread(self, arm: Arm, key: str) -> float | None:
        """Sample standard deviation over the seeds; ``None`` for fewer than two."""
        values = self._values(arm, key)
        return mean_and_spread(values)[1] if values else None

    def _values(self, arm: Arm, key: str) -> list[float]:
        found = [row.get(key) for row in self.metrics.get(arm, [])]
        return [float(value) for value in found if value is not None] if None not in found else []


@dataclass(frozen=True)
class TagView:
    """A candidate tag of a caption, as a backbone sees it.

    Attributes:
        text: the tag.
        start: index of its first character in the caption, or -1.
        score: probability of its nearest patch, in 0 to 1.
        selected: whether the selection rule selected it.
        heat: ``[rows, columns]`` float32 in 0 to 1, its min-max-normalised similarity map.
    """

    text: str
    start: int
    score: float
    selected: bool
    heat: NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """An image and its caption, as a backbone sees them in one arm.

    Attributes:
        caption: ``[rows, columns]`` float32 in 0 to 1, the caption's similarity map.
        tags: candidate tags, in the caption's order.
        iou: Caption IoU of this image; ``None`` without masks.
        truncated: whether the caption is longer than the text tower's context, so that its end was not read.
        calibrated: whether the probabilities of the tags are calibrated.
    """

    caption: NDArray[np.float32]
    tags: Sequence[TagView]
    iou: float | None = None
    truncated: bool = False
    calibrated: bool = False


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery, with the views of every backbone.

    Attributes:
        key: name in the data set.
        image: ``[height, width, 3]`` uint8.
        caption: its caption.
        truth: true tag to ``[height, width]`` bool mask; empty without ground truth.
        views: name of the backbone to arm to view, of the first seed.
        why: why the image is shown, as in "largest gain" or "largest loss".
        absent: tags of the caption that the image is known not to show.
        labels: each candidate tag to whether it is true by the protocol of tag selection, ``None`` if unknown. If it is
            left out, tags of ``truth`` are true, those of ``absent`` false, and others unknown.
    """

    key: str
    image: NDArray[np.uint8]
    caption: str
    truth: Mapping[str, NDArray[np.bool_]]
    views: Mapping[str, Mapping[Arm, View]]
    why: str = ""
    absent: Sequence[str] = ()
    labels: Mapping[str, bool | None] | None = None


@dataclass(frozen=True)
class PhotographEvidence:
    """What the LoRA for photographs was trained on, and what it changes on photographs it was not trained on.

    Attributes:
        seeds: seeds over which the metrics are averaged; the LoRA is that of the first.
        steps: optimizer steps of its training.
        photographs: photographs in its training.
        captions: their captions.
        validation: photographs that are measured.
        metrics: label to the values before, of the control, and after TTD.
    """

    seeds: int
    steps: int
    photographs: int
    captions: int
    validation: int
    metrics: Mapping[str, Mapping[Arm, float]]


@dataclass(frozen=True)
class PhotographExamples:
    """Photographs of the package before and after TTD, which a report shows before its metrics.

    Attributes:
        before: name of the backbone before TTD.
        after: its name after TTD.
        images: photographs with the views ``before`` and ``after`` of the backbone ``before``; the first one is shown
            large. Their keys are file names of the package, without suffix.
        balance: key of an image to its tag balance in each arm: the mean of the caption map inside the weakest true tag
            over that inside the strongest; 1 is even.
        chosen: how they were chosen, in sentences.
        evidence: what the LoRA was trained on, and its metrics.
    """

    before: str
    after: str
    images: Sequence[GalleryImage]
    balance: Mapping[str, Mapping[Arm, float]]
    chosen: str
    evidence: PhotographEvidence


@dataclass
class Comparison:
    """A finished comparison.

    Attributes:
        settings: everything that decides the result (data, seeds, steps, options of TTD, versions) and, if known, the
            shell ``command`` that repeats it.
        metrics: the columns, in the table's order.
        backbones: the rows, in the order the user named them.
        gallery: images, including those on which TTD fails.
        trade_off: keys of the two metrics of the trade-off plot: the one TTD should raise, and the one it may cost.
        attribution: authors of the images, or "".
        failures: name of each backbone that failed to the reason, in one sentence; it has no row.
        photographs: photographs that the report shows first; ``None`` in a comparison without them.
        gallery_rule: how the images of the gallery were chosen, in sentences; "" if unknown.
    """

    settings: dict[str, Any]
    metrics: Sequence[Metric]
    backbones: Sequence[BackboneResult]
    gallery: Sequence[GalleryImage] = ()
    trade_off: tuple[str, str] = ("caption_iou", "retrieval_r1")
    attribution: str = ""
    failures: Mapping[str, str] = field(default_factory=dict)
    photographs: PhotographExamples | None = None
    gallery_rule: str = ""

    figures = RenamedAttribute("metrics")


__getattr__ = renamed_names(__name__, {"Figure": "Metric", "Picture": "GalleryImage"})
