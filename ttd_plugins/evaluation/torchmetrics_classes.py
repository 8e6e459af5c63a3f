"""Metrics that collect over batches and agree over processes: torchmetrics twins of
:mod:`ttd_plugins.evaluation.metrics`.

States are sums wherever sums suffice; average precision and retrieval need every candidate, so theirs are concatenated.
This module needs torchmetrics; nothing else in the package does.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.errors import MissingDependencyError, one_sentence
from ttd_plugins.evaluation import metrics

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise MissingDependencyError(
        f"the stateful metrics need torchmetrics ({one_sentence(error)}); run: pip install torchmetrics"
    ) from error


def _bools(values: Any) -> NDArray[np.bool_]:
    return (values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)).astype(bool)


class TagSelectionFigures(Metric):
    """Precision, recall, F1 and accuracy of selected tags, pooled (:class:`metrics.SelectionCounts`)."""

    full_state_update = False
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, selected: Any, labels: Any) -> None:
        """Add candidates: bool ``[N]`` each."""
        found = metrics.selection_counts(_bools(selected), _bools(labels))
        self.counts += torch.tensor(
            [found.true_positives, found.false_positives, found.false_negatives, found.true_negatives],
            device=self.counts.device,
        )

    def compute(self) -> dict[str, Tensor]:
        """The four figures by name."""
        figures = metrics.SelectionCounts(*self.counts.tolist()).as_dict()
        return {name: torch.tensor(value) for name, value in figures.items()}


class TagAveragePrecision(Metric):
    """Average precision of scores pooled over candidate words (:func:`metrics.average_precision`), the paper's mAP."""

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Any, labels: Any) -> None:
        """Add candidates: float ``[N]`` and bool ``[N]``."""
        self.scores.append(torch.as_tensor(scores, dtype=torch.float32, device=self.device))
        self.labels.append(torch.as_tensor(labels, dtype=torch.bool, device=self.device))

    def compute(self) -> Tensor:
        """A scalar in [0, 1]; NaN without a positive."""
        if not len(self.scores):
            return torch.tensor(float("nan"))
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        return torch.tensor(metrics.average_precision(scores.cpu().numpy(), labels.cpu().numpy()))


class CaptionOverlap(Metric):
    """Caption IoU, FPR and FNR, each the mean over captions (:func:`metrics.mean_overlap`); the three add to one."""

    full_state_update = False
    sums: Tensor
    captions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("captions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Any, truth: Any, valid: Any = None) -> None:
        """Add one caption: bool masks of one shape."""
        found = metrics.mask_overlap(_bools(prediction), _bools(truth), None if valid is None else _bools(valid))
        self.sums += torch.tensor([found.iou, found.fpr, found.fnr], dtype=torch.float64, device=self.sums.device)
        self.captions += 1

    def compute(self) -> dict[str, Tensor]:
        """``iou``, ``fpr``, ``fnr``; NaN without a caption."""
        return dict(zip(("iou", "fpr", "fnr"), self.sums / self.captions, strict=True))


class ClassOverlap(Metric):
    """IoU, FPR and FNR of each class and their means over the classes that occur (:func:`metrics.class_figures`).

    Args:
        classes: C.
        ignore: class index of pixels that count nowhere.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int, ignore: int = metrics.IGNORE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes, self.ignore = classes, ignore
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Any, truth: Any) -> None:
        """Add class indices of one shape."""
        predicted, true = (
            values.cpu().numpy() if isinstance(values, Tensor) else values for values in (prediction, truth)
        )
        found = metrics.class_counts(predicted, true, self.classes, self.ignore)
        self.counts += torch.from_numpy(found).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """``iou``, ``fpr``, ``fnr`` (``[C]``, NaN for absent classes), ``miou``, ``mfpr``, ``mfnr`` and ``present``."""
        return {name: torch.tensor(value) for name, value in metrics.class_figures(self.counts.cpu().numpy()).items()}


class TagBalance(Metric):
    """Mean over captions with two true tags or more of :func:`metrics.tag_balance`."""

    full_state_update = False
    total: Tensor
    captions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("captions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, similarity: Any, masks: Sequence[Any]) -> None:
        """Add one caption's map in [0, 1] and the masks of its true tags; captions with fewer than two are left out."""
        if len(masks) > 1:
            heat = similarity.cpu().numpy() if isinstance(similarity, Tensor) else similarity
            self.total += metrics.tag_balance(heat, [_bools(mask) for mask in masks])
            self.captions += 1

    def compute(self) -> Tensor:
        """A scalar in [0, 1]; NaN without a caption."""
        return self.total / self.captions


class RetrievalRecall(Metric):
    """Image-text retrieval R@k over all that was added (:func:`metrics.retrieval_recalls`).

    Args:
        ks: how many of the best candidates are looked at.
    """

    full_state_update = False
    images: list[Tensor]
    texts: list[Tensor]
    keys: list[Tensor]
    owners: list[Tensor]
    groups: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        for name in ("images", "texts", "keys", "owners", "groups"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, images: Tensor, texts: Tensor, keys: Sequence[int], owners: Sequence[int], captions: Sequence[str]
    ) -> None:
        """Add a batch.

        Args:
            images: ``[N, D]``, L2-normalised.
            texts: ``[M, D]``, L2-normalised.
            keys: N numbers, one an image, that are distinct over all batches and processes.
            owners: for each text the key of its image.
            captions: M texts; identical ones are right for each other's images.
        """
        self.images.append(images)
        self.texts.append(texts)
        self.keys.append(torch.as_tensor(keys, device=self.device))
        self.owners.append(torch.as_tensor(owners, device=self.device))
        # Two numbers of 32 bits make one that is the same in every process, as Python's own hash is not.
        hashes = [zlib.crc32(text.encode()) << 31 ^ zlib.adler32(text.encode()) for text in captions]
        self.groups.append(torch.tensor(hashes, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """``image_to_text_rK``, ``text_to_image_rK`` and ``rK`` for every K."""
        keys = {key: row for row, key in enumerate(dim_zero_cat(self.keys).tolist())}
        figures = metrics.retrieval_recalls(
            dim_zero_cat(self.images),
            dim_zero_cat(self.texts),
            [keys[owner] for owner in dim_zero_cat(self.owners).tolist()],
            dim_zero_cat(self.groups).tolist(),
            self.ks,
        )
        return {name: torch.tensor(value) for name, value in figures.items()}


class ZeroShotAccuracy(Metric):
    """Zero-shot classification accuracy at each k (:func:`metrics.zero_shot_accuracy`)."""

    full_state_update = False
    hits: Tensor
    images: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.add_state("hits", torch.zeros(len(self.ks), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, classes: Tensor, labels: Tensor) -> None:
        """Add images; shapes as in :func:`metrics.zero_shot_hits`."""
        if len(images):
            found = metrics.zero_shot_hits(images, classes, labels, self.ks)
            self.hits += torch.tensor([found[k] for k in self.ks], device=self.hits.device)
            self.images += metrics.classified_images(labels)

    def compute(self) -> dict[str, Tensor]:
        """``top1``, ``top5``, ...; NaN without an image that shows a class."""
        return {f"top{k}": hits / self.images for k, hits in zip(self.ks, self.hits, strict=True)}
