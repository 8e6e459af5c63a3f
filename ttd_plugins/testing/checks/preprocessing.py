"""Checks of preprocessing: correct normalisation, and no cropping in dense_transform."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

COLOUR = (200, 120, 30)
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16")


def _expected(session: CheckSession, colour: tuple[int, ...]) -> Tensor:
    """Return the normalised value of a colour, ``[3]``."""
    mean, std = torch.tensor(session.description.mean), torch.tensor(session.description.std)
    return (torch.tensor(colour) / 255 - mean) / std


def _tolerance(session: CheckSession, steps: float = 1.5) -> Tensor:
    """Return a tolerance of a few 8-bit steps for the rounding of resampling, ``[3]``."""
    return steps / 255 / torch.tensor(session.description.std)


def _expect_pixels(what: str, found: object, size: tuple[int, int]) -> Tensor:
    if not isinstance(found, Tensor):
        raise CheckFailed(f"{what} returns a tensor", f"a {type(found).__name__}")
    if tuple(found.shape) != (3, *size) or found.dtype != torch.float32:
        raise CheckFailed(
            f"{what} returns float32 pixels of shape {(3, *size)}", f"{found.dtype} of shape {tuple(found.shape)}"
        )
    return found


def _expect_colour(
    session: CheckSession, what: str, pixels: Tensor, colour: tuple[int, ...], steps: float = 1.5
) -> None:
    wanted = _expected(session, colour)
    if not bool(((pixels - wanted[:, None]).abs() <= _tolerance(session, steps)[:, None]).all()):
        seen = ", ".join(f"{value:.3f}" for value in pixels.float().mean(1).tolist())
        raise CheckFailed(f"{what}: {', '.join(f'{value:.3f}' for value in wanted.tolist())}", seen)


@check(
    "dense_transform returns normalised float32 pixels of the requested size, showing the whole image",
    "mean and std differ from those of the description, or are applied to pixels from 0 to 255",
    "channels are in the order blue, green, red",
    "the short side is resized and the image is cropped, as for classification",
    "size is interpreted as (width, height)",
    needs=(BUILT, "description"),
)
def dense_transform(session: CheckSession) -> None:
    preferred = session.description.image_size
    rows, columns = session.description.patch_size
    wide = next((size for size in session.sizes() if size[0] != size[1]), None)
    square = (rows * columns * 4, rows * columns * 4) if rows != columns else (4 * rows, 4 * rows)
    sizes: list[tuple[Any, tuple[int, int]]] = [(None, preferred), (preferred, preferred)]
    if session.grid(*square) is not None:
        sizes.append((square[0], square))
    if wide is not None:
        sizes.append((wide, wide))
    plain = Image.new("RGB", (90, 70), COLOUR)
    for size, shape in sizes:
        what = f"dense_transform({'' if size is None else size})"
        pixels = _expect_pixels(what, session.adapter.dense_transform(size)(plain), shape)
        _expect_colour(session, f"{what} of the colour {COLOUR}", pixels.flatten(1), COLOUR)
    # A coloured corner in each quarter of a very wide image: a crop would remove part of the outer thirds.
    image = np.zeros((60, 240, 3), np.uint8)
    corners = {(0, 0): (250, 10, 10), (0, 1): (10, 250, 10), (1, 0): (10, 10, 250), (1, 1): (250, 250, 10)}
    for (down, right), colour in corners.items():
        image[30 * down : 30 * down + 30, 120 * right : 120 * right + 120] = 90
        # Only the outer sixth has the colour.
        start = 200 * right
        image[30 * down : 30 * down + 30, start : start + 40] = colour
    for _, (height, width) in sizes[-1:] if wide is not None else sizes[:1]:
        pixels = session.adapter.dense_transform((height, width))(Image.fromarray(image))
        for (down, right), colour in corners.items():
            y, x = int(height * (0.25 + 0.5 * down)), int(width * (1 / 12 + 10 / 12 * right))
            wanted = _expected(session, colour)
            if not bool(((pixels[:, y, x] - wanted).abs() <= _tolerance(session, 40)).all()):
                place = f"{'lower' if down else 'upper'} {'right' if right else 'left'}"
                raise CheckFailed(
                    f"the {place} corner of a wide image has its colour near that corner of the pixels",
                    "another colour",
                )


@check(
    "dense_transform and native_transform accept PIL images of any mode",
    "the image is not converted to RGB before it becomes an array",
    needs=(BUILT, "dense_transform"),
)
def any_image_mode(session: CheckSession) -> None:
    size = session.description.image_size
    for mode in MODES:
        image = Image.new(mode, (40, 30))
        for name in ("dense_transform", "native_transform"):
            try:
                pixels = getattr(session.adapter, name)()(image)
            except Exception as error:
                raise CheckFailed(f"{name} accepts an image of mode {mode}", error_text(error)) from error
            if not isinstance(pixels, Tensor) or len(pixels) != 3 or not bool(torch.isfinite(pixels).all()):
                raise CheckFailed(f"{name} returns finite pixels for mode {mode}", "something else")
        if tuple(pixels.shape[1:]) != size and session.grid(*pixels.shape[1:]) is None:
            raise CheckFailed(f"native_transform returns {size} for mode {mode}", str(tuple(pixels.shape[1:])))


@check(
    "native_transform returns float32 pixels that encode_image accepts, normalised as in the description",
    "the description has the mean and std of another family (OpenAI's, ImageNet's, one half)",
    "native_transform lacks the normalisation, or the conversion to a tensor",
    needs=(BUILT, "description"),
)
def native_transform(session: CheckSession) -> None:
    pixels = session.adapter.native_transform()(Image.new("RGB", (90, 70), COLOUR))
    if not isinstance(pixels, Tensor) or pixels.ndim != 3:
        raise CheckFailed("a tensor [3, height, width]", f"a {type(pixels).__name__}")
    _expect_pixels("native_transform", pixels, (pixels.shape[1], pixels.shape[2]))
    if session.grid(pixels.shape[1], pixels.shape[2]) is None:
        raise CheckFailed("a size that patch_grid accepts", str(tuple(pixels.shape[1:])))
    # In the middle, since a transform may pad.
    middle = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    _expect_colour(session, f"the colour {COLOUR}", middle[:, None], COLOUR)


@check(
    "transforms can be pickled, for the workers of a data loader",
    "the transform is a lambda or a function inside a method; use a small class instead",
    needs=(BUILT, "dense_transform", "native_transform"),
)
def transforms_pickle(session: CheckSession) -> None:
    import pickle

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for name in ("dense_transform", "native_transform"):
        transform = getattr(session.adapter, name)()
        try:
            again = pickle.loads(pickle.dumps(transform))
        except Exception as error:
            raise CheckFailed(f"the transform of {name} can be pickled", error_text(error)) from error
        if not torch.equal(again(image), transform(image)):
            raise CheckFailed(f"the same pixels from a pickled {name}", "other pixels")
