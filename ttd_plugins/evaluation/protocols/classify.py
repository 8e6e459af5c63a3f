"""Multi-label classification: which classes of a data set an image shows, by their names.

The pixel score of a class is that of its nearest patch (arXiv 2404.00384); the image score is that of the pooled
embedding. The combined score is their mean: TagCLIP averages the score of local features and that of global ones with
equal weights (arXiv 2312.12828), though it refines the first by attention and takes the second from a crop.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.reader import UNKNOWN, LabelData
from ttd_plugins.evaluation.dense_inference import class_embeddings, dense_features, templates_by_name
from ttd_plugins.evaluation.metric_accumulators import MultiLabelAccumulator
from ttd_plugins.evaluation.protocol_options import ClassifyProtocol
from ttd_plugins.evaluation.protocols.runner import (
    EvaluationResult,
    Record,
    checked,
    pack,
    require_truth,
    run_protocol,
    run_settings,
    unpack,
)
from ttd_plugins.method import selection
from ttd_plugins.utils.progress import Stage, list_with_progress, no_progress

LABEL_SCORES = ("pixel", "image", "combined")
PATCHES_AT_ONCE = 4096
"""Patches whose scores of all classes are computed at once."""


def evaluate_classify(
    adapter: DenseAdapter,
    data: LabelData,
    options: ClassifyProtocol | None = None,
    *,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Evaluate multi-label classification by the names of classes.

    Metrics, for each of ``pixel``, ``image`` and ``combined``: ``map``, ``precision``, ``recall``, ``f1`` (overall) and
    ``class_precision``, ``class_recall``, ``class_f1``; see
    :func:`~ttd_plugins.evaluation.metrics.multilabel_metrics`. Further: ``images``, ``present`` (classes with an image,
    over which means are), and ``classes``: number of ``positives`` and ``ap`` by each score, and ``f1`` of the pixel
    score.

    Arguments and errors are those of :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`.
    """
    options = options or ClassifyProtocol()
    if options.dense.refine:
        raise InputError("PAMR does not apply to classification, which scores unrefined maps; leave it out")
    calibration = options.calibration or adapter.description.calibration
    templates = templates_by_name(options.templates)
    names: list[str] = []
    owners: list[int] = []
    for index, item in enumerate(data.classes):
        texts = item.texts if options.aliases else item.texts[:1]
        names += texts
        owners += [index] * len(texts)
    taken = set(names)
    words = [word for word in options.background_words if word not in taken]
    if words and options.activation != "softmax":
        raise InputError("background words compete with the classes in the softmax; use that activation")
    names += words
    owners += range(len(data.classes), len(data.classes) + len(words))
    owner = torch.tensor(owners)
    cache: list[Tensor] = []

    def encode_names() -> None:
        # Thousands of texts, so only after the files were checked.
        embeddings = (class_embeddings(adapter, [name], templates) for name in names)
        cache.append(torch.cat(list_with_progress(embeddings, (stage or no_progress)("class names", len(names)))))

    def record_of(key: str) -> Record:
        labels = data.labels(key)
        (texts,) = cache
        features = dense_features(adapter, read_image(data.image_path(key)), options.dense, pooled=True)
        assert features.pooled is not None
        maps = features.maps(texts).flatten(1)
        pooled = (texts @ features.pooled.to(texts))[:, None]
        scores = {
            "pixel": class_scores(maps, owner, len(data.classes), adapter, options.activation, calibration),
            "image": class_scores(pooled, owner, len(data.classes), adapter, options.activation, calibration),
        }
        scores["combined"] = (scores["pixel"] + scores["image"]) / 2
        return {
            "shown": np.flatnonzero(labels == 1).tolist(),
            "unknown": np.flatnonzero(labels == UNKNOWN).tolist(),
            "scores": {name: pack(values) for name, values in scores.items()},
        }

    settings = run_settings("classify", adapter, options, calibration, data.describe())
    settings["names"] = {
        item.name: [name for name, place in zip(names, owners, strict=True) if place == index]
        for index, item in enumerate(data.classes)
    }
    return run_protocol(
        "classify", adapter, list(data.keys()), record_of,
        partial(_measured, classes=[item.name for item in data.classes], options=options), settings,
        check=checked(data), prepare=encode_names, out=out, rank=rank, world=world, stage=stage,
    )  # fmt: skip


def class_scores(
    cosines: Tensor, owner: Tensor, count: int, adapter: DenseAdapter, activation: str, calibration: Calibration
) -> Tensor:
    """Return the score of each class: the highest of its activated cosines over locations.

    Args:
        cosines: ``[M, P]``, of M texts at P locations.
        owner: int64 ``[M]``, class index of each text; indices from ``count`` on are words that only compete.
        count: C.
        adapter: the backbone, for its logit scale.
        activation: ``"softmax"``, ``"cosine"`` or ``"probability"``.
        calibration: of the activation ``"probability"``.

    Returns:
        ``[C]``.
    """
    total = int(owner.max()) + 1
    best: list[Tensor] = []
    for part in cosines.split(PATCHES_AT_ONCE, dim=1):
        index = owner.to(part.device)[:, None].expand_as(part)
        of_classes = part.new_full((total, part.shape[1]), -torch.inf).scatter_reduce(0, index, part, reduce="amax")
        if activation == "softmax":
            of_classes = (adapter.logit_scale().detach().to(of_classes) * of_classes).softmax(0)
        elif activation == "probability":
            of_classes = calibration.probability(of_classes)
        best.append(of_classes[:count].amax(1))
    return torch.stack(best).amax(0)


def select_classes(scores: Tensor, options: ClassifyProtocol) -> Tensor:
    """Return the selected classes of images: scores ``[N, C]`` to bool ``[N, C]``."""
    if options.rule == "top":
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(1, scores.topk(min(options.top, scores.shape[1]), dim=1).indices, True)
    index = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    found = selection.select_tags(scores.flatten(), index, len(scores), rule=options.rule, threshold=options.threshold)
    return found.reshape(scores.shape)


def _measured(records: Iterable[Record], classes: list[str], options: ClassifyProtocol) -> dict[str, Any]:
    found = classify_metrics(records, classes, options)
    return require_truth(found, found["present"], f"none of {found['images']} images has a label")


def classify_metrics(records: Iterable[Record], classes: list[str], options: ClassifyProtocol) -> dict[str, Any]:
    """Compute the metrics of :func:`evaluate_classify` from the records of its images."""
    accumulators = {name: MultiLabelAccumulator(len(classes)) for name in LABEL_SCORES}
    images = 0
    for record in records:
        images += 1
        labels = np.zeros((1, len(classes)), np.int8)
        labels[0, record["shown"]], labels[0, record["unknown"]] = 1, UNKNOWN
        for name, values in record["scores"].items():
            scores = unpack([values])
            accumulators[name].update(scores, labels, select_classes(scores, options))
    found = {name: accumulator.compute() for name, accumulator in accumulators.items()}
    each = {
        name: {"positives": found["pixel"]["positives"][place], "f1": found["pixel"]["f1s"][place]}
        | {f"ap_{score}": found[score]["ap"][place] for score in LABEL_SCORES}
        for place, name in enumerate(classes)
    }
    lists = ("ap", "precisions", "recalls", "f1s", "positives", "present")
    return {
        **{score: {key: value for key, value in found[score].items() if key not in lists} for score in LABEL_SCORES},
        "images": images,
        "present": found["pixel"]["present"],
        "classes": each,
    }
