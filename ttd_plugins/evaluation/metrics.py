"""Metrics of dense image-text alignment, as pure functions of arrays.

Where sums suffice, a metric has two steps: counts, which are additive over images and processes, and metrics of counts.
:mod:`ttd_plugins.evaluation.metric_accumulators` applies these functions batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.utils.deprecation import renamed_names

__getattr__ = renamed_names(__name__, {"class_figures": "class_overlaps"})


def average_precision(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Return the average precision of pooled candidates: the mean, over positives, of the precision at their rank.

    Candidates with equal scores share the precision at the end of their group, so that their order is irrelevant.

    Args:
        scores: ``[N]``, higher for more likely positives.
        labels: bool ``[N]``.

    Returns:
        A value in [0, 1], or NaN without a positive.
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
    """Numbers of candidates, pooled over captions: selected and true, selected only, true only, neither."""

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
        """``TP / (TP + FP)``; zero if nothing is selected."""
        return self.true_positives / max(self.true_positives + self.false_positives, 1)

    @property
    def recall(self) -> float:
        """``TP / (TP + FN)``; zero if nothing is true."""
        return self.true_positives / max(self.true_positives + self.false_negatives, 1)

    @property
    def f1(self) -> float:
        """``2 TP / (2 TP + FP + FN)``; zero if there is no true positive."""
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / max(2 * self.true_positives + wrong, 1)

    @property
    def accuracy(self) -> float:
        """``(TP + TN) / all``; NaN without a candidate."""
        right = self.true_positives + self.true_negatives
        count = right + self.false_positives + self.false_negatives
        return right / count if count else float("nan")

    def as_dict(self) -> dict[str, float]:
        """Return precision, recall, F1 and accuracy by name."""
        return {name: getattr(self, name) for name in ("precision", "recall", "f1", "accuracy")}


def selection_counts(selected: NDArray[np.bool_], labels: NDArray[np.bool_]) -> SelectionCounts:
    """Count the candidates of a selection.

    Args:
        selected, labels: bool ``[N]``.
    """
    true = int((selected & labels).sum())
    only_selected, only_true = int(selected.sum()) - true, int(labels.sum()) - true
    return SelectionCounts(true, only_selected, only_true, len(labels) - true - only_selected - only_true)


def f1_score(selected: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """Return the F1 of a selection, pooled over candidates: ``2 TP / (2 TP + FP + FN)``."""
    return selection_counts(selected, labels).f1


def multilabel_metrics(
    scores: NDArray[np.floating], labels: NDArray[np.integer], selected: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return the metrics of multi-label classification.

    Means over classes skip the classes without a positive image. Unknown labels are ignored.

    Args:
        scores: ``[N, C]``, higher for classes that an image more likely shows.
        labels: ``[N, C]``: 1 shown, 0 not shown, -1 unknown.
        selected: bool ``[N, C]``, the selected classes.

    Returns:
        ``map``, the mean over classes of the average precision (:func:`average_precision`) over images; the overall
        ``precision``, ``recall`` and ``f1``, pooled over images and classes; ``class_precision`` and ``class_recall``,
        the means over classes, and ``class_f1``, their harmonic mean; ``present``, the number of classes in the means;
        and lists of C: ``ap``, ``precisions``, ``recalls``, ``f1s`` and ``positives``. NaN where nothing is positive.
    """
    counts, precisions = [], []
    for column in range(scores.shape[1]):
        known = labels[:, column] >= 0
        own = labels[known, column] == 1
        counts.append(selection_counts(selected[known, column], own))
        precisions.append(average_precision(scores[known, column], own))
    present = [place for place, value in enumerate(precisions) if not np.isnan(value)]
    total = sum(counts, SelectionCounts())
    nan = float("nan")
    found: dict[str, Any] = {"map": float(np.mean([precisions[i] for i in present])) if present else nan}
    for name in ("precision", "recall", "f1"):
        found[name] = getattr(total, name) if present else nan
    for name in ("precision", "recall"):
        values = [getattr(counts[place], name) for place in present]
        found[f"class_{name}"] = float(np.mean(values)) if values else nan
    both = found["class_precision"] + found["class_recall"]
    found["class_f1"] = 2 * found["class_precision"] * found["class_recall"] / both if both else 0.0
    return found | {
        "present": len(present),
        "ap": precisions,
        "precisions": [one.precision for one in counts],
        "recalls": [one.recall for one in counts],
        "f1s": [one.f1 for one in counts],
        "positives": [one.true_positives + one.false_negatives for one in counts],
    }


@dataclass(frozen=True)
class Overlap:
    """Three fractions of the union of a predicted and a true region, which add up to one (arXiv 2404.00384).

    Attributes:
        iou: ``TP / union``.
        fpr: ``(|P| - TP) / union``, predicted but not true.
        fnr: ``(|T| - TP) / union``, true but missed.
    """

    iou: float
    fpr: float
    fnr: float


def mask_overlap(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None
) -> Overlap:
    """Return IoU, FPR and FNR of two masks; ``(1, 0, 0)`` if both are empty.

    Args:
        prediction, truth: bool, of the same shape.
        valid: bool of the same shape; other pixels are ignored.
    """
    if valid is not None:
        prediction, truth = prediction & valid, truth & valid
    both, union = int((prediction & truth).sum()), int((prediction | truth).sum())
    if not union:
        return Overlap(1.0, 0.0, 0.0)
    return Overlap(both / union, (int(prediction.sum()) - both) / union, (int(truth.sum()) - both) / union)


def mean_overlap(overlaps: Iterable[Overlap]) -> Overlap:
    """Return Caption IoU, FPR and FNR: the mean of each over captions; NaN without a caption."""
    rows = np.array([(item.iou, item.fpr, item.fnr) for item in overlaps], np.float64).reshape(-1, 3)
    if not len(rows):
        return Overlap(float("nan"), float("nan"), float("nan"))
    iou, fpr, fnr = rows.mean(0).tolist()
    return Overlap(iou, fpr, fnr)


IGNORE = 255
"""Class index of pixels without a label, which metrics ignore."""


def class_counts(
    prediction: NDArray[np.integer], truth: NDArray[np.integer], classes: int, ignore: int = IGNORE
) -> NDArray[np.int64]:
    """Count the pixels of each class; the counts are additive over images.

    Args:
        prediction, truth: class indices of the same shape; pixels whose truth is ``ignore`` are ignored.
        classes: C.
        ignore: class index of pixels without a label.

    Returns:
        int64 ``[3, C]``: correct, predicted and true pixels.

    Raises:
        ValueError: a class index is outside 0 to C - 1.
    """
    valid = truth != ignore
    predicted, true = prediction[valid].astype(np.int64), truth[valid].astype(np.int64)
    for name, values in (("prediction", predicted), ("truth", true)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(
                f"the {name} has classes from {int(values.min())} to {int(values.max())}, outside 0 to {classes - 1}"
            )
    rows = (true[predicted == true], predicted, true)
    return np.stack([np.bincount(row, minlength=classes) for row in rows]).astype(np.int64)


def class_overlaps(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Return IoU, FPR and FNR of each class, and their means over the classes that occur.

    A class that is neither predicted nor true anywhere has no union: its metrics are NaN, and the means skip it. A
    class that is predicted but never true is included, with IoU 0 and FPR 1.

    Args:
        counts: int64 ``[3, C]``, sums of :func:`class_counts` over images.

    Returns:
        ``iou``, ``fpr`` and ``fnr`` (lists of C); ``miou``, ``mfpr`` and ``mfnr``, which add up to one; and ``present``
        (the number of classes in the means).
    """
    both, predicted, true = counts.astype(np.float64)
    union = predicted + true - both
    present = union > 0
    found: dict[str, Any] = {}
    for name, part in (("iou", both), ("fpr", predicted - both), ("fnr", true - both)):
        values = np.full(len(union), np.nan)
        values[present] = part[present] / union[present]
        found[name] = values.tolist()
        found[f"m{name}"] = float(values[present].mean()) if present.any() else float("nan")
    return found | {"present": int(present.sum())}


def intersection_over_union(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return ``|P and T| / |P or T|`` of two masks of the same shape; one if both are empty."""
    return mask_overlap(prediction, truth).iou


def upsample_map(similarity: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """Resize one map ``[H, W]`` to ``[height, width]`` bilinearly (``align_corners=False``)."""
    resized = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(similarity, np.float32))[None, None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
    )
    return resized[0, 0].numpy()


def tag_balance(similarity: NDArray[np.floating], masks: Sequence[NDArray[np.bool_]]) -> float:
    """Return how evenly a caption's map covers its tags: the lowest mean inside a tag's mask over the highest.

    Args:
        similarity: the caption's map in [0, 1], ``[height, width]``.
        masks: bool ``[height, width]``, one for each of at least two true tags, none empty.

    Returns:
        A value in [0, 1]: one if all tags are covered equally, near zero under single tag bias, and zero for a map
        that is zero inside every mask.
    """
    means = [float(similarity[mask].mean()) for mask in masks]
    strongest = max(means)
    return min(means) / strongest if strongest > 0 else 0.0


def retrieval_recalls(
    image: Tensor, text: Tensor, owner: Sequence[int], groups: Sequence[Any], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return recall at k of image-text retrieval in both directions, with any number of captions per image.

    Args:
        image: ``[N, D]``, L2-normalised.
        text: ``[M, D]``, L2-normalised.
        owner: for each text the row of its image.
        groups: for each text its group: the caption itself, or a hash of it. Texts of the same group are correct for
            each other's images.
        ks: values of k.

    Returns:
        ``image_to_text_rK``, ``text_to_image_rK`` and their mean ``rK`` for every K; NaN without data. Image-to-text
        retrieval succeeds if any caption of the image is among the k nearest.
    """
    number: dict[Any, int] = {}
    rows_of_groups = [number.setdefault(name, len(number)) for name in groups]
    group = torch.tensor(rows_of_groups, dtype=torch.long, device=image.device)
    row = torch.as_tensor(owner, dtype=torch.long, device=image.device)
    # Which groups belong to which image, so that identical captions are correct for each other's images.
    belongs = torch.zeros(len(image), len(number), dtype=torch.bool, device=image.device)
    belongs[row, group] = True
    hits: dict[str, dict[int, float]] = {}
    for way, queries, targets in (("image_to_text", image, text), ("text_to_image", text, image)):
        found = dict.fromkeys(ks, 0.0)
        # In blocks, so that memory is linear in N and not in N times M.
        for start in range(0, len(queries), 512):
            block = queries[start : start + 512]
            best = (block @ targets.T).topk(min(max(ks), len(targets)), dim=1).indices
            index = torch.arange(start, start + len(block), device=image.device)[:, None]
            right = belongs[index, group[best]] if way == "image_to_text" else belongs[best, group[index]]
            for k in ks:
                found[k] += float(right[:, :k].any(1).sum())
        hits[way] = {k: count / len(queries) if len(queries) else float("nan") for k, count in found.items()}
    recalls = {f"{way}_r{k}": hits[way][k] for k in ks for way in hits}
    return recalls | {f"r{k}": (hits["image_to_text"][k] + hits["text_to_image"][k]) / 2 for k in ks}


def retrieval_recall(image: Tensor, text: Tensor, captions: Sequence[str], k: int = 1) -> float:
    """Return recall at k of image-text retrieval, the mean of both directions.

    Args:
        image: ``[N, D]``, L2-normalised.
        text: ``[N, D]``, L2-normalised; row n belongs to image n.
        captions: N texts. Identical captions are correct for each other's images.
        k: number of nearest candidates.
    """
    return retrieval_recalls(image, text, range(len(captions)), captions, (k,))[f"r{k}"]


def zero_shot_hits(image: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """Count the images with a correct class among the k nearest class embeddings.

    Args:
        image: ``[N, D]``, L2-normalised pooled embeddings.
        classes: ``[C, D]``, L2-normalised class embeddings.
        labels: int64 ``[N]``; or bool ``[N, C]`` if an image may show several classes, each of them correct, or none.
        ks: values of k.

    Returns:
        The number of images for each k.
    """
    best = (image @ classes.T).topk(min(max(ks), len(classes)), dim=1).indices
    right = labels.gather(1, best) if labels.ndim == 2 else best == labels[:, None]
    return {k: int(right[:, :k].any(1).sum()) for k in ks}


def zero_shot_accuracy(image: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Return zero-shot classification accuracy at each k; arguments as in :func:`zero_shot_hits`.

    Images that show none of the classes are ignored; without any other image the accuracy is NaN.
    """
    count = classified_images(labels)
    return hit_rates(zero_shot_hits(image, classes, labels, ks) if count else dict.fromkeys(ks, 0), count)


def hit_rates(hits: Mapping[int, int], images: int) -> dict[int, float]:
    """Return the fraction of images with a hit for each k; NaN without an image."""
    return {k: count / images if images else float("nan") for k, count in hits.items()}


def classified_images(labels: Tensor) -> int:
    """Return the number of images that show a class; ``labels`` as in :func:`zero_shot_hits`."""
    return int(labels.any(1).sum()) if labels.ndim == 2 else len(labels)
