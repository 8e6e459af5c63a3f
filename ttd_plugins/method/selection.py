"""Which candidate tags are in the picture: scores, and the rule that turns scores into a selection.

The paper scores a tag by its nearest pixel (arXiv 2404.00384, section 3.1). It does not publish the threshold rule; its
figures fit two, and both are here. All functions take the flat candidates of :mod:`ttd_plugins.method.similarity`.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from ttd_plugins.errors import InputError
from ttd_plugins.options import Calibration, Rule


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
    """Baseline: similarity of each tag to the embedding of its caption, which never looks at the image.

    Shapes as in :func:`image_scores`, with captions ``[B, D]`` in place of the pooled embeddings.
    """
    return image_scores(captions, tags, image_index, tag_index)


def minmax_over_tags(scores: Tensor, image_index: Tensor, batch: int, eps: float = 1e-6) -> Tensor:
    """Min-max normalise the scores of each caption's candidates.

    Args:
        scores: ``[N]``.
        image_index: int64 ``[N]``.
        batch: B.
        eps: where a caption's scores differ by less (one candidate, or equal ones) there is nothing to compare, and
            each of them becomes one.

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
        rule: ``"minmax"``: the score min-max normalised over the caption's candidates reaches the threshold (the best
            candidate is always kept, and so is a caption's only one); ``"absolute"``: the cosine itself does;
            ``"probability"``: its calibrated probability does, which means the same on every backbone.
        threshold: in [0, 1] for ``"minmax"`` and ``"probability"``, a cosine for ``"absolute"``.
        calibration: for ``"probability"``; by default ``Calibration()``.

    Returns:
        bool ``[N]``; no gradient.

    Raises:
        InputError: the rule is unknown.
    """
    scores = scores.detach()
    if rule == "minmax":
        scores = minmax_over_tags(scores, image_index, batch)
    elif rule == "probability":
        scores = (calibration or Calibration()).probability(scores)
    elif rule != "absolute":
        raise InputError(f"unknown selection rule {rule!r}; known: {', '.join(get_args(Rule))}")
    return scores >= threshold


class TagSelection(nn.Module):
    """Module twin of :func:`select_tags`."""

    def __init__(self, rule: Rule = "minmax", threshold: float = 0.5, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.rule: Rule = rule
        self.threshold = threshold
        self.calibration = calibration

    def forward(self, scores: Tensor, image_index: Tensor, batch: int) -> Tensor:
        """``[N]`` cosines to bool ``[N]``; see :func:`select_tags`."""
        return select_tags(
            scores, image_index, batch, rule=self.rule, threshold=self.threshold, calibration=self.calibration
        )


class PixelScores(nn.Module):
    """Module twin of :func:`pixel_scores`."""

    def forward(self, tag_maps: Tensor) -> Tensor:
        """See :func:`pixel_scores`."""
        return pixel_scores(tag_maps)


class ImageScores(nn.Module):
    """Module twin of :func:`image_scores`."""

    def forward(self, pooled: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor) -> Tensor:
        """See :func:`image_scores`."""
        return image_scores(pooled, tags, image_index, tag_index)


class TextScores(nn.Module):
    """Module twin of :func:`text_scores`."""

    def forward(self, captions: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor) -> Tensor:
        """See :func:`text_scores`."""
        return text_scores(captions, tags, image_index, tag_index)
