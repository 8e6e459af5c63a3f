"""Learned position embeddings at grids other than the trained one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.options import Resampling


def resampled_positions(
    own: Tensor, source: tuple[int, int], grid: tuple[int, int], *, prefix: int, method: Resampling = "library"
) -> Tensor:
    """Position embeddings for a grid: the model's own, or resampled from them by bicubic interpolation.

    With ``"dino"`` the centre of output position i is at ``(i + 0.5) * n0 / (n + 0.1) - 0.5`` of the n0 own positions
    on each axis, as in DINO's ``interpolate_pos_encoding`` (arXiv 2104.14294), which SCLIP, ClearCLIP and NACLIP copy.
    Otherwise it is at ``(i + 0.5) * n0 / n - 0.5``.

    Args:
        own: ``[prefix + source rows * source columns, W]``.
        source: rows and columns of the grid that ``own`` was trained at.
        grid: rows and columns of the wanted grid.
        prefix: number of leading rows of ``own`` for class and register tokens, which have no position in the grid.
        method: ``"library"`` antialiases, as open_clip and timm do; ``"bicubic"`` and ``"dino"`` do not.

    Returns:
        ``own`` itself where the grids are equal, else ``[prefix + P, W]`` in at least float32.
    """
    if tuple(grid) == tuple(source):
        return own
    # Some devices have no half-precision kernel for antialiased resampling.
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    image = own[prefix:].unflatten(0, tuple(source)).permute(2, 0, 1)[None]
    if method == "dino":
        scales = [(n + 0.1) / n0 for n, n0 in zip(grid, source, strict=True)]
        image = F.interpolate(
            image, scale_factor=scales, mode="bicubic", align_corners=False, recompute_scale_factor=False
        )
    else:
        # For a single column antialiasing is wrong (torch 2.15) unless each axis is resampled on its own.
        for size in [grid] if grid[1] > 1 else [(grid[0], source[1]), grid]:
            image = F.interpolate(image, size=size, mode="bicubic", antialias=method == "library", align_corners=False)
    return torch.cat([own[:prefix], image[0].flatten(1).T])


def with_class_token(patches: Tensor, class_embedding: Tensor, positions: Tensor) -> Tensor:
    """Put a class token before patch tokens ``[B, P, W]`` and add position embeddings ``[1 + P, W]``."""
    class_token = class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    return torch.cat([class_token, patches], dim=1) + positions.to(patches.dtype)


def embedded_patches(convolution: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Patch tokens ``[B, P, W]`` of pixels ``[B, 3, height, width]``, which are cast to the convolution's dtype."""
    weight: Tensor = convolution.weight  # type: ignore[assignment]
    return convolution(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
