"""PAMR: pixel-adaptive mask refinement (Araslanov and Roth, Single-Stage Semantic Segmentation from Image Labels,
CVPR 2020).

Score planes are averaged again and again over each pixel's neighbours, more over those that look alike. The affinity
of pixel i to neighbour j is the softmax over j of ``-mean_c |x_i - x_j| / s_i``. The paper writes the variance of the
picture over the neighbourhood for ``s``; its authors' release, and TCL and so TTD after it, take a tenth of the
standard deviation, and so does this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.evaluation.protocol_options import PAMR_DILATIONS, PAMR_ITERATIONS

_RING = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def _shifted(planes: Tensor, dilation: int) -> list[Tensor]:
    """The eight neighbours of every pixel at a distance, ``[C, H, W]`` each; borders are repeated."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes[None], [dilation] * 4, mode="replicate")[0]
    return [
        padded[:, dilation * (1 + y) : dilation * (1 + y) + height, dilation * (1 + x) : dilation * (1 + x) + width]
        for y, x in _RING
    ]


def affinity(picture: Tensor, dilations: tuple[int, ...] = PAMR_DILATIONS, sharpness: float = 0.1) -> Tensor:
    """How much each neighbour weighs: ``[8 * len(dilations), H, W]``, adding to one over neighbours.

    Args:
        picture: float ``[C, H, W]``; its scale does not matter.
        dilations: distances of the neighbours in pixels.
        sharpness: what sigma is multiplied with; smaller trusts colour more.
    """
    # Two passes over the neighbours rather than one stack of C times as many planes.
    count = 9 * len(dilations)
    total, squares = torch.zeros_like(picture), torch.zeros_like(picture)
    for dilation in dilations:
        for neighbour in (picture, *_shifted(picture, dilation)):
            # Differences from the centre, so that flat regions have a deviation of exactly zero.
            difference = neighbour - picture
            total += difference
            squares += difference.square()
    sigma = ((squares - total.square() / count) / (count - 1)).clamp_min(0).sqrt()
    kernel = [
        -((neighbour - picture).abs() / (1e-8 + sharpness * sigma)).mean(0)
        for dilation in dilations
        for neighbour in _shifted(picture, dilation)
    ]
    return torch.stack(kernel).softmax(0)


def pamr(
    planes: Tensor,
    picture: Tensor,
    *,
    iterations: int = PAMR_ITERATIONS,
    dilations: tuple[int, ...] = PAMR_DILATIONS,
    sharpness: float = 0.1,
) -> Tensor:
    """Refine score planes along the edges of a picture.

    A constant plane stays as it is on any picture, and the result commutes with flips.

    Args:
        planes: float ``[K, H, W]``.
        picture: float ``[C, H, W]``, of the same height and width.
        iterations, dilations: ten, and 1, 2, 4, 8, 12, 24, as TCL and TTD use.
        sharpness: see :func:`affinity`.

    Returns:
        ``[K, H, W]``, within the range of each plane.
    """
    if planes.shape[-2:] != picture.shape[-2:]:
        raise ValueError(f"planes of {tuple(planes.shape)} and a picture of {tuple(picture.shape)} differ in size")
    weights = affinity(picture.float(), dilations, sharpness)
    refined = planes.float()
    for _ in range(iterations):
        result = torch.zeros_like(refined)
        place = 0
        for dilation in dilations:
            for neighbour in _shifted(refined, dilation):
                result.addcmul_(neighbour, weights[place])
                place += 1
        refined = result
    return refined
