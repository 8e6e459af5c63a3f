"""Whether features lie where the pixels are: transposed maps and prefix tokens left in show here."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.testing.check_session import BUILT, Session
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

CELLS = 24
EXACT, NEAR = 0.5, 0.75
"""Shares of the tried cells whose change must peak in the very cell, and in it or a neighbour: receptive fields of
convolutional towers overlap, and attention mixes, but neither moves most peaks."""


def _size(session: Session) -> tuple[tuple[int, int], tuple[int, int]]:
    """An input size and its grid, not square where the adapter takes such sizes."""
    preferred = session.description.image_size
    sizes = [size for size in (*session.sizes(), preferred) if session.grid(*size) not in (None, (1, 1))]
    sizes.sort(key=lambda size: _rank(session, size))
    if not sizes:
        raise NotApplicable("the grid has one cell")
    grid = session.grid(*sizes[0])
    assert grid is not None
    return sizes[0], grid


def _rank(session: Session, size: tuple[int, int]) -> tuple[bool, bool, int]:
    """Grids that are not square and have enough cells come first, small ones before large ones."""
    rows, columns = session.grid(*size) or (1, 1)
    return rows == columns, rows * columns < 9, rows * columns


def _cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    if len(cells) <= CELLS:
        return cells
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(4))[:CELLS]
    return [cells[index] for index in sorted(order.tolist())]


def _expect_in_place(cells: list[tuple[int, int]], change: Tensor, what: str) -> None:
    """Fail unless the change ``[N, H, W]`` of most trials peaks in, or next to, the cell that was touched."""
    _, columns = change.shape[1:]
    peaks = [divmod(int(index), columns) for index in change.flatten(1).argmax(1)]
    offsets = [(peak[0] - cell[0], peak[1] - cell[1]) for peak, cell in zip(peaks, cells, strict=True)]
    exact = sum(offset == (0, 0) for offset in offsets) / len(offsets)
    near = sum(max(abs(down), abs(right)) <= 1 for down, right in offsets) / len(offsets)
    if exact >= EXACT and near >= NEAR:
        return
    seen = f"{what} peaks in the right cell for {exact:.0%} of {len(cells)} cells, and near it for {near:.0%}"
    transposed = sum(peak == (cell[1], cell[0]) for peak, cell in zip(peaks, cells, strict=True)) / len(cells)
    common = max(set(offsets), key=offsets.count)
    if offsets.count(common) > len(offsets) / 2:
        seen += f"; mostly it lies {common[0]} down and {common[1]} to the right"
    elif transposed > exact:
        seen += "; rows and columns look exchanged"
    raise CheckFailed(f"{what} that peaks in the cell whose pixels changed", seen)


@check(
    "when the pixels of one patch change, the features of that patch change most",
    "the grid is transposed: columns come first, or width is taken for height",
    "a prefix token (class token, register) is counted as the first patch, which shifts all others",
    "tokens are reshaped in an order that is not the order of the patches",
    needs=(BUILT, "image_features", "pooled_on_request", "other_sizes", "deterministic", "batch_independent"),
)
def patches_in_place(session: Session) -> None:
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
    "a bright object in a picture moves the response along the axis that it moves along",
    "dense_transform takes (width, height) for (height, width), or transposes the picture",
    "the grid is transposed or shifted; see patches_in_place",
    needs=(BUILT, "image_features", "patches_in_place", "dense_transform"),
)
def moving_object(session: Session) -> None:
    size, grid = _size(session)
    transform = session.adapter.dense_transform(size)
    cells = _cells(grid)
    height, width = 2 * size[0] // grid[0], 2 * size[1] // grid[1]
    blank = np.full((2 * size[0], 2 * size[1], 3), 90, np.uint8)
    pictures = [blank]
    for row, column in cells:
        picture = blank.copy()
        picture[row * height : (row + 1) * height, column * width : (column + 1) * width] = 250
        pictures.append(picture)
    pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures]).to(session.adapter.device)
    with torch.no_grad():
        features = torch.cat([session.encode(part, pooled=False).patches for part in pixels.split(8)])
    _expect_in_place(cells, (features[1:] - features[:1]).float().norm(dim=-1), "the response to a bright object")
