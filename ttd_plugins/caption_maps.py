"""The maps of one image and caption as plain arrays, and what their reader should know about the backbone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.adapter import BackboneDescription
from ttd_plugins.options import Rule


@dataclass
class CaptionMaps:
    """The maps of one image and caption as numpy arrays, for plots.

    Attributes:
        image: uint8 ``[height, width, 3]``, the input of the network.
        caption: the caption.
        tags: T candidate tags.
        scores: cosines ``[T]``.
        probabilities: calibrated scores ``[T]`` in (0, 1).
        selected: bool ``[T]``.
        tag_maps: cosines ``[T, H, W]``.
        tag_maps_normalized: ``[T, H, W]`` in [0, 1], min-max over patches, including rejected tags.
        union: ``[H, W]`` in [0, 1], the target of the caption's map.
        caption_map: cosines ``[H, W]``.
        caption_map_normalized: ``[H, W]`` in [0, 1], min-max over patches.
        truncated: whether the caption was longer than the context.
        calibrated: whether the map to probabilities was fitted to pairs; otherwise they are a rough guess.
        notes: sentences on the backbone that belong beside every result, such as what its weights know.
    """

    image: NDArray[np.uint8]
    caption: str
    tags: list[str]
    scores: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    selected: NDArray[np.bool_]
    tag_maps: NDArray[np.float32]
    tag_maps_normalized: NDArray[np.float32]
    union: NDArray[np.float32]
    caption_map: NDArray[np.float32]
    caption_map_normalized: NDArray[np.float32]
    truncated: bool
    calibrated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def probability_label(self) -> str:
        """What a table calls :attr:`probabilities`."""
        return "probability" if self.calibrated else "probability (uncalibrated)"


def backbone_notes(
    description: BackboneDescription, *, calibrated: bool = True, rule: Rule | None = None
) -> tuple[str, ...]:
    """Sentences that belong beside every result of a backbone, for the terminal, JSON, images and pages.

    Args:
        description: the backbone.
        calibrated: whether its probabilities are calibrated.
        rule: the selection rule; ``None`` if nothing is selected.
    """
    notes = []
    if description.weights == "random":
        notes.append(f"{description.name} has random weights, so its scores and maps mean nothing.")
    if description.trained_on is not None:
        kind = description.trained_on
        notes.append(
            f"{description.family}:{description.model} was pre-trained on {kind} only; on other images, such as "
            "photographs, its scores and maps mean little unless it was fine-tuned on such images."
        )
    if rule == "probability" and not calibrated:
        notes.append("The selection uses probabilities that are not calibrated.")
    return tuple(notes)
