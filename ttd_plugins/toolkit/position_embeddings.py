"""Learnt position embeddings at other grids than they were trained at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled_positions(own: Tensor, source: tuple[int, int], grid: tuple[int, int], *, prefix: int) -> Tensor:
    """Position embedding of a grid: the model's own, or resampled from it (bicubic, antialiased).

    Args:
        own: ``[prefix + source rows * source columns, W]``.
        source: rows and columns that ``own`` was trained at.
        grid: rows and columns that are wanted.
        prefix: how many rows of ``own`` belong to class and register tokens, which have no place in the grid.

    Returns:
        ``own`` itself where the grids are equal, else ``[prefix + P, W]`` in at least float32.
    """
    if tuple(grid) == tuple(source):
        return own
    # Not in half precision, for which antialiased resampling has no kernel on every device.
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    image = own[prefix:].unflatten(0, tuple(source)).permute(2, 0, 1)[None]
    # Where one column is wanted, torch (2.15) gets it wrong unless each axis is resampled on its own.
    for size in [grid] if grid[1] > 1 else [(grid[0], source[1]), grid]:
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([own[:prefix], image[0].flatten(1).T])
