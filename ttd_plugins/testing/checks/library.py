"""Checks against what the backbone's own library computes, as far as the adapter states it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.checks.image_features import are_unit
from ttd_plugins.testing.library_reference import stated_reference

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

TEXTS = [
    "a dog",
    "A Photo of TWO Cats.",
    "don't stop: it's 3.5 km (2 mi)!",
    "caf\u00e9, na\u00efve, \u8349\u5730",
    "  spaces   inside ",
    "the quick brown fox jumps over the lazy dog " * 40,
]
PIXEL_STEPS, MEAN_STEPS = 24.0, 1.5
"""Largest and mean difference of pixels, in 8-bit steps; libraries resample with rounding of their own."""


@check(
    "at other input sizes, the pooled embedding equals the library's own, where the library accepts the size",
    "position embeddings are resampled in another way than the library's: filter, antialiasing or corners",
    "images of other sizes are resized to the preferred size first",
    needs=(BUILT, "other_sizes", "pooled_matches_library"),
)
def sizes_match_library(session: CheckSession) -> None:
    compared = 0
    for size in session.sizes():
        pixels = session.pixels(1, size)
        with torch.no_grad():
            try:
                own = session.image_reference(session.adapter, pixels.to(session.dtype))
            except Exception:
                continue
            found = session.encode(pixels).pooled
        if own is None or found is None or own.shape != found.shape:
            continue
        compared += 1
        if are_unit(session, own) and not are_unit(session, found):
            found, own = nn.functional.normalize(found, dim=-1), nn.functional.normalize(own, dim=-1)
        session.expect_close(
            f"the pooled embedding at {size} and the library's", found, own, tolerance=10 * session.tolerance
        )
    if not compared:
        raise NotApplicable("the library computes no embedding at another size")


@check(
    "patches equal those of library_reference.patches",
    "the dense mode is another one than the reference's",
    "tokens are taken before or after another block than in the library",
    needs=(BUILT, "image_features", "deterministic"),
)
def patches_match_library(session: CheckSession) -> None:
    reference = stated_reference(session.adapter).patches
    if reference is None:
        raise NotApplicable("the adapter states no library_reference.patches")
    found = session.native_features().patches
    with torch.no_grad():
        own = _call("patches", reference, session.adapter.model, session.pixels().to(session.dtype))
    if own.ndim == 3 and own.shape[1] == found.shape[1] * found.shape[2]:
        own = own.unflatten(1, found.shape[1:3])
    if own.shape != found.shape:
        raise CheckFailed(f"library_reference.patches returns shape {tuple(found.shape)}", f"shape {tuple(own.shape)}")
    session.expect_close("patches and the library's", found, own, tolerance=2 * session.tolerance)


@check(
    "ids equal those of library_reference.tokens, also for capitals, punctuation, accents and long texts",
    "the tokenizer does not lower-case or clean texts as the library's does",
    "start or end token, truncation or padding differ from the library's",
    needs=(BUILT, "tokens"),
)
def tokens_match_library(session: CheckSession) -> None:
    reference = stated_reference(session.adapter).tokens
    if reference is None:
        raise NotApplicable("the adapter states no library_reference.tokens")
    rows = _call("tokens", reference, list(TEXTS))
    rows = rows.tolist() if isinstance(rows, Tensor) else [list(row) for row in rows]
    found = session.tokens(TEXTS)
    if len(rows) != len(TEXTS):
        raise CheckFailed(f"library_reference.tokens returns {len(TEXTS)} rows", f"{len(rows)} rows")
    for text, row, ids, length in zip(TEXTS, rows, found.ids.tolist(), found.lengths.tolist(), strict=True):
        # Padding may be shorter than the context, or left out.
        common = min(len(row), len(ids))
        if row[:common] != ids[:common] or common < length:
            where = next((i for i in range(common) if row[i] != ids[i]), common)
            expected = (
                f"the library's ids of {text[:40]!r}, which continue at position {where} with {row[where : where + 3]}"
            )
            raise CheckFailed(expected, f"{ids[where : where + 3]}")


@check(
    "pixels of native_transform equal those of library_reference.pixels",
    "the library resizes with another filter, to another side, or crops another part",
    "mean, std or the order of channels differ from the library's",
    needs=(BUILT, "native_transform"),
)
def pixels_match_library(session: CheckSession) -> None:
    reference = stated_reference(session.adapter).pixels
    if reference is None:
        raise NotApplicable("the adapter states no library_reference.pixels")
    transform = session.adapter.native_transform()
    step = 1 / 255 / torch.tensor(session.description.std)[:, None, None]
    for width, height in ((97, 64), (60, 131), (300, 280)):
        image = _scene(width, height)
        found, own = transform(image), torch.as_tensor(_call("pixels", reference, image)).float()
        own = own[0] if own.ndim == 4 and len(own) == 1 else own
        if own.shape != found.shape:
            raise CheckFailed(f"the library's pixels of shape {tuple(own.shape)}", f"shape {tuple(found.shape)}")
        difference = (found - own).abs() / step
        if float(difference.max()) > PIXEL_STEPS or float(difference.mean()) > MEAN_STEPS:
            raise CheckFailed(
                f"the library's pixels of an image of {width} x {height}",
                f"differences of {float(difference.mean()):.1f} on average and of {float(difference.max()):.0f} "
                "at most (of 255)",
            )


def _call(name: str, reference: Any, *given: Any) -> Any:
    try:
        found = reference(*given)
    except Exception as error:
        raise CheckFailed(f"library_reference.{name} returns the library's own result", error_text(error)) from error
    return found


def _scene(width: int, height: int) -> Image.Image:
    """Return an image of soft shapes whose channels and quarters differ."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    channels = (200 * x + 40 * np.sin(9 * y), 220 * y + 30 * np.cos(11 * x), 120 + 90 * np.sin(7 * x * y + 2 * x))
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))
