"""Comparison on data without captions and masks together: segmentation, labels of images, and held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.data_interface import Measurement, Sample, finite_or_none
from ttd_plugins.comparison.metric_definitions import LABEL_METRICS, PAIR_METRICS, SEGMENT_METRICS, ZERO_SHOT
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets import CaptionTruth, ClassNames, open_labels, open_named, open_segmentation
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.evaluation.true_tags import mentions_of_tags
from ttd_plugins.utils.progress import Stage

GALLERY_SIDE = 1024
"""Longest side in pixels of an image that is considered for the gallery, so that memory stays bounded."""
CLASSES_IN_CAPTION = 6
"""Classes that the caption of an image without captions names."""


def chosen_preset(presets: Mapping[str, Any], preset: str) -> Any:
    """Return a preset of a protocol.

    Raises:
        InputError: it is unknown.
    """
    if preset not in presets:
        raise InputError(choices_sentence("preset", preset, presets))
    return presets[preset]


class ClassData(CaptionedData):
    """Images with classes, which ``classes`` of the options may replace by others."""

    def open_classes(self, presets: Mapping[str, Any], opened: Callable[..., Any]) -> Any:
        """Choose the protocol's preset; open the data by ``opened`` and check them."""
        options = self.options
        self.protocol = replace(chosen_preset(presets, options.preset), calibration=options.ttd.calibration)
        more: dict[str, Any] = {"limit": options.limit, "split": options.split, "classes": options.classes}
        reader = opened(*self.place(), **{key: one for key, one in more.items() if one is not None})
        reader.check()
        reader.require_truth()
        return reader


class SegmentedData(ClassData):
    """A segmentation data set, measured by open-vocabulary segmentation.

    In the gallery the caption of an image lists the classes that it shows.
    """

    metrics = SEGMENT_METRICS
    trade_off = ("miou", ZERO_SHOT.key)

    def open_reader(self) -> Any:
        from ttd_plugins.evaluation.protocols import SEGMENT_PRESETS

        return self.open_classes(SEGMENT_PRESETS, open_segmentation)

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        from ttd_plugins.evaluation.protocols import evaluate_segment

        out = folder / "segment"
        found = evaluate_segment(backbone, self.reader, self.protocol, out=out, stage=stage).metrics or {}
        return Measurement({metric.key: finite_or_none(found[metric.key]) for metric in self.metrics})

    def samples(self, count: int) -> Iterator[Sample]:
        from ttd_plugins.data.images import read_image

        for key in self.reader.keys()[:count]:
            labels = self.reader.labels(key)
            image = _bounded(read_image(self.reader.image_path(key)))
            labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
            shown = _largest_first(labels, self.reader.background)[:CLASSES_IN_CAPTION]
            # A single true tag cannot show the bias.
            if len(shown) > 1:
                classes = [self.reader.classes[index] for index in shown]
                masks = {item.texts[0]: labels == index for item, index in zip(classes, shown, strict=True)}
                yield _listing_sample(key, image, classes, masks, labels != IGNORE)


class ImageLabelData(ClassData):
    """Images with labels, measured by multi-label classification; the gallery has no masks."""

    metrics = LABEL_METRICS
    trade_off = ("label_map", "label_map_image")

    def open_reader(self) -> Any:
        from ttd_plugins.evaluation.protocols import CLASSIFY_PRESETS

        return self.open_classes(CLASSIFY_PRESETS, open_labels)

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        from ttd_plugins.evaluation.protocols import evaluate_classify

        out = folder / "classify"
        found = evaluate_classify(backbone, self.reader, self.protocol, out=out, stage=stage).metrics or {}
        values = {
            "label_map": found["pixel"]["map"],
            "label_map_combined": found["combined"]["map"],
            "label_f1": found["pixel"]["f1"],
            "label_class_f1": found["pixel"]["class_f1"],
            "label_map_image": found["image"]["map"],
        }
        return Measurement({key: finite_or_none(value) for key, value in values.items()})

    def samples(self, count: int) -> Iterator[Sample]:
        from ttd_plugins.data.images import read_image

        found = 0
        for key in self.reader.keys()[:count]:
            shown = np.flatnonzero(self.reader.labels(key) == 1)[:CLASSES_IN_CAPTION]
            if len(shown) > 1 and found < self.options.gallery:
                found += 1
                classes = [self.reader.classes[index] for index in shown]
                yield _listing_sample(key, _bounded(read_image(self.reader.image_path(key))), classes, {}, None)


class PairData(CaptionedData):
    """Held-out image-text pairs, measured by retrieval and by the losses of TTD; the gallery has no masks."""

    metrics = PAIR_METRICS
    trade_off = ("retrieval_r1", "retrieval_r5")

    def open_reader(self) -> Any:
        from ttd_plugins.evaluation.protocols import RETRIEVAL_PRESETS

        options = self.options
        preset = chosen_preset(RETRIEVAL_PRESETS, options.preset)
        self.protocol = replace(preset, losses=True, ttd=options.ttd)
        _, spec = self.place()
        reader = open_named(spec, kind="pairs", limit=options.limit, split=options.split)
        reader.check()
        return reader

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        from ttd_plugins.evaluation.protocols import evaluate_retrieval

        out = folder / "retrieval"
        found = evaluate_retrieval(backbone, self.reader, self.protocol, out=out, stage=stage).metrics or {}
        values = {name: found[name] for name in ("image_to_text_r1", "text_to_image_r1")}
        values |= {"retrieval_r1": found["r1"], "retrieval_r5": found["r5"]}
        values |= {f"loss_{name}": found["loss"].get(name) for name in ("contrastive", "tag", "distill")}
        return Measurement({key: finite_or_none(value) for key, value in values.items()})

    def samples(self, count: int) -> Iterator[Sample]:
        keys = self.reader.keys()
        found = 0
        # Nothing ranks images without masks, so that no more are needed than are shown.
        step = max(len(keys) // max(self.options.gallery, 1), 1)
        for key in dict.fromkeys([*keys[::step], *keys]):
            if found == min(self.options.gallery, count, len(keys)):
                return
            captions = self.reader.captions(key)
            if not captions:
                continue
            try:
                image = _bounded(self.reader.image(key))
            except InputError:
                continue
            found += 1
            yield Sample(key, np.asarray(image), captions[0], {})


def _bounded(image: Image.Image) -> Image.Image:
    """Return an image of at most :data:`GALLERY_SIDE` pixels on its longest side."""
    factor = GALLERY_SIDE / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _largest_first(labels: NDArray[np.uint8], background: int | None) -> list[int]:
    indices, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [int(index) for index in indices[order] if index not in (IGNORE, background)]


def _listing_sample(
    key: str,
    image: Image.Image,
    classes: Sequence[ClassNames],
    masks: Mapping[str, NDArray[np.bool_]],
    valid: NDArray[np.bool_] | None,
) -> Sample:
    """Return a sample whose caption lists classes, all of which the image shows."""
    names = [item.texts[0] for item in classes]
    caption = ", ".join(names)
    mentions = tuple(mentions_of_tags(caption, names))
    truth = CaptionTruth(caption, mentions, tuple(True for _ in mentions))
    return Sample(key, np.asarray(image), caption, masks, valid, caption_truth=truth)
