"""Tag selection: which candidate tags are in the image, from their scores and a threshold rule.

The paper scores a tag by its nearest pixel (arXiv 2404.00384, section 3.1). It does not publish the threshold rule. Its
results are consistent with two rules, and both are here. All functions take the flat candidates of
:mod:`ttd_plugins.method.similarity`.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from ttd_plugins.errors import InputError
from ttd_plugins.options import Calibration, Rule
from ttd_plugins.utils.numbers import number


def pixel_scores(tag_maps: Tensor) -> Tensor:
    """Similarity of each tag to its nearest patch, ``r_n = max_p s_n(p)``: ``[N, P]`` to ``[N]``."""
    return tag_maps.amax(-1)


def image_scores(pooled: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor) -> Tensor:
    """Baseline: similarity of each tag to the pooled image embedding.

    Args:
        pooled: L2-normalised ``[B, D]``.
        tags: L2-normalised embeddings of the distinct tags, ``[K, D]``.
        image_index, tag_index: int64 ``[N]``.

    Returns:
        Cosines ``[N]``.
    """
    return (pooled[image_index] * tags[tag_index]).sum(-1)


def text_scores(captions: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor) -> Tensor:
    """Image-blind baseline: similarity of each tag to the embedding of its caption.

    Shapes as in :func:`image_scores`, with captions ``[B, D]`` in place of the pooled embeddings.
    """
    return image_scores(captions, tags, image_index, tag_index)


def minmax_over_tags(scores: Tensor, image_index: Tensor, batch: int, eps: float = 1e-6) -> Tensor:
    """Min-max normalise the scores of each caption's candidates.

    Args:
        scores: ``[N]``.
        image_index: int64 ``[N]``.
        batch: B.
        eps: if the scores of a caption differ by no more than this (one candidate, or equal scores), each becomes
            one.

    Returns:
        ``[N]`` in [0, 1].
    """
    low = scores.new_full((batch,), torch.inf).scatter_reduce(0, image_index, scores, reduce="amin")[image_index]
    high = scores.new_full((batch,), -torch.inf).scatter_reduce(0, image_index, scores, reduce="amax")[image_index]
    span = high - low
    return torch.where(span > eps, (scores - low) / span.clamp_min(eps), torch.ones_like(scores))


def select_tags(
    scores: Tensor,
    image_index: Tensor,
    batch: int,
    *,
    rule: Rule = "minmax",
    threshold: float = 0.5,
    calibration: Calibration | None = None,
) -> Tensor:
    """Decide which candidates are image-relevant ("pseudo-tags").

    Args:
        scores: cosines ``[N]``.
        image_index: int64 ``[N]``.
        batch: B.
        rule: what must reach the threshold: ``"minmax"``, the score min-max normalised over the caption's candidates
            (the best candidate, or a caption's only one, is always selected); ``"absolute"``, the cosine;
            ``"probability"``, the calibrated probability, which is comparable between backbones.
        threshold: in [0, 1] for ``"minmax"`` and ``"probability"``, a cosine for ``"absolute"``.
        calibration: for ``"probability"``; by default ``Calibration()``.

    Returns:
        bool ``[N]``; no gradient.

    Raises:
        InputError: the rule is unknown, or the threshold is not a finite number.
    """
    scores, threshold = scores.detach(), number("threshold", threshold, low=-math.inf)
    if rule == "minmax":
        scores = minmax_over_tags(scores, image_index, batch)
    elif rule == "probability":
        scores = (calibration or Calibration()).probability(scores)
    elif rule != "absolute":
        raise InputError(f"unknown selection rule {rule!r}; known: {', '.join(get_args(Rule))}")
    return scores >= threshold
