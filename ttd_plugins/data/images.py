"""Reading image files: every accepted format becomes an upright 8-bit RGB image.

Every part of the project that opens an image does so through :func:`open_image`. Pillow itself would also start
Ghostscript for PostScript, and run rarely used decoders, whatever a file is called.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.utils.file_kinds import HEAD_BYTES, describe_kind, read_head
from ttd_plugins.utils.png_texts import without_long_texts
from ttd_plugins.utils.user_files import open_regular

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Pillow's names of the formats that are read; ``PPM`` includes PGM and PBM. The content decides, not the file name."""

_ORIENTATION = 0x0112
_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""The entries of ``Image.info`` in which Pillow looks for an orientation."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_16_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def read_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Read an image file as an 8-bit RGB image and apply its EXIF orientation.

    Animations return their first frame. Transparent parts become white. 16-bit grey values are scaled to 8 bits.
    Palettes and CMYK are converted.

    Args:
        source: a path, or the bytes of an image file.
        name: name of the image in messages; by default the path.

    Returns:
        An image of mode ``"RGB"``.

    Raises:
        InputError: the file is missing, empty, truncated, broken, not an image or not a regular file; its values are
            floating-point; or it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``. The message names the file.
    """
    with open_image(source, name) as image:
        image.load()
        return to_rgb(image, _title(source, name, "image"))


@contextmanager
def open_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, *, kind: str = "image"
) -> Iterator[Image.Image]:
    """Open an image file as it is stored, without decoding its pixels; errors inside the ``with`` block are included.

    Args:
        source: a path, or the bytes of an image file.
        name: name of the image in messages; by default the path.
        kind: what the image is, for messages, such as ``"mask"``.

    Yields:
        The image in its own mode, not turned by EXIF, closed after the block.

    Raises:
        InputError: the file is missing, empty, truncated, broken, not a regular file (a named pipe would block), or in
            none of :data:`IMAGE_FORMATS`; or it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``. The message names
            the file.
    """
    title = _title(source, name, kind)
    if not isinstance(source, bytes) and os.path.isdir(source):
        raise InputError(f"{title} is a folder; give the path of one image")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, title) as stream:
            shortened = without_long_texts(stream)
            stream.seek(0)
            with Image.open(stream if shortened is None else io.BytesIO(shortened), formats=IMAGE_FORMATS) as image:
                _refuse_bomb(image, title)
                yield image
    except TTDError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{title} {_unidentified(source)}") from error
    # A program may turn the warning into an exception.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{title} is refused: {one_sentence(error)}") from error
    # Decoders of broken files raise exceptions of many types.
    except Exception as error:
        raise InputError(f"{title} cannot be decoded; it may be truncated ({one_sentence(error)})") from error


def _title(source: str | os.PathLike[str] | bytes, name: str | None, kind: str) -> str:
    if name is None and not isinstance(source, bytes):
        name = os.fspath(source)
    return f"the {kind}" if name is None else f"{kind} {name!r}"


def _unidentified(source: str | os.PathLike[str] | bytes) -> str:
    """Return the end of a sentence about a file that is in no accepted format."""
    head = source[:HEAD_BYTES] if isinstance(source, bytes) else read_head(source)
    if not head:
        return "is empty"
    found = describe_kind(head)
    what = f"is {found}" if found else "is not an image"
    return f"{what}; the formats that are read are {', '.join(IMAGE_FORMATS)}"


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert a PIL image of any mode to an upright 8-bit RGB image; see :func:`read_image`.

    An EXIF orientation that cannot be parsed is ignored. The result has none, so a second call changes nothing.

    Args:
        image: the image; animations use their first frame.
        name: name of the image in messages.

    Raises:
        InputError: the object is not a PIL image, or it has floating-point values, or integers outside 16 bits.
    """
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{name} must be a PIL image or a path, not an object of class {type(image).__module__}."
            f"{type(image).__qualname__}; PIL.Image.fromarray() converts a uint8 array [height, width, 3]"
        )
    # Pillow turns TIFF as it decodes it; before that, the orientation is still there.
    image.load()
    image = _upright(image)
    if image.mode in _16_BIT_MODES or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name} has integers outside 0 to 65535; convert it to 8 bits per channel")
        # Division by 257 maps 65535 to 255 exactly; Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{name} has floating-point values of unknown range; convert it to 8 bits per channel")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose would rewrite the whole EXIF, and fails on unrelated tags.
    turn = _TURNS.get(exif_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    # The pixels are upright now: a second call must not turn them again.
    for name in _ORIENTATION_SOURCES:
        turned.info.pop(name, None)
    return turned


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 (upright) if it has none, or one that cannot be parsed."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    # The EXIF of some cameras and editors cannot be parsed, while the pixels are sound.
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def turn_upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array ``[height, width]`` of pixels as they are stored the way :func:`to_rgb` turns their image.

    Args:
        values: one value per stored pixel.
        orientation: the EXIF orientation; see :func:`exif_orientation`.
    """
    if orientation >= 5:
        values = values.T
    # What is left to mirror, from left to right and from top to bottom.
    across = orientation in (2, 3, 6, 7)
    down = orientation in (3, 4, 7, 8)
    return np.ascontiguousarray(values[:: -1 if down else 1, :: -1 if across else 1])


def _refuse_bomb(image: Image.Image, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels, more than the limit of {limit:,}; make it smaller, "
            "or increase PIL.Image.MAX_IMAGE_PIXELS"
        )
