"""Reading image files: every format that Pillow reads becomes an upright 8-bit RGB image."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ttd_plugins.errors import InputError, one_sentence

_ORIENTATION = 0x0112
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
        InputError: the file is missing, empty, truncated, broken or not an image; its values are floating-point; or it
            has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``. The message names the file.
    """
    if name is None and not isinstance(source, bytes):
        name = str(source)
    name = "the image" if name is None else f"image {name!r}"
    if not isinstance(source, bytes) and Path(source).is_dir():
        raise InputError(f"{name} is a folder; give the path of one image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            _refuse_bomb(image, name)
            image.load()
            return to_rgb(image, name)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except PermissionError as error:
        raise InputError(f"{name} cannot be read: permission denied") from error
    except UnidentifiedImageError as error:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        what = "is empty" if size == 0 else "is not an image in a format that Pillow reads"
        raise InputError(f"{name} {what}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is refused: {one_sentence(error)}") from error
    # Decoders of broken files raise exceptions of many types.
    except Exception as error:
        raise InputError(f"{name} cannot be decoded; it may be truncated ({one_sentence(error)})") from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert a PIL image of any mode to an upright 8-bit RGB image; see :func:`read_image`.

    An EXIF orientation that cannot be parsed is ignored.

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
    try:
        orientation = image.getexif().get(_ORIENTATION)
    # The EXIF of some cameras and editors cannot be parsed, while the pixels are sound.
    except Exception:
        return image
    # ImageOps.exif_transpose would rewrite the whole EXIF, and fails on unrelated tags.
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _refuse_bomb(image: Image.Image, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels, more than the limit of {limit:,}; make it smaller, "
            "or increase PIL.Image.MAX_IMAGE_PIXELS"
        )
