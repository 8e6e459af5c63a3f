"""Procedural textures of scene backgrounds: twelve that captions name, and plain gradients without a name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.embedded.scenes.vocabulary import BACKGROUNDS

Texture = NDArray[np.float32]
VARIANTS = 6
SIDE = 128


def _smooth_noise(rng: np.random.Generator, cells: tuple[int, int]) -> Texture:
    """Bilinear value noise in [0, 1], ``[SIDE, SIDE]``, from a lattice of ``cells`` (rows, columns)."""
    lattice = rng.random((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    rows = np.linspace(0, cells[0], SIDE, endpoint=False, dtype=np.float32)
    columns = np.linspace(0, cells[1], SIDE, endpoint=False, dtype=np.float32)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r)[:, None], (columns - c)[None, :]
    top = lattice[r][:, c] * (1 - fc) + lattice[r][:, c + 1] * fc
    bottom = lattice[r + 1][:, c] * (1 - fc) + lattice[r + 1][:, c + 1] * fc
    return top * (1 - fr) + bottom * fr


def _blend(low: tuple[int, int, int], high: tuple[int, int, int], amount: NDArray[np.floating]) -> Texture:
    """Colours between ``low`` and ``high`` (0 to 255), ``[SIDE, SIDE, 3]``, by ``amount`` in [0, 1]."""
    a, b = np.array(low, np.float32), np.array(high, np.float32)
    return (a + (b - a) * np.clip(amount, 0, 1)[..., None]).astype(np.float32)


def _cells(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], Texture]:
    """Voronoi cells: for each pixel the index of its nearest seed, and the distance to the cell border in pixels."""
    seeds = rng.random((count, 2), dtype=np.float32) * SIDE
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).astype(np.float32)
    distance = np.sqrt(((grid[:, :, None] - seeds) ** 2).sum(-1))
    nearest = np.partition(distance, 1, axis=-1)
    return distance.argmin(-1), nearest[..., 1] - nearest[..., 0]


def _grass(rng: np.random.Generator) -> Texture:
    blades = 0.6 * _smooth_noise(rng, (16, 90)) + 0.4 * _smooth_noise(rng, (5, 5))
    return _blend((28, 92, 24), (120, 186, 60), blades)


def _water(rng: np.random.Generator) -> Texture:
    waves = 0.7 * _smooth_noise(rng, (44, 9)) + 0.3 * _smooth_noise(rng, (8, 4))
    return _blend((16, 70, 140), (96, 178, 208), waves**1.5)


def _sand(rng: np.random.Generator) -> Texture:
    ripples = 0.35 * _smooth_noise(rng, (14, 4)) + 0.65 * _smooth_noise(rng, (110, 110))
    return _blend((196, 164, 104), (238, 214, 160), ripples)


def _snow(rng: np.random.Generator) -> Texture:
    drifts = 0.75 * _smooth_noise(rng, (4, 6)) + 0.25 * _smooth_noise(rng, (70, 70))
    return _blend((206, 218, 236), (255, 255, 255), drifts)


def _brick(rng: np.random.Generator) -> Texture:
    height, width = 11, 26
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    course = rows // height
    shifted = columns + (course % 2) * (width // 2)
    tone = rng.random((SIDE // height + 2, SIDE // width + 3), dtype=np.float32)[course, shifted // width]
    wall = _blend((140, 50, 36), (196, 92, 66), 0.8 * tone + 0.2 * _smooth_noise(rng, (80, 80)))
    mortar = (rows % height < 2) | (shifted % width < 2)
    wall[mortar] = (206, 198, 186)
    return wall


def _sky(rng: np.random.Generator) -> Texture:
    clouds = 0.65 * _smooth_noise(rng, (5, 4)) + 0.35 * _smooth_noise(rng, (12, 9))
    return _blend((84, 154, 232), (248, 250, 255), (clouds - 0.35) * 2.2)


def _wood(rng: np.random.Generator) -> Texture:
    columns = np.arange(SIDE)[None, :]
    plank = np.broadcast_to(columns // 24, (SIDE, SIDE))
    grain = _smooth_noise(rng, (5, 60)) * 0.6 + rng.random(10, dtype=np.float32)[plank] * 0.4
    boards = _blend((104, 62, 28), (186, 130, 76), grain)
    boards[:, np.arange(SIDE) % 24 < 2] = (58, 34, 16)
    return boards


def _gravel(rng: np.random.Generator) -> Texture:
    index, border = _cells(rng, 270)
    tone = rng.random(270, dtype=np.float32)[index] * np.clip(border / 2.5, 0.2, 1)
    return _blend((52, 52, 56), (196, 192, 188), tone)


def _leaves(rng: np.random.Generator) -> Texture:
    index, border = _cells(rng, 96)
    tone = rng.random(96, dtype=np.float32)[index]
    litter = _blend((150, 60, 16), (236, 170, 48), tone)
    return litter * np.clip(border / 4, 0.45, 1)[..., None].astype(np.float32)


def _tiles(rng: np.random.Generator) -> Texture:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    checker = ((rows // 16 + columns // 16) % 2).astype(np.float32)
    floor = _blend((40, 122, 118), (226, 240, 232), 0.9 * checker + 0.1 * _smooth_noise(rng, (20, 20)))
    floor[(rows % 16 < 1) | (columns % 16 < 1)] = (150, 160, 158)
    return floor


def _mud(rng: np.random.Generator) -> Texture:
    puddles = 0.6 * _smooth_noise(rng, (7, 7)) + 0.4 * _smooth_noise(rng, (26, 26))
    return _blend((48, 32, 18), (122, 90, 58), puddles)


def _marble(rng: np.random.Generator) -> Texture:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    veins = np.abs(np.sin(9 * (rows + columns) + 7 * _smooth_noise(rng, (5, 5)) + rng.random() * 6))
    return _blend((96, 88, 120), (232, 222, 238), veins**0.5)


_DRAW: dict[str, Callable[[np.random.Generator], Texture]] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "snow": _snow,
    "brick": _brick,
    "sky": _sky,
    "wood": _wood,
    "gravel": _gravel,
    "leaves": _leaves,
    "tiles": _tiles,
    "mud": _mud,
    "marble": _marble,
}


@cache
def _variants(name: str) -> NDArray[np.uint8]:
    rng = np.random.default_rng([BACKGROUNDS.index(name), 2404])
    return np.stack([_DRAW[name](rng) for _ in range(VARIANTS)]).round().clip(0, 255).astype(np.uint8)


def texture(name: str, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a random crop ``[side, side, 3]`` (``side`` at most 128) of the named background."""
    variant = _variants(name)[rng.integers(VARIANTS)]
    row, column = rng.integers(0, SIDE - side + 1, size=2)
    cut = variant[row : row + side, column : column + side]
    return cut[:, ::-1] if rng.random() < 0.5 else cut


def plain(side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a random two-colour gradient ``[side, side, 3]``."""
    start, end = rng.uniform(40, 230, size=(2, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    amount = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    return np.broadcast_to(start + (end - start) * amount, (side, side, 3)).astype(np.uint8)
