"""Similarity maps between patches and texts, their normalisation, and their union (arXiv 2404.00384, section 3).

A batch holds B images of P patches and, in all, N candidate tags: tag n belongs to image ``image_index[n]``. Maps are
kept flat, ``[N, P]``, so that captions may have any number of tags, none included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def promote(values: Tensor) -> Tensor:
    """``values`` in at least float32: half precision becomes float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normalize(features: Tensor) -> Tensor:
    """L2-normalise the last axis in at least float32; a zero vector stays zero."""
    return F.normalize(promote(features), dim=-1)


def caption_maps(patches: Tensor, captions: Tensor) -> Tensor:
    """Map of each caption on its own image, ``x_b(p) = d_b(p) . c_b``.

    Args:
        patches: L2-normalised ``[B, P, D]``.
        captions: L2-normalised ``[B, D]``.

    Returns:
        Cosines ``[B, P]``.
    """
    return torch.einsum("bpd,bd->bp", patches, captions)


def tag_maps(patches: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor, most: int | None = None) -> Tensor:
    """Map of each candidate tag on its image, ``s_n(p) = d_b(p) . t_n`` with ``b = image_index[n]``.

    Args:
        patches: L2-normalised ``[B, P, D]``.
        tags: L2-normalised embeddings of the K distinct tags, ``[K, D]``.
        image_index: int64 ``[N]``, ascending: the image of each candidate.
        tag_index: int64 ``[N]``: which distinct tag each candidate is.
        most: the largest number of candidates of one image; without it the device is asked, and waited for.

    Returns:
        Cosines ``[N, P]``.
    """
    batch, count, width = patches.shape
    if not len(image_index):
        return patches.new_zeros(0, count)
    first = torch.searchsorted(image_index, torch.arange(batch, device=image_index.device))
    slot = torch.arange(len(image_index), device=image_index.device) - first[image_index]
    # One padded batched product reads each image's patches once, however many tags the image has.
    most = int(torch.bincount(image_index, minlength=batch).max()) if most is None else most
    padded = tags.new_zeros(batch, most, width)
    padded = padded.index_put((image_index, slot), tags[tag_index])
    return torch.bmm(padded, patches.transpose(1, 2))[image_index, slot]


def minmax_normalize(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Linear min-max normalisation of each map over its patches, ``(s - min) / (max - min)``.

    Args:
        maps: ``[..., P]``.
        eps: a map whose range is smaller than this says nothing about place, and becomes zero everywhere.

    Returns:
        ``[..., P]`` in [0, 1].
    """
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    span = high - low
    return torch.where(span > eps, (maps - low) / span.clamp_min(eps), torch.zeros_like(maps))


def union_map(maps: Tensor, image_index: Tensor, batch: int) -> Tensor:
    """Pixelwise maximum of the tag maps of each image, ``u_b(p) = max_i m_{b,i}(p)``.

    Args:
        maps: ``[N, P]`` in [0, 1]; rejected tags have zero maps.
        image_index: int64 ``[N]``.
        batch: B.

    Returns:
        ``[B, P]``; zero everywhere for an image without tags.
    """
    union = maps.new_zeros(batch, maps.shape[-1])
    index = image_index[:, None].expand_as(maps)
    return union.scatter_reduce(0, index, maps, reduce="amax", include_self=True)


class TagMaps(nn.Module):
    """Module twin of :func:`tag_maps`."""

    def forward(
        self, patches: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor, most: int | None = None
    ) -> Tensor:
        """See :func:`tag_maps`."""
        return tag_maps(patches, tags, image_index, tag_index, most)


class CaptionMaps(nn.Module):
    """Module twin of :func:`caption_maps`."""

    def forward(self, patches: Tensor, captions: Tensor) -> Tensor:
        """See :func:`caption_maps`."""
        return caption_maps(patches, captions)


class MinMax(nn.Module):
    """Module twin of :func:`minmax_normalize`."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, maps: Tensor) -> Tensor:
        """See :func:`minmax_normalize`."""
        return minmax_normalize(maps, self.eps)


class Union(nn.Module):
    """Module twin of :func:`union_map`."""

    def forward(self, maps: Tensor, image_index: Tensor, batch: int) -> Tensor:
        """See :func:`union_map`."""
        return union_map(maps, image_index, batch)
