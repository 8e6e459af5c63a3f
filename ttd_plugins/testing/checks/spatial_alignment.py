"""Checks that features are located where the pixels are: they find transposed maps and remaining prefix tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.testing.check_session import BUILT, CheckSession
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

CELLS = 24
EXACT, NEAR = 0.5, 0.75
"""Fractions of the tested cells whose change must peak in that cell, and in it or a neighbour. Receptive fields of
convolutional towers overlap and attention mixes patches, but neither moves most peaks."""

WIDE_NEAR, WIDE_OFFSET = 0.9, 0.5
"""For receptive fields of several patches, whose peaks scatter: the fraction that must peak in the cell or a neighbour
once each position's own sensitivity is divided out, and the largest mean offset of those peaks, in cells."""


def _size(session: CheckSession) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return an input size and its grid, non-square if the adapter accepts such sizes."""
    preferred = session.description.image_size
    sizes = [size for size in (*session.sizes(), preferred) if session.grid(*size) not in (None, (1, 1))]
    sizes.sort(key=lambda size: _rank(session, size))
    if not sizes:
        raise NotApplicable("the grid has one cell")
    grid = session.grid(*sizes[0])
    assert grid is not None
    return sizes[0], grid


def _rank(session: CheckSession, size: tuple[int, int]) -> tuple[bool, bool, int]:
    """Sort key: first non-square grids with enough cells, small before large."""
    rows, columns = session.grid(*size) or (1, 1)
    return rows == columns, rows * columns < 9, rows * columns


def _cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    if len(cells) <= CELLS:
        return cells
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(4))[:CELLS]
    return [cells[index] for index in sorted(order.tolist())]


def _expect_in_place(cells: list[tuple[int, int]], change: Tensor, what: str) -> None:
    """Fail unless the change ``[N, H, W]`` peaks in or next to the modified cell in most of N trials."""
    peaks, offsets = _peaks(cells, change)
    exact = sum(offset == (0, 0) for offset in offsets) / len(offsets)
    near = _near(offsets)
    if (exact >= EXACT and near >= NEAR) or _is_wide_in_place(cells, change):
        return
    seen = f"{what} peaks in that cell for {exact:.0%} of {len(cells)} cells, and in it or a neighbour for {near:.0%}"
    transposed = sum(peak == (cell[1], cell[0]) for peak, cell in zip(peaks, cells, strict=True)) / len(cells)
    common = max(set(offsets), key=offsets.count)
    if offsets.count(common) > len(offsets) / 2:
        seen += f"; most peaks are shifted by {common[0]} rows and {common[1]} columns"
    elif transposed > exact:
        seen += "; rows and columns look exchanged"
    raise CheckFailed(f"{what} peaks in the cell whose pixels changed", seen)


def _peaks(cells: list[tuple[int, int]], change: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Row and column of the largest change of each trial, and how far they are from the modified cell."""
    columns = change.shape[2]
    peaks = [divmod(int(index), columns) for index in change.flatten(1).argmax(1)]
    return peaks, [(peak[0] - cell[0], peak[1] - cell[1]) for peak, cell in zip(peaks, cells, strict=True)]


def _near(offsets: list[tuple[int, int]]) -> float:
    return sum(max(abs(down), abs(right)) <= 1 for down, right in offsets) / len(offsets)


def _is_wide_in_place(cells: list[tuple[int, int]], change: Tensor) -> bool:
    """Whether nearly all peaks are next to the modified cell, on no side more than on the other."""
    sensitivity = change.mean(0, keepdim=True)
    _, offsets = _peaks(cells, change / sensitivity.clamp_min(torch.finfo(change.dtype).tiny))
    means = [sum(offset[axis] for offset in offsets) / len(offsets) for axis in (0, 1)]
    return _near(offsets) >= WIDE_NEAR and max(map(abs, means)) <= WIDE_OFFSET


@check(
    "when the pixels of one patch change, the features of that patch change most",
    "the grid is transposed: columns come first, or width and height are exchanged",
    "a prefix token (class token, register) is counted as the first patch, which shifts all others",
    "tokens are reshaped in another order than that of the patches",
    needs=(BUILT, "image_features", "pooled_on_request", "other_sizes", "deterministic", "batch_independent"),
)
def patches_in_place(session: CheckSession) -> None:
    size, grid = _size(session)
    cells = _cells(grid)
    height, width = size[0] // grid[0], size[1] // grid[1]
    base = session.pixels(1, size)
    changed = base.repeat(len(cells), 1, 1, 1)
    patch = 2 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(6)).to(base)
    for image, (row, column) in zip(changed, cells, strict=True):
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = patch
    with torch.no_grad():
        before = session.encode(base, pooled=False).patches
        after = torch.cat([session.encode(part, pooled=False).patches for part in changed.split(8)])
    _expect_in_place(cells, (after - before).float().norm(dim=-1), "the change of features")


@check(
    "when a bright object in an image moves, the response moves along the same axis",
    "dense_transform interprets size as (width, height), or transposes the image",
    "the grid is transposed or shifted; see patches_in_place",
    needs=(BUILT, "image_features", "patches_in_place", "dense_transform"),
)
def moving_object(session: CheckSession) -> None:
    size, grid = _size(session)
    transform = session.adapter.dense_transform(size)
    cells = _cells(grid)
    height, width = 2 * size[0] // grid[0], 2 * size[1] // grid[1]
    blank = np.full((2 * size[0], 2 * size[1], 3), 90, np.uint8)
    images = [blank]
    for row, column in cells:
        image = blank.copy()
        image[row * height : (row + 1) * height, column * width : (column + 1) * width] = 250
        images.append(image)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images]).to(session.adapter.device)
    with torch.no_grad():
        features = torch.cat([session.encode(part, pooled=False).patches for part in pixels.split(8)])
    _expect_in_place(cells, (features[1:] - features[:1]).float().norm(dim=-1), "the response to a bright object")
