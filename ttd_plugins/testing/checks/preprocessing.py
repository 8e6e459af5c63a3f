"""From a PIL image to pixels: normalisation, and nothing cropped away."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.testing.check_session import BUILT, Session, said
from ttd_plugins.testing.check_types import Check, CheckFailed, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

COLOUR = (200, 120, 30)
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16")


def _expected(session: Session, colour: tuple[int, ...]) -> Tensor:
    """Normalised value of a colour, ``[3]``."""
    mean, std = torch.tensor(session.description.mean), torch.tensor(session.description.std)
    return (torch.tensor(colour) / 255 - mean) / std


def _slack(session: Session, steps: float = 1.5) -> Tensor:
    """A few steps of 8 bits, ``[3]``: resampling rounds."""
    return steps / 255 / torch.tensor(session.description.std)


def _expect_pixels(what: str, found: object, size: tuple[int, int]) -> Tensor:
    if not isinstance(found, Tensor):
        raise CheckFailed(f"{what} gives a tensor", f"a {type(found).__name__}")
    if tuple(found.shape) != (3, *size) or found.dtype != torch.float32:
        raise CheckFailed(
            f"{what} gives float32 pixels of shape {(3, *size)}", f"{found.dtype} of shape {tuple(found.shape)}"
        )
    return found


def _expect_colour(session: Session, what: str, pixels: Tensor, colour: tuple[int, ...], steps: float = 1.5) -> None:
    wanted = _expected(session, colour)
    if not bool(((pixels - wanted[:, None]).abs() <= _slack(session, steps)[:, None]).all()):
        shown = ", ".join(f"{value:.3f}" for value in pixels.float().mean(1).tolist())
        raise CheckFailed(f"{what}: {', '.join(f'{value:.3f}' for value in wanted.tolist())}", shown)


@check(
    "dense_transform gives normalised float32 pixels of the asked size from the whole picture",
    "mean and std differ from those of the description, or are applied to pixels from 0 to 255",
    "channels are in the order blue, green, red",
    "the picture is resized by its short side and cropped, as for classification",
    "size is taken for (width, height)",
    needs=(BUILT, "description"),
)
def dense_transform(session: Session) -> None:
    preferred = session.description.image_size
    rows, columns = session.description.patch_size
    wide = next((size for size in session.sizes() if size[0] != size[1]), None)
    square = (rows * columns * 4, rows * columns * 4) if rows != columns else (4 * rows, 4 * rows)
    asked: list[tuple[Any, tuple[int, int]]] = [(None, preferred), (preferred, preferred)]
    if session.grid(*square) is not None:
        asked.append((square[0], square))
    if wide is not None:
        asked.append((wide, wide))
    plain = Image.new("RGB", (90, 70), COLOUR)
    for size, shape in asked:
        what = f"dense_transform({'' if size is None else size})"
        pixels = _expect_pixels(what, session.adapter.dense_transform(size)(plain), shape)
        _expect_colour(session, f"{what} of the colour {COLOUR}", pixels.flatten(1), COLOUR)
    # Four quarters in a picture much wider than high: a crop would lose some of each outer third.
    picture = np.zeros((60, 240, 3), np.uint8)
    corners = {(0, 0): (250, 10, 10), (0, 1): (10, 250, 10), (1, 0): (10, 10, 250), (1, 1): (250, 250, 10)}
    for (down, right), colour in corners.items():
        picture[30 * down : 30 * down + 30, 120 * right : 120 * right + 120] = 90
        # Only the outer sixth has the colour.
        start = 200 * right
        picture[30 * down : 30 * down + 30, start : start + 40] = colour
    for _, (height, width) in asked[-1:] if wide is not None else asked[:1]:
        pixels = session.adapter.dense_transform((height, width))(Image.fromarray(picture))
        for (down, right), colour in corners.items():
            y, x = int(height * (0.25 + 0.5 * down)), int(width * (1 / 12 + 10 / 12 * right))
            wanted = _expected(session, colour)
            if not bool(((pixels[:, y, x] - wanted).abs() <= _slack(session, 40)).all()):
                place = f"{'lower' if down else 'upper'} {'right' if right else 'left'}"
                raise CheckFailed(
                    f"the colour at the {place} end of a wide picture near that end of the pixels", "another colour"
                )


@check(
    "dense_transform and native_transform take PIL images of any mode",
    "the picture is not converted to RGB before it becomes an array",
    needs=(BUILT, "dense_transform"),
)
def any_picture(session: Session) -> None:
    size = session.description.image_size
    for mode in MODES:
        image = Image.new(mode, (40, 30))
        for name in ("dense_transform", "native_transform"):
            try:
                pixels = getattr(session.adapter, name)()(image)
            except Exception as error:
                raise CheckFailed(f"{name} takes an image of mode {mode}", said(error)) from error
            if not isinstance(pixels, Tensor) or len(pixels) != 3 or not bool(torch.isfinite(pixels).all()):
                raise CheckFailed(f"{name} gives finite pixels for mode {mode}", "something else")
        if tuple(pixels.shape[1:]) != size and session.grid(*pixels.shape[1:]) is None:
            raise CheckFailed(f"native_transform gives {size} for mode {mode}", str(tuple(pixels.shape[1:])))


@check(
    "native_transform gives float32 pixels that encode_image takes, normalised as the description says",
    "the description has the mean and std of another family (OpenAI's, ImageNet's, one half)",
    "native_transform leaves out the normalisation, or the conversion to a tensor",
    needs=(BUILT, "description"),
)
def native_transform(session: Session) -> None:
    pixels = session.adapter.native_transform()(Image.new("RGB", (90, 70), COLOUR))
    if not isinstance(pixels, Tensor) or pixels.ndim != 3:
        raise CheckFailed("a tensor [3, height, width]", f"a {type(pixels).__name__}")
    _expect_pixels("native_transform", pixels, (pixels.shape[1], pixels.shape[2]))
    if session.grid(pixels.shape[1], pixels.shape[2]) is None:
        raise CheckFailed("a size that patch_grid takes", str(tuple(pixels.shape[1:])))
    # In the middle, since a transform may pad.
    middle = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    _expect_colour(session, f"the colour {COLOUR}", middle[:, None], COLOUR)


@check(
    "transforms can be sent to the workers of a data loader",
    "the transform is a lambda or a function inside a method; a small class can be pickled",
    needs=(BUILT, "dense_transform", "native_transform"),
)
def transforms_pickle(session: Session) -> None:
    import pickle

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for name in ("dense_transform", "native_transform"):
        transform = getattr(session.adapter, name)()
        try:
            again = pickle.loads(pickle.dumps(transform))
        except Exception as error:
            raise CheckFailed(f"what {name} returns can be pickled", said(error)) from error
        if not torch.equal(again(image), transform(image)):
            raise CheckFailed(f"the same pixels from a pickled {name}", "other pixels")
