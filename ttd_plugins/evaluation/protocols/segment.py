"""Open-vocabulary segmentation: each pixel gets one of a data set's classes by their names (arXiv 2404.00384)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets import SegmentationData
from ttd_plugins.evaluation.dense_inference import (
    activate,
    class_embeddings,
    dense_features,
    label_map,
    refine_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.metric_accumulators import ClassOverlapAccumulator
from ttd_plugins.evaluation.metrics import IGNORE, class_counts
from ttd_plugins.evaluation.protocol_options import PLANE, THRESHOLDS, Background, SegmentProtocol
from ttd_plugins.evaluation.protocols.runner import (
    EvaluationResult,
    Record,
    checked,
    require_truth,
    run_protocol,
    run_settings,
)
from ttd_plugins.evaluation.protocols.zero_shot import image_hits, zero_shot_metrics
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.progress import Stage, list_with_progress, no_progress


def evaluate_segment(
    adapter: DenseAdapter,
    data: SegmentationData,
    options: SegmentProtocol | None = None,
    *,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Evaluate open-vocabulary segmentation.

    Metrics: ``miou``, ``mfpr``, ``mfnr`` (means over the ``present`` classes, which add up to one), ``classes`` with
    the three metrics of each class, ``pixel_accuracy``, and ``zero_shot_top1`` and ``zero_shot_top5``: the fraction of
    images that show one of the 1 or 5 classes whose names are nearest to the pooled image embedding, without the
    background.

    Arguments and errors are those of :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`.
    """
    options = options or SegmentProtocol()
    if options.background not in get_args(Background):
        raise InputError(choices_sentence("background", options.background, get_args(Background)))
    if options.threshold is None:
        options = replace(options, threshold=THRESHOLDS.get(data.name, PLANE))
    calibration = options.calibration or adapter.description.calibration
    templates = templates_by_name(options.templates)
    count = len(data.classes)
    # "No class" is one more class, which never occurs in the truth and is in no metric.
    nothing = count if data.background is None else data.background
    plane = options.background == "constant" or (options.background == "auto" and data.background is not None)
    names, owners = _names(data, options, nothing, plane)
    owner = torch.tensor(owners)
    cache: list[torch.Tensor] = []

    def encode_names() -> None:
        # Thousands of texts, so only after the files were checked.
        embeddings = (class_embeddings(adapter, [name], templates) for name in names)
        cache.append(torch.cat(list_with_progress(embeddings, (stage or no_progress)("class names", len(names)))))

    def record_of(key: str) -> Record:
        truth = data.labels(key)
        (texts,) = cache
        features = dense_features(adapter, read_image(data.image_path(key)), options.dense, pooled=True)
        maps = activate(features.maps(texts), options.activation, calibration)
        maps = refine_maps(maps, features, options.dense)
        prediction = label_map(
            maps,
            owner,
            (truth.shape[0], truth.shape[1]),
            background=options.threshold if plane else None,
            background_class=nothing,
        )
        counts = class_counts(prediction, truth, count + 1)
        used = np.flatnonzero(counts.any(0))
        assert features.pooled is not None
        shown = [int(i) for i in np.unique(truth) if i != IGNORE and i != data.background]
        return {
            "counts": {str(i): counts[:, i].tolist() for i in used},
            "zero_shot": image_hits(features.pooled, texts, owner, count, shown, left_out=nothing),
        }

    settings = run_settings("segment", adapter, options, calibration, data.describe())
    settings["names"] = {
        label: [n for n, o in zip(names, owners, strict=True) if o == i] for i, label in _labels(data, nothing)
    }
    return run_protocol(
        "segment", adapter, list(data.keys()), record_of,
        partial(_measured, classes=[names.name for names in data.classes]), settings,
        check=checked(data), prepare=encode_names, out=out, rank=rank, world=world, stage=stage,
    )  # fmt: skip


def _measured(records: Iterable[Record], classes: list[str]) -> dict[str, Any]:
    found = segment_metrics(records, classes)
    return require_truth(found, found["present"], "no pixel of any image has a class")


def _labels(data: SegmentationData, nothing: int) -> list[tuple[int, str]]:
    named = [(i, names.name) for i, names in enumerate(data.classes)]
    return named + ([(nothing, "no class")] if nothing == len(named) else [])


def _names(data: SegmentationData, options: SegmentProtocol, nothing: int, plane: bool) -> tuple[list[str], list[int]]:
    """Return the texts to encode, and the class index of each."""
    names: list[str] = []
    owners: list[int] = []
    for index, item in enumerate(data.classes):
        if index == data.background and (plane or options.background == "words"):
            continue
        texts = item.texts if options.aliases else item.texts[:1]
        names += texts
        owners += [index] * len(texts)
    if options.background == "words":
        taken = {text for item in data.classes for text in item.texts}
        words = [word for word in options.background_words if word not in taken]
        names += words
        owners += [nothing] * len(words)
    return names, owners


def segment_metrics(records: Iterable[Record], classes: list[str]) -> dict[str, Any]:
    """Compute the metrics of :func:`evaluate_segment` from the records of its images."""
    overlap = ClassOverlapAccumulator(len(classes))
    correct = pixels = 0
    hits = []
    for record in records:
        # The last column is "no class".
        counts = np.zeros((3, len(classes) + 1), np.int64)
        for index, column in record["counts"].items():
            counts[:, int(index)] = column
        overlap.add({"counts": counts[:, :-1]})
        correct, pixels = correct + int(counts[0].sum()), pixels + int(counts[2].sum())
        hits.append(record["zero_shot"])
    found = overlap.compute()
    each = {name: {part: found[part][index] for part in ("iou", "fpr", "fnr")} for index, name in enumerate(classes)}
    return {
        **{name: found[name] for name in ("miou", "mfpr", "mfnr", "present")},
        "pixel_accuracy": correct / pixels if pixels else float("nan"),
        **{f"zero_shot_{name}": value for name, value in zero_shot_metrics(hits).items()},
        "classes": each,
    }


__getattr__ = renamed_names(__name__, {"segment_figures": "segment_metrics"})
