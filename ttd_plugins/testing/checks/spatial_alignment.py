"""Checks that features are located where the pixels are: they find transposed maps, prefix tokens and blurred maps.

Where a feature looks is the centroid of its gradient's energy over the pixels. Attention and deep convolutions widen
that energy, but only a wrong order of the features moves its centroid, so orientation is judged apart from sharpness.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ttd_plugins.testing.check_session import BUILT, CheckSession
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.probes import is_small, recorded_outputs

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

CELLS, FEW_CELLS = 24, 10
CORRELATION, AVERAGED_CORRELATION = 0.9, 0.85
"""Smallest correlation of centroids with rows and with columns, of one image and of the mean of several.

Right maps of ten kinds of towers had 0.99 or more, transposed ones 0.7 or less, and maps shifted by one cell around the
border 0.54 or less on 12 columns.
"""
SPREAD = 0.2
"""Smallest spread of centroids, relative to that of the cells, from which an order can be read."""
PEAK_POWER = 4
"""Power of the energy that finds peaks where the energy itself covers the image."""
DRAWS = 6
"""Random images over which centroids are averaged where one image shows a wrong order."""
SHARP, BLURRED = 0.9, 0.5
"""Fractions of cells whose change peaks in that cell: in the tower's blocks, and in the patches of a blurred map."""


def _sizes(session: CheckSession) -> list[tuple[int, int]]:
    """Return input sizes to test, small before large: non-square ones if the adapter accepts them."""
    preferred = session.description.image_size
    first = _size(session)[0]
    columns = session.description.patch_size[1]
    sizes = [first, (2 * first[0], 2 * first[1])]
    if first == preferred:
        sizes = [first]
    elif is_small(session):
        sizes.append((2 * preferred[0], 2 * preferred[1] + columns))
    return [size for size in dict.fromkeys(sizes) if session.grid(*size) not in (None, (1, 1))]


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


def _cells(grid: tuple[int, int], limit: int = CELLS) -> list[tuple[int, int]]:
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    if len(cells) <= limit:
        return cells
    # One cell in each part of the grid, so that few cells cover all rows and columns.
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(4)).tolist()
    corners = [0, grid[1] - 1, len(cells) - grid[1], len(cells) - 1]
    chosen = list(dict.fromkeys([*corners, *order]))[:limit]
    return [cells[index] for index in sorted(chosen)]


def _centroids(energy: Tensor, grid: tuple[int, int], power: int = 1) -> Tensor:
    """Return the centroids ``[N, 2]`` of powers of maps ``[N, h, w]``, in units of the grid's rows and columns."""
    energy = energy.double()
    energy = (energy / energy.amax((1, 2), keepdim=True).clamp_min(1e-300)) ** power
    energy = energy / energy.sum((1, 2), keepdim=True).clamp_min(1e-300)
    places = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * cells - 0.5
              for n, cells in zip(energy.shape[1:], grid, strict=True)]  # fmt: skip
    return torch.stack([energy.sum(2) @ places[0], energy.sum(1) @ places[1]], dim=1)


def _order_problem(
    centroids: Tensor, cells: list[tuple[int, int]], grid: tuple[int, int], least: float = CORRELATION
) -> str | None:
    """Return how the places that features look at differ from their cells; ``None`` if they do not.

    Raises:
        NotApplicable: all features look at the same place, so no order can be read.
    """
    wanted = torch.tensor(cells, dtype=torch.float64)
    axes = [axis for axis in (0, 1) if grid[axis] > 1]
    spreads = {axis: float(centroids[:, axis].std() / wanted[:, axis].std()) for axis in axes}
    if min(spreads.values()) < SPREAD:
        raise NotApplicable(
            "every patch looks at most of the image, which covers the order of the patches; the kit needs a tower of "
            "smaller receptive fields or larger images"
        )
    found = {axis: _correlation(centroids[:, axis], wanted[:, axis]) for axis in axes}
    if min(found.values()) >= least:
        return None
    names = ("rows", "columns")
    seen = " and ".join(f"{found[axis]:.2f} with {names[axis]}" for axis in axes)
    turned = [names[axis] for axis in axes if found[axis] <= -CORRELATION]
    if turned:
        return f"{seen}; {' and '.join(turned)} are reversed"
    offsets = [tuple(pair) for pair in (centroids.round() - wanted).int().tolist()]
    common = max(set(offsets), key=offsets.count)
    if common != (0, 0) and offsets.count(common) > len(offsets) / 2:
        return f"{seen}; most features are shifted by {-common[0]} rows and {-common[1]} columns"
    # A map that is filled column by column.
    filled = torch.tensor([divmod(column * grid[0] + row, grid[1]) for row, column in cells], dtype=torch.float64)
    crossed = [_correlation(centroids[:, axis], filled[:, axis]) for axis in axes]
    if min(crossed) >= CORRELATION:
        return f"{seen}; rows and columns look exchanged"
    return seen


def _settled_problem(
    energy: Callable[[int], Tensor], cells: list[tuple[int, int]], grid: tuple[int, int]
) -> str | None:
    """Return the problem of the order, for centroids of several draws if the first one does not settle it.

    Args:
        energy: the number of a draw to energy maps ``[N, h, w]`` of the cells.
        cells: the N cells.
        grid: rows and columns.

    Raises:
        NotApplicable: as for :func:`_order_problem`.
    """
    first = energy(0)
    power = 1
    try:
        problem = _order_problem(_centroids(first, grid), cells, grid)
    except NotApplicable:
        # A sharp peak on a wide base.
        power = PEAK_POWER
        problem = _order_problem(_centroids(first, grid, power), cells, grid)
    if problem is None:
        return None
    # Noise of blurred maps averages out, and a wrong order does not.
    draws = [first, *(energy(draw) for draw in range(1, DRAWS))]
    centroids = torch.stack([_centroids(one, grid, power) for one in draws]).mean(0)
    return _order_problem(centroids, cells, grid, AVERAGED_CORRELATION)


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


@check(
    "each patch feature looks at its own place in the image, on small and large grids",
    "the grid is transposed: columns come first, or width and height are exchanged",
    "a prefix token (class token, register) is counted as the first patch, which shifts all others",
    "tokens are reshaped in another order than that of the patches, perhaps in a code path for large images only",
    needs=(BUILT, "image_features", "pooled_on_request", "other_sizes", "deterministic", "batch_independent"),
)
def patches_in_place(session: CheckSession) -> None:
    unclear: NotApplicable | None = None
    clear = False
    sizes = _sizes(session)
    for index, size in enumerate(sizes):
        grid = session.grid(*size)
        if grid is None:
            continue
        # Large images of large models are few.
        cells = _cells(grid, CELLS if index < 1 + is_small(session) else FEW_CELLS)
        try:
            problem = _settled_problem(lambda draw: _gradient_energy(session, size, cells, draw), cells, grid)  # noqa: B023
        except NotApplicable as covered:
            unclear = covered
            if index == len(sizes) - 1 < 3 and not clear and is_small(session):
                sizes.append((4 * sizes[0][0], 4 * sizes[0][1]))
            continue
        clear = True
        if problem is not None:
            raise CheckFailed(
                f"centroids of gradients correlate with their patch's row and column by {CORRELATION} or more "
                f"on {grid[0]} x {grid[1]} patches",
                problem,
            )
        _expect_distinct(session, size)
    if unclear is not None and not clear:
        raise unclear


def _gradient_energy(
    session: CheckSession, size: tuple[int, int], cells: list[tuple[int, int]], draw: int = 0
) -> Tensor:
    """Return the energy over the pixels, ``[N, h, w]``, of the gradient of each cell's feature."""
    base, found = session.pixels(1, size, seed=1 + draw), []
    generator = torch.Generator().manual_seed(6 + draw)
    for start in range(0, len(cells), 8):
        part = cells[start : start + 8]
        pixels = base.repeat(len(part), 1, 1, 1).requires_grad_(True)
        patches = session.encode(pixels, pooled=False).patches
        features = torch.stack([patches[i, row, column] for i, (row, column) in enumerate(part)])
        if not features.requires_grad:
            # The check of gradients reports it.
            raise NotApplicable("patches have no gradient with respect to pixels")
        weights = torch.randn(features.shape, generator=generator).to(features)
        (gradient,) = torch.autograd.grad((features * weights).sum(), pixels, allow_unused=True)
        if gradient is None:
            raise NotApplicable("patches have no gradient with respect to pixels")
        found.append(gradient.double().square().sum(1).cpu())
    return torch.cat(found)


def _expect_distinct(session: CheckSession, size: tuple[int, int]) -> None:
    """Fail if two patches of random pixels have one feature, or if patches are interpolated from fewer ones."""
    with torch.no_grad():
        patches = session.encode(session.pixels(1, size), pooled=False).patches[0].double().cpu()
    flat = patches.flatten(0, 1)
    if len(flat) > 400:
        return
    gaps = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") + torch.eye(len(flat)) * 1e30
    if float(gaps.min()) <= 1e-9 * float(flat.norm(dim=1).mean()):
        first, second = divmod(int(gaps.argmin()), len(flat))
        columns = patches.shape[1]
        raise CheckFailed(
            "different features of different patches",
            f"one feature in the cells {divmod(first, columns)} and {divmod(second, columns)}",
        )


@check(
    "patches are as sharp as the blocks of the tower that they come from",
    "the feature map is smoothed, averaged over neighbours, or interpolated from a smaller one",
    "the last block mixes patches, and another dense mode would not",
    needs=(BUILT, "image_features", "patches_in_place"),
)
def patches_sharp(session: CheckSession) -> None:
    if session.run("patches_in_place").status != "passed":
        raise NotApplicable("patches are not known to be in place")
    size, grid = _size(session)
    cells = _cells(grid, CELLS if is_small(session) else FEW_CELLS)
    height, width = size[0] // grid[0], size[1] // grid[1]
    base = session.pixels(1, size)
    changed = base.repeat(len(cells), 1, 1, 1)
    patch = 2 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(6)).to(base)
    for image, (row, column) in zip(changed, cells, strict=True):
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = patch
    blocks = session.adapter.tower_blocks("image")
    count = grid[0] * grid[1]
    with torch.no_grad():
        before, inside = _maps(session, base, blocks, grid)
        parts = [_maps(session, part, blocks, grid) for part in changed.split(8)]
    exact = _exact(torch.cat([patches for patches, _ in parts]) - before, cells)
    if exact >= BLURRED:
        return
    for block, name in ((block, name) for block, name in _named(session, blocks) if block in inside):
        maps = [found[block] for _, found in parts if block in found]
        if len(maps) != len(parts) or any(one.shape[1] != count for one in maps):
            continue
        change = (torch.cat(maps) - inside[block]).unflatten(1, grid)
        own = _exact(change, cells)
        if own >= SHARP:
            raise CheckFailed(
                f"the change of one patch's pixels peaks in that patch, as it does in {name} for {own:.0%} of "
                f"{len(cells)} cells",
                f"it peaks there for {exact:.0%}",
            )


def _named(session: CheckSession, blocks: list[nn.Module]) -> list[tuple[nn.Module, str]]:
    names = {module: name for name, module in session.adapter.model.named_modules()}
    return [(block, names.get(block, type(block).__name__)) for block in blocks[-2:]]


def _maps(
    session: CheckSession, pixels: Tensor, blocks: list[nn.Module], grid: tuple[int, int]
) -> tuple[Tensor, dict[nn.Module, Tensor]]:
    """Return patches ``[B, H, W, D]`` and, of the last blocks that ran, their tokens of the patches ``[B, P, W]``."""
    with recorded_outputs(blocks[-2:]) as outputs:
        patches = session.encode(pixels, pooled=False).patches
    found = {}
    for block, output in outputs.items():
        # Every block of a convolutional tower mixes neighbours, so that only its last one is as sharp as its patches.
        if output.ndim == 4 and block is not blocks[-1]:
            continue
        tokens = _tokens(output, len(pixels), grid)
        if tokens is not None:
            found[block] = tokens
    return patches, found


def _tokens(output: Tensor, count: int, grid: tuple[int, int]) -> Tensor | None:
    """Return a block's output as ``[B, P, W]``, without prefix tokens; ``None`` if it has another grid."""
    patches = grid[0] * grid[1]
    if output.ndim == 4 and output.shape[-2:] == grid and len(output) == count:
        return output.flatten(2).transpose(1, 2)
    if output.ndim == 3 and len(output) != count and output.shape[1] == count:
        output = output.transpose(0, 1)
    if output.ndim == 3 and len(output) == count and 0 <= output.shape[1] - patches <= 16:
        return output[:, output.shape[1] - patches :]
    return None


def _exact(change: Tensor, cells: list[tuple[int, int]]) -> float:
    """Return the fraction of trials ``[N, H, W, C]`` whose change is largest in the modified cell."""
    columns = change.shape[2]
    peaks = change.float().norm(dim=-1).flatten(1).argmax(1).tolist()
    return sum(divmod(peak, columns) == cell for peak, cell in zip(peaks, cells, strict=True)) / len(cells)


@check(
    "when a bright object in an image moves, the response moves along the same axis",
    "dense_transform interprets size as (width, height), or transposes the image",
    "the grid is transposed or shifted; see patches_in_place",
    needs=(BUILT, "image_features", "patches_in_place", "dense_transform"),
)
def moving_object(session: CheckSession) -> None:
    size, grid = _size(session)
    double = (2 * size[0], 2 * size[1])
    sizes = [size, *([double] if session.grid(*double) is not None and size != session.description.image_size else [])]
    for last, current in enumerate(sizes, start=1):
        grid = session.grid(*current) or grid
        try:
            problem = _object_problem(session, current, grid)
        except NotApplicable:
            if last < len(sizes):
                continue
            raise
        if problem is not None:
            raise CheckFailed(
                f"centroids of the response correlate with the object's row and column by {CORRELATION} or more",
                problem,
            )
        return


def _object_problem(session: CheckSession, size: tuple[int, int], grid: tuple[int, int]) -> str | None:
    cells = _cells(grid)
    return _settled_problem(lambda draw: _response(session, size, grid, cells, draw), cells, grid)


def _response(
    session: CheckSession, size: tuple[int, int], grid: tuple[int, int], cells: list[tuple[int, int]], draw: int
) -> Tensor:
    """Return the energy ``[N, H, W]`` of the change of patches when an object is put into each cell of a scene."""
    transform = session.adapter.dense_transform(size)
    height, width = 2 * size[0] // grid[0], 2 * size[1] // grid[1]
    # A textured scene, since the features of a plain one saturate in batch norms.
    scene = np.random.default_rng(5 + draw).integers(60, 120, (2 * size[0], 2 * size[1], 3)).astype(np.uint8)
    images = [scene]
    for row, column in cells:
        image = scene.copy()
        image[row * height : (row + 1) * height, column * width : (column + 1) * width] = 250
        images.append(image)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images]).to(session.adapter.device)
    with torch.no_grad():
        features = torch.cat([session.encode(part, pooled=False).patches for part in pixels.split(8)])
    return (features[1:] - features[:1]).double().square().sum(-1).cpu()
