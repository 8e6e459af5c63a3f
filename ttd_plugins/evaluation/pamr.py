"""PAMR: pixel-adaptive mask refinement (Araslanov and Roth, Single-Stage Semantic Segmentation from Image Labels,
CVPR 2020).

Score planes are averaged repeatedly over each pixel's neighbours, with higher weights for similar colours. The affinity
of pixel i to neighbour j is the softmax over j of ``-mean_c |x_i - x_j| / s_i``. In the paper ``s`` is the variance of
the image over the neighbourhood. Its authors' release, TCL and TTD use a tenth of the standard deviation, and so does
this module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.evaluation.protocol_options import PAMR_DILATIONS, PAMR_ITERATIONS
from ttd_plugins.utils.deprecation import renamed_keyword

CACHED_VALUES = 1 << 18
"""Values of the score planes that are refined at a time on a CPU."""
_RING = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def _shifted(planes: Tensor, dilation: int) -> list[Tensor]:
    """Return the eight neighbours of every pixel at a distance, ``[C, H, W]`` each; borders are replicated."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes[None], [dilation] * 4, mode="replicate")[0]
    return [
        padded[:, dilation * (1 + y) : dilation * (1 + y) + height, dilation * (1 + x) : dilation * (1 + x) + width]
        for y, x in _RING
    ]


@renamed_keyword("picture", "image")
def affinity(image: Tensor, dilations: tuple[int, ...] = PAMR_DILATIONS, sharpness: float = 0.1) -> Tensor:
    """Return the weight of each neighbour.

    Args:
        image: float ``[C, H, W]``; its scale is irrelevant.
        dilations: distances of the neighbours in pixels.
        sharpness: factor of the standard deviation; smaller values follow colour edges more strictly.

    Returns:
        ``[8 * len(dilations), H, W]``, which sums to one over neighbours.
    """
    # Two passes over the neighbours need less memory than a stack of C times as many planes.
    count = 9 * len(dilations)
    total, squares = torch.zeros_like(image), torch.zeros_like(image)
    for dilation in dilations:
        for neighbour in (image, *_shifted(image, dilation)):
            # Differences from the centre, so that flat regions have a deviation of exactly zero.
            difference = neighbour - image
            total += difference
            squares += difference.square()
    sigma = ((squares - total.square() / count) / (count - 1)).clamp_min(0).sqrt()
    kernel = [
        -((neighbour - image).abs() / (1e-8 + sharpness * sigma)).mean(0)
        for dilation in dilations
        for neighbour in _shifted(image, dilation)
    ]
    return torch.stack(kernel).softmax(0)


@renamed_keyword("picture", "image")
def pamr(
    planes: Tensor,
    image: Tensor,
    *,
    iterations: int = PAMR_ITERATIONS,
    dilations: tuple[int, ...] = PAMR_DILATIONS,
    sharpness: float = 0.1,
    weights: Tensor | None = None,
) -> Tensor:
    """Refine score planes along the edges of an image.

    A constant plane stays unchanged on any image, and the result commutes with flips.

    Args:
        planes: float ``[K, H, W]``.
        image: float ``[C, H, W]``.
        iterations, dilations: the defaults are those of TCL and TTD.
        sharpness: see :func:`affinity`.
        weights: the result of :func:`affinity` for this image, so that several calls compute it once.

    Returns:
        ``[K, H, W]``, within the range of each plane.

    Raises:
        ValueError: planes and image differ in size.
    """
    if planes.shape[-2:] != image.shape[-2:]:
        raise ValueError(f"planes {tuple(planes.shape)} and image {tuple(image.shape)} differ in size")
    if weights is None:
        weights = affinity(image.float(), dilations, sharpness)
    refined = planes.float()
    height, width = planes.shape[-2:]
    reach = max(dilations)
    corners = [(reach + dilation * y, reach + dilation * x) for dilation in dilations for y, x in _RING]
    # A CPU sums all neighbours of a few rows while they are in its cache; the order of the sums stays the same.
    rows = max(CACHED_VALUES // max(len(planes) * width, 1), 1) if planes.device.type == "cpu" else height
    for _ in range(iterations):
        padded = F.pad(refined[None], [reach] * 4, mode="replicate")[0]
        result = torch.zeros_like(refined)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            part, factors = result[:, top:bottom], weights[:, top:bottom]
            for factor, (y, x) in zip(factors, corners, strict=True):
                part.addcmul_(padded[:, top + y : bottom + y, x : x + width], factor)
        refined = result
    return refined
