"""Text-level segmentation: a caption's map against the union of the masks of its true tags (arXiv 2404.00384).

Caption IoU, FPR and FNR are each the mean over captions; the published figures add to one, which says that they share
one aggregation, and which one is not published. Tag balance is the mean over captions with two different masks or more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import CaptionData
from ttd_plugins.evaluation.dense_inference import (
    Activation,
    DenseOptions,
    activate,
    class_embeddings,
    dense_features,
    refine_maps,
    resize_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.metrics import Overlap, mask_overlap, mean_overlap, tag_balance
from ttd_plugins.evaluation.protocols.runner import EvaluationResult, Record, describe_backbone, run_protocol
from ttd_plugins.utils.progress import Stage

PAPER_SCALES = (1.0, 0.5, 1.5, 2.0)


@dataclass(frozen=True)
class TextProtocol:
    """How a caption's map is made and thresholded.

    Attributes:
        dense: how a picture is looked at.
        activation: how the map is brought into [0, 1]: ``"minmax"`` or ``"probability"``.
        threshold: the constant background plane; what is above it is the caption's region.
        templates: texts around the caption, by name: ``"none"``, ``"photo"`` or ``"imagenet"``.
        calibration: for the activation ``"probability"``; ``None`` means the backbone's own.
    """

    dense: DenseOptions = field(
        default_factory=lambda: DenseOptions(size=448, scales=PAPER_SCALES, flip=True, refine=True)
    )
    activation: Activation = "minmax"
    threshold: float = 0.40
    templates: str = "none"
    calibration: Calibration | None = None


TEXT_PRESETS: dict[str, TextProtocol] = {
    "paper": TextProtocol(),
    "fast": TextProtocol(dense=DenseOptions(size=224)),
}
"""``"paper"``: 448 pixels, scales 1, 0.5, 1.5, 2, flip, PAMR, background 0.40. Min-max before the threshold is ours."""


def evaluate_text(
    adapter: DenseAdapter,
    data: CaptionData,
    options: TextProtocol | None = None,
    *,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Measure caption maps on captioned pictures; captions without a true tag are left out.

    Figures: ``caption_iou``, ``mfpr`` and ``mfnr`` (means over captions, adding to one), ``tag_balance``, and the
    numbers of captions measured, left out, and behind the balance.

    Args and errors as in :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`.
    """
    options = options or TextProtocol()
    if options.activation == "cosine":
        raise InputError("a caption's map is thresholded in [0, 1]; take the activation minmax or probability")
    templates = templates_by_name(options.templates)
    calibration = options.calibration or adapter.description.calibration

    def one(key: str) -> Record:
        item = data.read(key)
        tagged = [(truth.caption, truth.true_tags()) for truth in item.captions]
        tagged = [(caption, [tag for tag in tags if item.masks[tag].any()]) for caption, tags in tagged]
        used = [(caption, tags) for caption, tags in tagged if tags]
        found = []
        if used:
            features = dense_features(adapter, read_image(item.path), options.dense)
            cosines = features.maps(class_embeddings(adapter, [caption for caption, _ in used], templates))
            maps = refine_maps(activate(cosines, options.activation, calibration), features, options.dense)
            for (_, tags), one_map in zip(used, maps, strict=True):
                masks = [item.masks[tag] for tag in tags]
                heat = resize_maps(one_map[None], masks[0].shape)[0].cpu().numpy()
                overlap = mask_overlap(heat > options.threshold, np.any(masks, axis=0), item.valid)
                different = _distinct(masks)
                balance = tag_balance(np.minimum(np.maximum(heat, 0), 1), different) if len(different) > 1 else None
                found.append({**asdict(overlap), "balance": balance})
        return {"captions": found, "left_out": len(tagged) - len(used)}

    settings = {
        "protocol": "text",
        "options": asdict(options),
        "calibration": asdict(calibration),
        "backbone": describe_backbone(adapter),
        "data": data.describe(),
    }
    with evaluation_mode(adapter):
        return run_protocol(
            "text", adapter, list(data.keys()), one, text_figures, settings,
            check=data.check, out=out, rank=rank, world=world, stage=stage,
        )  # fmt: skip


def _distinct(masks: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """Masks that differ: a man and a woman of one picture share the mask of persons, and are trivially balanced."""
    return list({mask.tobytes(): mask for mask in masks}.values())


def text_figures(records: Iterable[Record]) -> dict[str, Any]:
    """The figures of :func:`evaluate_text` from the records of its pictures."""
    overlaps: list[Overlap] = []
    balances: list[float] = []
    left_out = 0
    for record in records:
        left_out += record["left_out"]
        for caption in record["captions"]:
            overlaps.append(Overlap(caption["iou"], caption["fpr"], caption["fnr"]))
            if caption["balance"] is not None:
                balances.append(caption["balance"])
    mean = mean_overlap(overlaps)
    return {
        "caption_iou": mean.iou,
        "mfpr": mean.fpr,
        "mfnr": mean.fnr,
        "tag_balance": float(np.mean(balances)) if balances else float("nan"),
        "captions": len(overlaps),
        "left_out": left_out,
        "balanced_captions": len(balances),
    }
