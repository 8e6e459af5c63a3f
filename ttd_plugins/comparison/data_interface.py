"""What a comparison requires of its data: metrics, fine-tuning, and images for the gallery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.results import Metric
from ttd_plugins.evaluation.datasets import CaptionTruth
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.progress import Stage

Curve = list[dict[str, float]]
"""One mapping per logged step: ``step``, ``loss``, the parts of the loss and the statistics of the engine."""


@dataclass(frozen=True)
class Sample:
    """An image that may be shown in the gallery.

    Attributes:
        key: its name in the data set.
        image: uint8 ``[height, width, 3]``.
        caption: its caption.
        truth: true tag to bool mask ``[height, width]``.
        valid: bool ``[height, width]``, the labelled pixels; ``None`` if all are.
        absent: tags of the caption that the image is known not to show.
        caption_truth: what the annotations say about the caption's words; labels its candidate tags.
    """

    key: str
    image: NDArray[np.uint8]
    caption: str
    truth: Mapping[str, NDArray[np.bool_]]
    valid: NDArray[np.bool_] | None = None
    absent: Sequence[str] = ()
    caption_truth: CaptionTruth | None = None


@dataclass(frozen=True)
class Measurement:
    """Metrics of one backbone.

    Attributes:
        metrics: a value for each key of :attr:`ComparisonData.metrics` and possibly more; ``None`` if undefined.
        bias: mean of the caption map inside true tags, by kind of word; see :attr:`BackboneResult.bias`.
    """

    metrics: dict[str, float | None]
    bias: dict[str, float | None] = field(default_factory=dict)


class ComparisonData(Protocol):
    """Data on which backbones are fine-tuned and measured."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The columns of the table."""

    @property
    def trade_off(self) -> tuple[str, str]:
        """Keys of the metric that TTD should raise, and of the one that it may cost."""

    @property
    def attribution(self) -> str:
        """Authors of the images, or ""."""

    def describe(self) -> dict[str, Any]:
        """Return every setting of the data that decides the results."""

    def warnings(self) -> list[str]:
        """Return sentences on the fine-tuning that the user should know before it starts."""

    def check(self, backbone: DenseAdapter) -> None:
        """Check that a backbone can be used with these data.

        Raises:
            InputError: it cannot.
        """

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        """Measure a backbone; ``folder`` may store the state of an unfinished measurement."""

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, stage: Stage
    ) -> tuple[Curve, list[str]]:
        """Fine-tune a backbone in place; ``folder`` may store the state of an unfinished run.

        Returns:
            The training curve, and collapse warnings.
        """

    def samples(self, count: int) -> Iterator[Sample]:
        """Yield images for the gallery, among the first ``count`` of the test set.

        With masks they are those with two or more true tags.
        """


def finite_or_none(value: float | None) -> float | None:
    """Return ``None`` for NaN and infinities, which JSON does not have."""
    if value is None or not np.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)
