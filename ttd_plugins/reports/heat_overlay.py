"""Heat maps over images: one colour map, one opacity, one interpolation and one grey image for PNGs, reports and app.

A PNG blends image and heat (:func:`overlay`). In a page ``heat_overlay.css`` stacks the grey image and the heat layer
(:func:`heat_layer_uri`), so that the reader can change the opacity. Both look the same.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence
from ttd_plugins.evaluation.metrics import upsample_map

COLOUR_MAP = "inferno"
HEAT_OPACITY = 0.65
LAYER_SIDE = 56
"""Longer side in pixels of a heat layer on a page; the browser enlarges it further."""
LAYER_COLOURS = 64
"""Colours of a heat layer on a page: half the file of 256 colours, and no visible difference."""
PNG_SIDE = 256
"""Images up to this side are stored as PNG, which keeps drawn scenes sharp; larger ones as JPEG."""
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # those of the CSS filter grayscale()


def missing_matplotlib(error: ImportError) -> MissingDependencyError:
    """The error of a drawing function where matplotlib cannot be imported."""
    return MissingDependencyError(
        f"matplotlib draws maps and charts, and it cannot be imported ({one_sentence(error)}); "
        "install it with: pip install 'ttd-plugins[demo]'"
    )


@cache
def colour_table() -> NDArray[np.uint8]:
    """The colour map as uint8 ``[256, 3]``, from 0 (dark) to 1 (bright).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise missing_matplotlib(error) from error
    return (colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def colour_gradient() -> str:
    """The colour map as a CSS gradient from left (lowest) to right (highest)."""
    stops = ", ".join("#" + bytes(colour).hex() for colour in colour_table()[::17])
    return f"linear-gradient(90deg, {stops})"


def heat_levels(heat: NDArray[np.floating], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear resize of ``heat`` ``[H, W]`` in [0, 1] to rows of :func:`colour_table`, uint8 ``[height, width]``.

    Raises:
        InputError: ``heat`` is not a finite two-dimensional map.
    """
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise InputError(f"a heat map must be finite and of shape [H, W]; this one has shape {list(heat.shape)}")
    return (upsample_map(heat, height, width) * 255).round().clip(0, 255).astype(np.uint8)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.floating], opacity: float = HEAT_OPACITY) -> NDArray[np.uint8]:
    """Blend a heat map over an image in grey: ``(1 - opacity) * grey(image) + opacity * colour(heat)``.

    Args:
        image: uint8 ``[height, width, 3]``.
        heat: ``[H, W]`` in [0, 1], of any grid; resized bilinearly to the image, pixel centres aligned.
        opacity: of the heat, in [0, 1].

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        InputError: a shape, dtype or value is wrong.
        MissingDependencyError: matplotlib is not installed.
    """
    _check_image(image)
    if not 0 <= opacity <= 1:
        raise InputError(f"the opacity {opacity} must lie in [0, 1]")
    colours = colour_table()[heat_levels(heat, *image.shape[:2])]
    return ((1 - opacity) * grey(image).astype(np.float32) + opacity * colours).round().astype(np.uint8)


def grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The luma of an image on three equal channels, uint8 ``[height, width, 3]``, so that only the heat has colour."""
    return np.repeat((image.astype(np.float32) @ _LUMA).round().astype(np.uint8)[..., None], 3, axis=2)


@cache
def _layer_palette() -> NDArray[np.uint8]:
    return colour_table()[np.linspace(0, 255, LAYER_COLOURS).round().astype(int)]


def heat_layer_uri(heat: NDArray[np.floating]) -> str:
    """The coloured heat map of a page as a ``data:`` address of a palette PNG, its longer side :data:`LAYER_SIDE`.

    Values are interpolated before they are coloured, as in :func:`overlay`.

    Raises:
        InputError: ``heat`` is not a finite two-dimensional map.
        MissingDependencyError: matplotlib is not installed.
    """
    rows, columns = heat.shape if heat.ndim == 2 else (1, 1)
    scale = LAYER_SIDE / max(rows, columns, 1)
    levels = heat_levels(heat, max(round(rows * scale), 1), max(round(columns * scale), 1))
    return png_data_uri((levels / 255 * (LAYER_COLOURS - 1)).round().astype(np.uint8), _layer_palette())


def image_uri(image: NDArray[np.uint8], side: int) -> str:
    """An image for a page as a ``data:`` address, its longer side at most ``side``.

    Raises:
        InputError: the image is not uint8 ``[height, width, 3]``.
    """
    _check_image(image)
    if max(image.shape[:2]) <= min(PNG_SIDE, side):
        return png_data_uri(image)
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png_data_uri(array: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None) -> str:
    """An image as a ``data:image/png;base64,`` address.

    Args:
        array: uint8 ``[height, width]`` (grey, or rows of ``palette``), ``[height, width, 3]`` (RGB) or
            ``[height, width, 4]`` (RGBA).
        palette: uint8 ``[n, 3]``, n at most 256; the file then stores one byte per pixel.

    Raises:
        InputError: a shape or dtype is wrong.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an image must be uint8 with 1, 3 or 4 channels, not {array.dtype} {list(array.shape)}")
    image = Image.fromarray(array)
    if palette is not None:
        if array.ndim != 2:
            raise InputError(f"an image with a palette must be [height, width], not {list(array.shape)}")
        image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _check_image(image: NDArray[Any]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"an image must be uint8 [height, width, 3]; this one is {image.dtype} {list(image.shape)}")
