"""Image sizes as callers pass them: a side, or (height, width)."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

from ttd_plugins.errors import ImageSizeError

Size = int | tuple[int, int]
LARGEST_SIDE = 16_384
"""Largest side in pixels; a larger one is a mistake, and would exhaust the memory."""


def size_pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size: a side of a square, or a pair, in whole pixels.

    Raises:
        ImageSizeError: the size has another form, or a side is not between 1 and 16,384 pixels.
    """
    try:
        if isinstance(size, bool | str | bytes):
            raise TypeError
        with suppress(TypeError):
            size = (operator.index(size),) * 2
        height, width = size
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        pair = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ImageSizeError(
            f"an image size is a whole number of pixels or a pair (height, width) of them, not {size!r}"
        ) from None
    if not all(1 <= side <= LARGEST_SIDE for side in pair):
        raise ImageSizeError(
            f"the sides of an image size are from 1 to {LARGEST_SIDE} pixels, not {pair[0]} x {pair[1]}"
        )
    return pair
