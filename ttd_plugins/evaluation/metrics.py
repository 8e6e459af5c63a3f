"""Metrics of dense image-text alignment, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence

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


def f1_score(selected: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """F1 of a selection, pooled over candidates: ``2 TP / (2 TP + FP + FN)``; zero where nothing is right."""
    true = int((selected & labels).sum())
    return 2 * true / max(int(selected.sum() + labels.sum()), 1)


def intersection_over_union(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """``|P and T| / |P or T|`` of two masks of one shape; one where both are empty."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


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


def retrieval_recall(image: Tensor, text: Tensor, captions: Sequence[str], k: int = 1) -> float:
    """Recall at k of image-text retrieval, the mean of both directions; identical captions are both right.

    Args:
        image: ``[N, D]``, L2-normalised.
        text: ``[N, D]``, L2-normalised, row n belonging to image n.
        captions: N texts; pairs with equal ones are interchangeable.
        k: how many of the best candidates are looked at.
    """
    index = {caption: position for position, caption in enumerate(captions)}
    group = torch.tensor([index[caption] for caption in captions])
    right = (group[:, None] == group[None, :]).to(image.device)
    similarity = image @ text.T
    hits = [
        right_way.gather(1, way.topk(min(k, len(captions)), dim=1).indices).any(1).float().mean()
        for way, right_way in ((similarity, right), (similarity.T, right.T))
    ]
    return float(sum(hits) / 2)
