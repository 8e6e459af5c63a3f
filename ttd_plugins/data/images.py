"""Reading pictures as people have them: any file that Pillow reads becomes an upright 8-bit RGB image."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ttd_plugins.errors import InputError, one_sentence

_16_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def read_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Read a picture as an 8-bit RGB image, turned upright as its EXIF orientation says.

    Of an animation the first frame is taken, and transparent parts lie on white. 16-bit grey values are scaled to 8
    bits. Palettes and CMYK are converted.

    Args:
        source: a path, or the bytes of a picture file.
        name: how messages call it; by default the path.

    Raises:
        InputError: the file is missing, empty, no image, cut short or otherwise broken, holds floating-point values,
            or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``; the message names the file.
    """
    if name is None and not isinstance(source, bytes):
        name = str(source)
    name = "the image" if name is None else f"image {name!r}"
    if not isinstance(source, bytes) and Path(source).is_dir():
        raise InputError(f"{name} is a folder; give the path of one picture")
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
        raise InputError(f"{name} may not be read: permission denied") from error
    except UnidentifiedImageError as error:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        what = "is empty" if size == 0 else "is not an image in a format that Pillow reads"
        raise InputError(f"{name} {what}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is refused: {one_sentence(error)}") from error
    # Decoders of broken files raise whatever their parsing stumbles on.
    except Exception as error:
        raise InputError(f"{name} cannot be decoded and may be cut short: {one_sentence(error)}") from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """The first frame of a PIL image in any mode as an upright 8-bit RGB image; see :func:`read_image`.

    An orientation that cannot be read counts as upright. ``name`` is how messages call it.

    Raises:
        InputError: the image holds floating-point values, or integers beyond 16 bits.
    """
    # Some cameras and editors write EXIF that cannot be parsed; the pixels beside it are sound.
    with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error, EOFError):
        image = ImageOps.exif_transpose(image)
    if image.mode in _16_BIT_MODES or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name} holds integers outside 0 to 65535; convert it to 8 bits a channel")
        # Dividing by 257 maps 65535 to 255 exactly, where Pillow's own conversion would cut all above 255 to white.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point values, whose range is unknown; convert it to 8 bits a channel")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _refuse_bomb(image: Image.Image, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels, more than the {limit:,} that are safe to "
            "decode; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
