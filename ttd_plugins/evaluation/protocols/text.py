"""Text-level segmentation: a caption's map against the union of the masks of its true tags (arXiv 2404.00384).

Caption IoU, FPR and FNR are each the mean over captions. The published values add up to one, so they share one
aggregation, but the paper does not say which. Tag balance is the mean over captions with at least two distinct masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import CaptionData
from ttd_plugins.evaluation.dense_inference import (
    activate,
    class_embeddings,
    dense_features,
    refine_maps,
    resize_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.metric_accumulators import CaptionOverlapAccumulator, TagBalanceAccumulator
from ttd_plugins.evaluation.metrics import mask_overlap, tag_balance
from ttd_plugins.evaluation.protocol_options import TextProtocol
from ttd_plugins.evaluation.protocols.runner import (
    EvaluationResult,
    Record,
    checked,
    require_truth,
    run_protocol,
    run_settings,
)
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.progress import Stage


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
    """Evaluate caption maps on captioned images. Captions without a true tag are skipped.

    Metrics: ``caption_iou``, ``mfpr`` and ``mfnr`` (means over captions, which add up to one), ``tag_balance``, and the
    numbers of captions: measured (``captions``), skipped (``left_out``), and in the balance (``balanced_captions``).

    Arguments and errors are those of :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`.
    """
    options = options or TextProtocol()
    if options.activation == "cosine":
        raise InputError("the threshold applies to maps in [0, 1]; use the activation minmax or probability")
    templates = templates_by_name(options.templates)
    calibration = options.calibration or adapter.description.calibration

    def record_of(key: str) -> Record:
        item = data.read(key)
        tagged = [(truth.caption, truth.true_tags()) for truth in item.captions]
        tagged = [(caption, [tag for tag in tags if item.masks[tag].any()]) for caption, tags in tagged]
        used = [(caption, tags) for caption, tags in tagged if tags]
        found = []
        if used:
            features = dense_features(adapter, read_image(item.path), options.dense)
            cosines = features.maps(class_embeddings(adapter, [caption for caption, _ in used], templates))
            maps = refine_maps(activate(cosines, options.activation, calibration), features, options.dense)
            for (_, tags), caption_map in zip(used, maps, strict=True):
                masks = [item.masks[tag] for tag in tags]
                heat = resize_maps(caption_map[None], masks[0].shape)[0].cpu().numpy()
                overlap = mask_overlap(heat > options.threshold, np.any(masks, axis=0), item.valid)
                distinct = _distinct(masks)
                balance = tag_balance(np.minimum(np.maximum(heat, 0), 1), distinct) if len(distinct) > 1 else None
                found.append({**asdict(overlap), "balance": balance})
        return {"captions": found, "left_out": len(tagged) - len(used)}

    return run_protocol(
        "text", adapter, list(data.keys()), record_of, _measured,
        run_settings("text", adapter, options, calibration, data.describe()),
        check=checked(data), out=out, rank=rank, world=world, stage=stage,
    )  # fmt: skip


def _measured(records: Iterable[Record]) -> dict[str, Any]:
    found = text_metrics(records)
    return require_truth(found, found["captions"], f"none of {found['left_out']} captions has a true tag")


def _distinct(masks: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """Remove equal masks: a man and a woman share the mask of class person, which would be trivially balanced."""
    return list({mask.tobytes(): mask for mask in masks}.values())


def text_metrics(records: Iterable[Record]) -> dict[str, Any]:
    """Compute the metrics of :func:`evaluate_text` from the records of its images."""
    overlap, balance = CaptionOverlapAccumulator(), TagBalanceAccumulator()
    left_out = 0
    for record in records:
        left_out += record["left_out"]
        for caption in record["captions"]:
            overlap.add({"overlaps": np.array([(caption["iou"], caption["fpr"], caption["fnr"])])})
            if caption["balance"] is not None:
                balance.add({"balances": np.array([caption["balance"]])})
    mean = overlap.compute()
    return {
        "caption_iou": mean["iou"],
        "mfpr": mean["fpr"],
        "mfnr": mean["fnr"],
        "tag_balance": balance.compute(),
        "captions": len(overlap.states()["overlaps"]),
        "left_out": left_out,
        "balanced_captions": len(balance.states()["balances"]),
    }


__getattr__ = renamed_names(__name__, {"text_figures": "text_metrics"})
