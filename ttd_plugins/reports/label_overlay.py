"""Masks of classes as images: colours, palette PNGs, and overlays on a photograph with a legend."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ttd_plugins.errors import InputError
from ttd_plugins.reports.formatting import one_line, shortened
from ttd_plugins.reports.palette import light

LABEL_OPACITY = 0.55
MAX_ENTRIES = 40
"""Classes in a legend; the others are counted."""
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_LIGHTNESS = (0.68, 0.84, 0.52)
_CHROMA = 0.17
_NARROWEST = 240
# OKLab to the cone responses, and these to linear sRGB (Ottosson, 2020).
_TO_CONES = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@dataclass(frozen=True)
class LegendEntry:
    """One row of a legend: a text and a colour, uint8 ``[3]``."""

    text: str
    colour: tuple[int, int, int]


@cache
def _colours(count: int) -> NDArray[np.uint8]:
    index = np.arange(1, count)
    hue = index * _GOLDEN_ANGLE
    lightness = np.array(_LIGHTNESS)[index % len(_LIGHTNESS)]
    lab = np.stack([lightness, _CHROMA * np.cos(hue), _CHROMA * np.sin(hue)], -1)
    linear = ((lab @ _TO_CONES.T) ** 3 @ _TO_RGB.T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours = np.concatenate([np.zeros((1, 3)), encoded * 255]).round().astype(np.uint8)
    colours.setflags(write=False)
    return colours


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colours of the indices of a mask, uint8 ``[count, 3]``: index 0 is black, the others differ in hue and lightness.

    The colour of an index does not depend on ``count``.
    """
    return _colours(max(count, 1))


def mask_image(labels: NDArray[np.integer], count: int) -> Image.Image:
    """A mask as an image for a PNG: 8 bits with a palette, or 16 bits of grey for more than 256 indices.

    Args:
        labels: ``[height, width]``, each below ``count``.
        count: number of indices.

    Raises:
        InputError: an index is out of range, or there are more than 65,536.
    """
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < count <= 1 << 16:
        raise InputError(f"a mask has indices from 0 to {count - 1:,}, at most 65,535; this one has another")
    if count > 256:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(class_colours(count).tobytes())
    return image


def draw_labels(
    image: NDArray[np.uint8], labels: NDArray[np.integer], count: int, opacity: float = LABEL_OPACITY
) -> NDArray[np.uint8]:
    """Blend the colours of a mask over an image and draw the borders of regions; index 0 leaves the image as it is.

    Args:
        image: uint8 ``[height, width, 3]``.
        labels: ``[height, width]``, each below ``count``.
        count: number of indices.
        opacity: of the colours, in [0, 1].

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        InputError: the shapes differ.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] != labels.shape:
        raise InputError(f"an image {list(image.shape)} and a mask {list(labels.shape)} differ in size")
    drawn = image.copy()
    colours = class_colours(count)
    # In stripes, since the blend needs several floating-point copies.
    rows = max((1 << 20) // max(image.shape[1], 1), 1)
    for top in range(0, len(image), rows):
        part, found = drawn[top : top + rows], labels[top : top + rows]
        blended = ((1 - opacity) * part + opacity * colours[found]).round().astype(np.uint8)
        part[:] = np.where((found > 0)[..., None], blended, part)
    width = max(round(max(labels.shape) / 400), 1)
    edge = _borders(labels, width)
    drawn[edge] = colours[labels[edge]]
    return drawn


def _borders(labels: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    """Pixels of a region other than the background, at most ``width`` pixels from another region."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        for axis in (0, 1):
            if labels.shape[axis] <= step:
                continue
            near, far = [slice(None)] * 2, [slice(None)] * 2
            near[axis], far[axis] = slice(None, -step), slice(step, None)
            differ = labels[tuple(near)] != labels[tuple(far)]
            edge[tuple(near)] |= differ
            edge[tuple(far)] |= differ
    return edge & (labels > 0)


def with_legend(image: NDArray[np.uint8], entries: Sequence[LegendEntry], note: str = "") -> NDArray[np.uint8]:
    """Add a legend below an image, which stays at its own size in the upper left corner.

    Args:
        image: uint8 ``[height, width, 3]``.
        entries: the rows; those above :data:`MAX_ENTRIES` are counted.
        note: a sentence below the rows.

    Returns:
        uint8 ``[height + legend, max(width, 240), 3]``.
    """
    height, width = image.shape[:2]
    wide = max(width, _NARROWEST)
    size = int(min(max(round(wide / 42), 12), 64))
    pad, row = size // 2 + 2, round(size * 1.6)
    shown = [LegendEntry(shortened(one_line(one.text) or "(no name)", 60), one.colour) for one in entries[:MAX_ENTRIES]]
    if len(entries) > len(shown):
        shown.append(LegendEntry(f"and {len(entries) - len(shown)} more", (255, 255, 255)))
    places: list[tuple[int, int]] = []
    left, top = pad, pad
    for entry in shown:
        needed = round(row + _length(entry.text, size) + size)
        if left > pad and left + needed > wide - pad:
            left, top = pad, top + row
        places.append((left, top))
        left += needed
    below = top + row if shown else pad
    lines = _wrapped(one_line(note), size, wide - 2 * pad)
    canvas = Image.new("RGB", (wide, height + below + len(lines) * row + pad), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for entry, (x, y) in zip(shown, places, strict=True):
        draw.rectangle((x, height + y + size // 6, x + size, height + y + size // 6 + size), fill=entry.colour)
        _write(draw, (x + round(1.4 * size), height + y), entry.text, size, light("ink"))
    for number, line in enumerate(lines):
        _write(draw, (pad, height + below + number * row), line, size, light("muted"))
    return np.asarray(canvas)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and _length(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str) -> None:
    draw.text(place, text, fill=colour, font=_font(size, _covering(text)))


def _length(text: str, size: int) -> float:
    return float(_font(size, _covering(text)).getlength(text))


@lru_cache(64)
def _font(size: int, file: str | None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


@lru_cache(4096)
def _covering(text: str) -> str | None:
    """The file of a font that has every letter of a text; ``None`` for Pillow's own, which has Latin letters only."""
    if text.isascii() or importlib.util.find_spec("matplotlib") is None:
        return None
    # Imported for such texts only, since matplotlib needs a second to list the installed fonts.
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    from ttd_plugins.reports.charts import font_families

    files = [str(findfont(family)) for family in font_families()]
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    covered = {file: len(wanted - FT2Font(file).get_charmap().keys()) for file in files if Path(file).is_file()}
    return min(covered, key=lambda file: covered[file], default=None)
