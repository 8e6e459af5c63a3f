"""Open-vocabulary segmentation: the class of every pixel among a data set's class names (arXiv 2404.00384)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets import SegmentationData
from ttd_plugins.evaluation.dense_inference import (
    Activation,
    DenseOptions,
    activate,
    class_embeddings,
    dense_features,
    label_map,
    refine_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.metrics import IGNORE, class_counts, class_figures
from ttd_plugins.evaluation.protocols.runner import EvaluationResult, Record, describe_backbone, run_protocol
from ttd_plugins.evaluation.protocols.text import PAPER_SCALES
from ttd_plugins.evaluation.protocols.zero_shot import shown_hits, zero_shot_figures
from ttd_plugins.utils.progress import Stage, no_progress

Background = Literal["constant", "auto", "words", "none"]

BACKGROUND_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
    "bridge", "sign",
)  # fmt: skip
"""Words for what VOC calls background, as Lin et al. (CVPR 2023) list them; those that name a class are left out."""


@dataclass(frozen=True)
class SegmentProtocol:
    """How every pixel gets its class.

    Attributes:
        dense: how a picture is looked at.
        activation: what is compared with the background plane: ``"probability"`` (calibrated, as in TCL),
            ``"minmax"`` or ``"cosine"``.
        templates: ``"imagenet"`` (80), ``"photo"`` or ``"none"``.
        aliases: whether a class has the usual aliases beside its name; its score is the best of them.
        background: ``"constant"``: a plane of ``threshold`` takes part, which is class background where the data set
            has one, and no class elsewhere; ``"auto"``: that plane where the data set has a background, and none
            elsewhere; ``"words"``: ``background_words`` in its place; ``"none"``: neither, and a class named
            background is a class like others.
        threshold: the constant plane; ``None`` means the paper's for the data set (:data:`THRESHOLDS`).
        background_words: names of the background for ``"words"``.
        calibration: for the activation ``"probability"``; ``None`` means the backbone's own.
    """

    dense: DenseOptions = field(
        default_factory=lambda: DenseOptions(size=448, scales=PAPER_SCALES, flip=True, refine=True)
    )
    activation: Activation = "probability"
    templates: str = "imagenet"
    aliases: bool = True
    background: Background = "constant"
    threshold: float | None = None
    background_words: tuple[str, ...] = BACKGROUND_WORDS
    calibration: Calibration | None = None


THRESHOLDS = {
    "voc": 0.40, "cityscapes": 0.40, "coco_stuff": 0.40, "coco_object": 0.45, "ade20k": 0.45, "context59": 0.45,
    "context60": 0.45,
}  # fmt: skip
"""Constant background planes of the paper's commands; 0.40 for other data sets."""

SEGMENT_PRESETS: dict[str, SegmentProtocol] = {
    "paper": SegmentProtocol(),
    # TCL's own evaluation: short side 448, windows of 448 every 224 pixels, one scale, no flip.
    "tcl": SegmentProtocol(
        dense=DenseOptions(size=448, resize="short", window=448, stride=224, refine=True), background="auto"
    ),
    "fast": SegmentProtocol(dense=DenseOptions(size=224), templates="photo", background="auto"),
}
"""``"paper"``: 448 pixels, scales 1, 0.5, 1.5, 2, flip, PAMR, 80 templates, a constant plane on every data set."""


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
    """Measure open-vocabulary segmentation.

    Figures: ``miou``, ``mfpr``, ``mfnr`` (means over the classes that occur, adding to one), ``classes`` with the
    three of each, ``present``, ``pixel_accuracy``, and ``zero_shot_top1`` and ``zero_shot_top5``: how often one of
    the nearest class names to the pooled image embedding names a class that the picture shows, background aside.

    Args and errors as in :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`.
    """
    options = options or SegmentProtocol()
    if options.background not in get_args(Background):
        raise InputError(choices_sentence("background", options.background, get_args(Background)))
    if options.threshold is None:
        options = replace(options, threshold=THRESHOLDS.get(data.name, 0.40))
    calibration = options.calibration or adapter.description.calibration
    templates = templates_by_name(options.templates)
    count = len(data.classes)
    # Pixels of no class are one more class, which no truth holds and no figure counts.
    nothing = count if data.background is None else data.background
    plane = options.background == "constant" or (options.background == "auto" and data.background is not None)
    names, owners = _names(data, options, nothing, plane)
    owner = torch.tensor(owners)
    lazily: dict[str, torch.Tensor] = {}

    def embeddings() -> torch.Tensor:
        # Thousands of texts: only once the files were found to be right.
        if "names" not in lazily:
            advance = (stage or no_progress)("class names", len(names))
            parts = []
            for name in names:
                parts.append(class_embeddings(adapter, [name], templates))
                advance(1)
            lazily["names"] = torch.cat(parts)
        return lazily["names"]

    def one(key: str) -> Record:
        truth = data.labels(key)
        texts = embeddings()
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
            "zero_shot": shown_hits(features.pooled, texts, owner, count, shown, left_out=nothing),
        }

    settings = {
        "protocol": "segment",
        "options": asdict(options),
        "calibration": asdict(calibration),
        "backbone": describe_backbone(adapter),
        "data": data.describe(),
        "names": {
            label: [n for n, o in zip(names, owners, strict=True) if o == i] for i, label in _labels(data, nothing)
        },
    }
    with evaluation_mode(adapter):
        return run_protocol(
            "segment", adapter, list(data.keys()), one,
            partial(segment_figures, classes=[names.name for names in data.classes]), settings,
            check=data.check, prepare=embeddings, out=out, rank=rank, world=world, stage=stage,
        )  # fmt: skip


def _labels(data: SegmentationData, nothing: int) -> list[tuple[int, str]]:
    named = [(i, names.name) for i, names in enumerate(data.classes)]
    return named + ([(nothing, "no class")] if nothing == len(named) else [])


def _names(data: SegmentationData, options: SegmentProtocol, nothing: int, plane: bool) -> tuple[list[str], list[int]]:
    """The texts that are encoded, and the class of each."""
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


def segment_figures(records: Iterable[Record], classes: list[str]) -> dict[str, Any]:
    """The figures of :func:`evaluate_segment` from the records of its pictures."""
    counts = np.zeros((3, len(classes) + 1), np.int64)
    hits = []
    for record in records:
        for index, column in record["counts"].items():
            counts[:, int(index)] += np.array(column, np.int64)
        hits.append(record["zero_shot"])
    figures = class_figures(counts[:, :-1])
    each = {name: {part: figures[part][index] for part in ("iou", "fpr", "fnr")} for index, name in enumerate(classes)}
    pixels = int(counts[2].sum())
    return {
        **{name: figures[name] for name in ("miou", "mfpr", "mfnr", "present")},
        "pixel_accuracy": int(counts[0].sum()) / pixels if pixels else float("nan"),
        **{f"zero_shot_{name}": value for name, value in zero_shot_figures(hits).items()},
        "classes": each,
    }
