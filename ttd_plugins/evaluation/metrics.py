"""Metrics of dense image-text alignment, as pure functions of arrays.

Each figure is made in two steps where sums suffice: counts, which add up over images and processes, and figures of
counts. :mod:`ttd_plugins.evaluation.torchmetrics_classes` has a torchmetrics twin of each, built on the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def average_precision(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Average precision of pooled candidates: the mean, over positives, of the precision at the rank of each.

    Candidates with equal scores share the precision at the end of their group, so that their order cannot matter.

    Args:
        scores: ``[N]``, higher for more likely positives.
        labels: bool ``[N]``.

    Returns:
        A value in [0, 1], or NaN where there is no positive.
    """
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order]
    group_end = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    found = np.cumsum(positive)[group_end]
    precision = found / (group_end + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


@dataclass(frozen=True)
class SelectionCounts:
    """Candidates pooled over captions: selected and true, selected only, true only, neither."""

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    true_negatives: int = 0

    def __add__(self, other: SelectionCounts) -> SelectionCounts:
        return SelectionCounts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
            self.true_negatives + other.true_negatives,
        )

    @property
    def precision(self) -> float:
        """``TP / (TP + FP)``; zero where nothing is selected."""
        return self.true_positives / max(self.true_positives + self.false_positives, 1)

    @property
    def recall(self) -> float:
        """``TP / (TP + FN)``; zero where nothing is true."""
        return self.true_positives / max(self.true_positives + self.false_negatives, 1)

    @property
    def f1(self) -> float:
        """``2 TP / (2 TP + FP + FN)``; zero where nothing is right."""
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / max(2 * self.true_positives + wrong, 1)

    @property
    def accuracy(self) -> float:
        """``(TP + TN) / all``; NaN where there is no candidate."""
        right = self.true_positives + self.true_negatives
        count = right + self.false_positives + self.false_negatives
        return right / count if count else float("nan")

    def as_dict(self) -> dict[str, float]:
        """The four figures by name."""
        return {name: getattr(self, name) for name in ("precision", "recall", "f1", "accuracy")}


def selection_counts(selected: NDArray[np.bool_], labels: NDArray[np.bool_]) -> SelectionCounts:
    """Count a selection of candidates, both bool ``[N]``."""
    true = int((selected & labels).sum())
    only_selected, only_true = int(selected.sum()) - true, int(labels.sum()) - true
    return SelectionCounts(true, only_selected, only_true, len(labels) - true - only_selected - only_true)


def f1_score(selected: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """F1 of a selection, pooled over candidates: ``2 TP / (2 TP + FP + FN)``; zero where nothing is right."""
    return selection_counts(selected, labels).f1


@dataclass(frozen=True)
class Overlap:
    """Three shares of the union of a predicted and a true region, which add to one (arXiv 2404.00384).

    Attributes:
        iou: ``TP / union``.
        fpr: ``(|P| - TP) / union``, what was predicted and is not true.
        fnr: ``(|T| - TP) / union``, what is true and was missed.
    """

    iou: float
    fpr: float
    fnr: float


def mask_overlap(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None
) -> Overlap:
    """IoU, FPR and FNR of two masks of one shape; ``(1, 0, 0)`` where both are empty.

    Args:
        prediction, truth: bool, of one shape.
        valid: bool of the same shape; pixels outside it count nowhere.
    """
    if valid is not None:
        prediction, truth = prediction & valid, truth & valid
    both, union = int((prediction & truth).sum()), int((prediction | truth).sum())
    if not union:
        return Overlap(1.0, 0.0, 0.0)
    return Overlap(both / union, (int(prediction.sum()) - both) / union, (int(truth.sum()) - both) / union)


def mean_overlap(overlaps: Iterable[Overlap]) -> Overlap:
    """Caption IoU with the caption-level FPR and FNR: the mean over captions of each; NaN without a caption."""
    rows = np.array([(one.iou, one.fpr, one.fnr) for one in overlaps], np.float64).reshape(-1, 3)
    if not len(rows):
        return Overlap(float("nan"), float("nan"), float("nan"))
    iou, fpr, fnr = rows.mean(0).tolist()
    return Overlap(iou, fpr, fnr)


IGNORE = 255
"""Class index of pixels that count nowhere."""


def class_counts(
    prediction: NDArray[np.integer], truth: NDArray[np.integer], classes: int, ignore: int = IGNORE
) -> NDArray[np.int64]:
    """Pixels of each class that are right, predicted, and true: int64 ``[3, C]``, which adds up over images.

    Args:
        prediction, truth: class indices of one shape; pixels whose truth is ``ignore`` count nowhere.
        classes: C.
        ignore: the index of pixels without a label.

    Raises:
        ValueError: a class index is outside 0 to C - 1.
    """
    valid = truth != ignore
    predicted, true = prediction[valid].astype(np.int64), truth[valid].astype(np.int64)
    for name, values in (("prediction", predicted), ("truth", true)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(f"the {name} holds class {int(values.max())} or {int(values.min())}, outside {classes}")
    rows = (true[predicted == true], predicted, true)
    return np.stack([np.bincount(row, minlength=classes) for row in rows]).astype(np.int64)


def class_figures(counts: NDArray[np.int64]) -> dict[str, Any]:
    """IoU, FPR and FNR of each class, and their means over the classes that occur.

    A class that is neither predicted nor true anywhere has no union: its figures are NaN, and the means leave it out.
    One that is predicted and never true counts, with IoU 0 and FPR 1.

    Args:
        counts: int64 ``[3, C]``, sums of :func:`class_counts` over images.

    Returns:
        ``iou``, ``fpr`` and ``fnr`` (lists of C), ``miou``, ``mfpr`` and ``mfnr``, which add to one, and ``present``
        (how many classes the means are over).
    """
    both, predicted, true = counts.astype(np.float64)
    union = predicted + true - both
    present = union > 0
    figures: dict[str, Any] = {}
    for name, part in (("iou", both), ("fpr", predicted - both), ("fnr", true - both)):
        values = np.full(len(union), np.nan)
        values[present] = part[present] / union[present]
        figures[name] = values.tolist()
        figures[f"m{name}"] = float(values[present].mean()) if present.any() else float("nan")
    return figures | {"present": int(present.sum())}


def intersection_over_union(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """``|P and T| / |P or T|`` of two masks of one shape; one where both are empty."""
    return mask_overlap(prediction, truth).iou


def upsample_map(similarity: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear resize of one map ``[H, W]`` to ``[height, width]``, pixel centres aligned (``align_corners=False``)."""
    resized = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(similarity, np.float32))[None, None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
    )
    return resized[0, 0].numpy()


def tag_balance(similarity: NDArray[np.floating], masks: Sequence[NDArray[np.bool_]]) -> float:
    """How evenly a caption's map covers its tags: the weakest tag's mean inside its mask over the strongest's.

    Args:
        similarity: the caption's map in [0, 1] at the size of the masks, ``[height, width]``.
        masks: bool ``[height, width]``, one for each of two true tags or more, none empty.

    Returns:
        A value in [0, 1]: one when every tag is covered alike, near zero under single tag bias, and zero for a map
        that is zero inside every mask.
    """
    means = [float(similarity[mask].mean()) for mask in masks]
    strongest = max(means)
    return min(means) / strongest if strongest > 0 else 0.0


def retrieval_recalls(
    image: Tensor, text: Tensor, owner: Sequence[int], groups: Sequence[Any], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k of image-text retrieval in both directions, with any number of captions an image.

    Args:
        image: ``[N, D]``, L2-normalised.
        text: ``[M, D]``, L2-normalised.
        owner: for each text the row of its image.
        groups: for each text what makes it interchangeable with others: the caption itself, or a hash of it. Texts of
            one group are right for each other's images.
        ks: how many of the best candidates are looked at.

    Returns:
        ``image_to_text_rK``, ``text_to_image_rK`` and their mean ``rK`` for every K. An image is found when any of
        its captions is among the best.
    """
    number: dict[Any, int] = {}
    group = torch.tensor([number.setdefault(name, len(number)) for name in groups], device=image.device)
    row = torch.as_tensor(owner, device=image.device)
    # Images and groups that belong together, so that identical captions are right for each other's images.
    belongs = torch.zeros(len(image), len(number), dtype=torch.bool, device=image.device)
    belongs[row, group] = True
    hits: dict[str, dict[int, float]] = {}
    for way, queries, targets in (("image_to_text", image, text), ("text_to_image", text, image)):
        found = dict.fromkeys(ks, 0.0)
        # In blocks, so that memory grows with N and not with N times M.
        for start in range(0, len(queries), 512):
            block = queries[start : start + 512]
            best = (block @ targets.T).topk(min(max(ks), len(targets)), dim=1).indices
            index = torch.arange(start, start + len(block), device=image.device)[:, None]
            right = belongs[index, group[best]] if way == "image_to_text" else belongs[best, group[index]]
            for k in ks:
                found[k] += float(right[:, :k].any(1).sum())
        hits[way] = {k: count / len(queries) for k, count in found.items()}
    figures = {f"{way}_r{k}": hits[way][k] for k in ks for way in hits}
    return figures | {f"r{k}": (hits["image_to_text"][k] + hits["text_to_image"][k]) / 2 for k in ks}


def retrieval_recall(image: Tensor, text: Tensor, captions: Sequence[str], k: int = 1) -> float:
    """Recall at k of image-text retrieval, the mean of both directions; identical captions are both right.

    Args:
        image: ``[N, D]``, L2-normalised.
        text: ``[N, D]``, L2-normalised, row n belonging to image n.
        captions: N texts; pairs with equal ones are interchangeable.
        k: how many of the best candidates are looked at.
    """
    return retrieval_recalls(image, text, range(len(captions)), captions, (k,))[f"r{k}"]


def zero_shot_hits(image: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """How many images have their class among the k whose embeddings are nearest.

    Args:
        image: ``[N, D]``, L2-normalised pooled embeddings.
        classes: ``[C, D]``, L2-normalised class embeddings.
        labels: int64 ``[N]``, or bool ``[N, C]`` where an image may show several classes, any of which is right, or
            none, and then none is a hit.
        ks: how many of the nearest classes are looked at.
    """
    best = (image @ classes.T).topk(min(max(ks), len(classes)), dim=1).indices
    right = labels.gather(1, best) if labels.ndim == 2 else best == labels[:, None]
    return {k: int(right[:, :k].any(1).sum()) for k in ks}


def zero_shot_accuracy(image: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Zero-shot classification accuracy at each k; see :func:`zero_shot_hits`.

    Images that show none of the classes count nowhere; without any other image it is NaN.
    """
    count = classified_images(labels)
    hits = zero_shot_hits(image, classes, labels, ks) if count else {}
    return {k: hits[k] / count if count else float("nan") for k in ks}


def classified_images(labels: Tensor) -> int:
    """How many images show a class; ``labels`` as in :func:`zero_shot_hits`."""
    return int(labels.any(1).sum()) if labels.ndim == 2 else len(labels)
