"""Similarity maps between patches and texts, their normalisation, and their union (arXiv 2404.00384, section 3).

A batch has B images of P patches and N candidate tags in all; tag n belongs to image ``image_index[n]``. Maps of tags
are flat, ``[N, P]``, so that a caption may have any number of tags, or none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.utils.deprecation import renamed_keyword


def promote(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normalize(features: Tensor) -> Tensor:
    """L2-normalise the last axis, in at least float32; a zero vector stays zero."""
    return F.normalize(promote(features), dim=-1)


def caption_maps(patches: Tensor, captions: Tensor) -> Tensor:
    """Similarity map of each caption on its own image, ``x_b(p) = d_b(p) . c_b``.

    Args:
        patches: L2-normalised ``[B, P, D]``.
        captions: L2-normalised ``[B, D]``.

    Returns:
        Cosines ``[B, P]``.
    """
    return torch.einsum("bpd,bd->bp", patches, captions)


@renamed_keyword("most", "max_tags")
def tag_maps(
    patches: Tensor, tags: Tensor, image_index: Tensor, tag_index: Tensor, max_tags: int | None = None
) -> Tensor:
    """Similarity map of each candidate tag on its image, ``s_n(p) = d_b(p) . t_n`` with ``b = image_index[n]``.

    Args:
        patches: L2-normalised ``[B, P, D]``.
        tags: L2-normalised embeddings of the K distinct tags, ``[K, D]``.
        image_index: int64 ``[N]``, ascending: the image of each candidate.
        tag_index: int64 ``[N]``: which distinct tag each candidate is.
        max_tags: the largest number of candidates of one image; without it, it is computed, with a host
            synchronisation.

    Returns:
        Cosines ``[N, P]``.
    """
    batch, count, width = patches.shape
    if not len(image_index):
        return patches.new_zeros(0, count)
    first = torch.searchsorted(image_index, torch.arange(batch, device=image_index.device))
    slot = torch.arange(len(image_index), device=image_index.device) - first[image_index]
    # One padded batched product reads each image's patches once, however many tags the image has.
    if max_tags is None:
        max_tags = int(torch.bincount(image_index, minlength=batch).max())
    padded = tags.new_zeros(batch, max_tags, width)
    padded = padded.index_put((image_index, slot), tags[tag_index])
    return torch.bmm(padded, patches.transpose(1, 2))[image_index, slot]


def minmax_normalize(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Linear min-max normalisation of each map over its patches, ``(s - min) / (max - min)``.

    Args:
        maps: ``[..., P]``.
        eps: a map whose range is at most this carries no information on place, and becomes zero everywhere.

    Returns:
        ``[..., P]`` in [0, 1].
    """
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    span = high - low
    return torch.where(span > eps, (maps - low) / span.clamp_min(eps), torch.zeros_like(maps))


def union_map(maps: Tensor, image_index: Tensor, batch: int) -> Tensor:
    """Patchwise maximum of the tag maps of each image, ``u_b(p) = max_i m_{b,i}(p)``.

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
