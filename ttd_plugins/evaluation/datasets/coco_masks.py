"""Decoding of COCO's masks: polygons, run-length encodings as lists, and compressed run-length encodings.

The conventions are those of the COCO API (``maskApi.c``): runs count pixels column by column, starting with background,
and polygons are traced at five times the resolution, so that areas agree with published results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESOLUTION = 5


def decode_counts(text: str | bytes) -> list[int]:
    """Decode a compressed run-length encoding: numbers in 5-bit digits, from the third number on as differences.

    Returns:
        The run lengths.

    Raises:
        ValueError: the string ends inside a number.
    """
    data = text.encode("ascii") if isinstance(text, str) else text
    counts: list[int] = []
    place = 0
    while place < len(data):
        value = digit = 0
        while True:
            if place >= len(data):
                raise ValueError("the compressed counts end inside a number")
            code = data[place] - 48
            place += 1
            if digit > 12:
                raise ValueError("the compressed counts contain a number of more than 60 bits")
            value |= (code & 0x1F) << (5 * digit)
            digit += 1
            if not code & 0x20:
                break
        if code & 0x10:
            value -= 1 << (5 * digit)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def rle_mask(counts: Sequence[int] | str | bytes, height: int, width: int) -> NDArray[np.bool_]:
    """Decode a run-length encoding to a mask, bool ``[height, width]``.

    Raises:
        ValueError: the runs do not cover the image exactly.
    """
    runs = decode_counts(counts) if isinstance(counts, str | bytes) else [int(count) for count in counts]
    if sum(runs) != height * width or any(run < 0 for run in runs):
        raise ValueError(f"the runs cover {sum(runs)} pixels, and the image has {width} x {height}")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T.copy()


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """Rasterise one polygon ``x0, y0, x1, y1, ...`` in pixels to a mask, bool ``[height, width]``.

    Raises:
        ValueError: the polygon has fewer than three corners, or one far outside the image.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon needs x and y of at least three corners, not {len(polygon)} numbers")
    points = np.asarray(polygon, np.float64)
    # Corners a little outside are usual, and cut off; far outside they would only cost memory.
    if not (np.abs(points) <= 10 * (height + width) + 1000).all():
        raise ValueError(f"a polygon has a corner far outside its image of {width} x {height} pixels")
    corners = (points.reshape(-1, 2) * _RESOLUTION + 0.5).astype(np.int64)
    us, vs = [], []
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        # Traced along the longer axis, always in ascending order, so that neighbours share their border exactly.
        reverse = (x0 > x1) if dx >= dy else (y0 > y1)
        (xs, ys, xe, ye) = (x1, y1, x0, y0) if reverse else (x0, y0, x1, y1)
        steps = np.arange(max(dx, dy) + 1)
        steps = steps[::-1] if reverse else steps
        slope = (ye - ys) / dx if dx >= dy and dx else (xe - xs) / dy if dy else 0.0
        if dx >= dy:
            us.append(steps + xs)
            vs.append((ys + slope * steps + 0.5).astype(np.int64))
        else:
            us.append((xs + slope * steps + 0.5).astype(np.int64))
            vs.append(steps + ys)
    u, v = np.concatenate(us), np.concatenate(vs)
    crossing = np.flatnonzero(u[1:] != u[:-1]) + 1
    column = (np.where(u[crossing] < u[crossing - 1], u[crossing], u[crossing] - 1) + 0.5) / _RESOLUTION - 0.5
    row = (np.minimum(v[crossing], v[crossing - 1]) + 0.5) / _RESOLUTION - 0.5
    inside = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    first_row = np.ceil(np.minimum(np.maximum(row[inside], 0), height)).astype(np.int64)
    starts = column[inside].astype(np.int64) * height + first_row
    flips = np.bincount(starts, minlength=height * width + 1)[: height * width]
    return (np.cumsum(flips) % 2 == 1).reshape(width, height).T.copy()


def annotation_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decode the ``segmentation`` of a COCO annotation: a list of polygons, or a mapping with ``size`` and ``counts``.

    Returns:
        bool ``[height, width]``.

    Raises:
        ValueError: the segmentation has another form, or does not fit the image.
    """
    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its run-length encoding has size {segmentation['size']}, not [{height}, {width}]")
        return rle_mask(segmentation["counts"], height, width)
    if not isinstance(segmentation, list):
        raise ValueError(
            f"a segmentation must be polygons or a run-length encoding, not a {type(segmentation).__name__}"
        )
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        mask |= polygon_mask(polygon, height, width)
    return mask
