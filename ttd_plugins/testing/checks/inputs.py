"""Checks of inputs that differ in layout, number and precision but mean the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter, ImageFeatures
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

IMAGES = 40
"""Images of a large batch; adapters that split batches do it at 8, 16 or 32."""
REDUCED_COSINE = 0.97
"""Smallest mean cosine between features in reduced and in the model's own precision."""
TEXTS = ["a dog", "two cats on grass"]


@check(
    "pixels of any memory layout have the same features, and neither pixels nor ids are changed in place",
    "view() is called on pixels that are channels-last or a slice; use reshape() or flatten()",
    "pixels are clamped or normalised in place, or padding of the ids is overwritten",
    needs=(BUILT, "image_features", "text_features", "deterministic"),
)
def any_layout(session: CheckSession) -> None:
    size = session.quick_size()
    pixels, ids = session.pixels(size=size), session.tokens(TEXTS).ids.to(session.adapter.device)
    pixels = 3 * pixels
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels-last": lambda x: x.clone(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    }
    with torch.no_grad():
        plain = session.encode(pixels.clone())
        assert plain.pooled is not None
        for name, layout in layouts.items():
            given = layout(pixels)
            value = given.clone()
            try:
                found = session.encode(given)
            except RuntimeError as error:
                if _library_fails(session, given):
                    continue
                raise CheckFailed(f"features of {name} pixels", error_text(error)) from error
            if not torch.equal(given, value):
                raise CheckFailed(f"{name} pixels that encode_image leaves unchanged", "changed pixels")
            assert found.pooled is not None
            count = 1 if name == "expanded" else len(pixels)
            what = f"of {name} and of contiguous pixels"
            session.expect_close(
                f"patches {what}", found.patches[:count], plain.patches[:count], tolerance=2 * session.tolerance
            )
            session.expect_close(
                f"pooled {what}", found.pooled[:count], plain.pooled[:count], tolerance=2 * session.tolerance
            )
        given = torch.cat([ids, ids], 1)[:, : ids.shape[1]]
        texts = session.embed(given)
        if not torch.equal(given, ids):
            raise CheckFailed("ids that encode_text leaves unchanged", "changed ids")
        session.expect_close("text embeddings of sliced and of contiguous ids", session.embed(ids.clone()), texts)


def _library_fails(session: CheckSession, pixels: Tensor) -> bool:
    """Return whether the library's own image embedding raises for these pixels too."""
    try:
        session.image_reference(session.adapter, pixels.to(session.dtype))
    except Exception:
        return True
    return False


@check(
    "a large batch has the features of its parts, in their order",
    "images are encoded in chunks that are put together in another order, or the last chunk is lost",
    "a buffer has room for a fixed number of images or texts",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "batch_independent", "texts_independent"),
)
def large_batches(session: CheckSession) -> None:
    rows, columns = session.description.patch_size
    small = (2 * rows, 2 * columns)
    size = small if session.grid(*small) is not None else session.quick_size()
    pixels = session.pixels(IMAGES, size)
    texts = [f"{word} {number}" for number in range(IMAGES // 2) for word in ("a dog", "two cats on grass")]
    with torch.no_grad():
        together = session.encode(pixels)
        for start in range(0, IMAGES, 5):
            part = session.encode(pixels[start : start + 5])
            for name in ("patches", "pooled"):
                found, own = getattr(together, name)[start : start + 5], getattr(part, name)
                session.expect_close(
                    f"{name} of images {start} to {start + 4} in a batch of {IMAGES} and alone",
                    found,
                    own,
                    tolerance=2 * session.tolerance,
                )
        ids = session.tokens(texts).ids
        embeddings = session.embed(ids)
        for start in range(0, IMAGES, 8):
            session.expect_close(
                f"embeddings of texts {start} to {start + 7} in a batch of {IMAGES} and alone",
                embeddings[start : start + 8],
                session.embed(ids[start : start + 8]),
                tolerance=2 * session.tolerance,
            )


@check(
    "a batch without images or texts has features of zero rows, where the library can",
    "an assertion or the first element of the batch is evaluated before the batch is known to be filled",
    needs=(BUILT, "image_features", "text_features", "pooled_matches_library"),
)
def empty_batches(session: CheckSession) -> None:
    pixels = session.pixels(0)
    ids = session.tokens(TEXTS).ids[:0].to(session.adapter.device)
    calls: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "images",
            lambda: session.encode(pixels),
            lambda: session.image_reference(session.adapter, pixels.to(session.dtype)),
        ),
        ("texts", lambda: session.embed(ids), lambda: session.library_text(session.adapter, ids, torch.ones_like(ids))),
    ]
    tried = False
    with torch.no_grad():
        for name, own, library in calls:
            try:
                known = library()
            except Exception:
                continue
            if known is None:
                continue
            tried = True
            try:
                own()
            except CheckFailed:
                raise
            except Exception as error:
                # torch refuses reshape(0, -1), and no engine needs it.
                if isinstance(error, RuntimeError) and "elements" in str(error):
                    continue
                raise CheckFailed(f"features of no {name}, as the library returns", error_text(error)) from error
    if not tried:
        raise NotApplicable("the library has no embedding of an empty batch")


@check(
    "under autocast to bfloat16, features are finite and close to those without it",
    "two tensors of different dtypes meet in an operation that autocast does not cover, such as index_put",
    "weights are read directly, outside of the operations that autocast casts",
    needs=(BUILT, "image_features", "text_features", "other_sizes"),
)
def autocast(session: CheckSession) -> None:
    if session.dtype != torch.float32:
        raise NotApplicable(f"the model is in {session.dtype}, and autocast is for float32")
    pixels, ids = session.pixels(size=session.quick_size()), session.tokens(TEXTS).ids

    def run(adapter: DenseAdapter) -> tuple[ImageFeatures, Tensor]:
        with torch.autocast(adapter.device.type, torch.bfloat16):
            return session.encode(pixels, adapter=adapter), session.embed(ids, adapter=adapter)

    _expect_reduced(session, "under autocast", run, session.adapter, pixels, ids)


@check(
    "a model in float16 returns finite features close to the original ones, where the library can",
    "an intermediate value exceeds 65504, by a scale that is divided out later",
    "a constant such as 1e-8 or -1e9 is out of the range of float16",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "half_precision"),
)
def float16(session: CheckSession) -> None:
    if session.dtype not in (torch.float32, torch.float64):
        raise NotApplicable(f"the model is in {session.dtype} already")
    pixels, ids = session.pixels(size=session.quick_size()), session.tokens(TEXTS).ids
    half = copy.deepcopy(session.adapter).to(torch.float16)

    def run(adapter: DenseAdapter) -> tuple[ImageFeatures, Tensor]:
        return session.encode(pixels, adapter=adapter), session.embed(ids, adapter=adapter)

    _expect_reduced(session, "in float16", run, half, pixels.to(torch.float16), ids)


def _expect_reduced(
    session: CheckSession,
    where: str,
    run: Callable[[DenseAdapter], tuple[ImageFeatures, Tensor]],
    adapter: DenseAdapter,
    pixels: Tensor,
    ids: Tensor,
) -> None:
    """Fail if features in reduced precision are wrong though the library's own are not.

    Raises:
        NotApplicable: the library's own embeddings cannot be computed, or are not finite.
    """
    with torch.no_grad():
        problem = _library_problem(session, where, adapter, pixels, ids)
        try:
            features, texts = run(adapter)
        except CheckFailed:
            raise
        except Exception as error:
            if problem is not None or "not implemented for" in str(error):
                raise NotApplicable(problem or f"torch does not support it here: {error_text(error)}") from error
            raise CheckFailed(f"features {where}", error_text(error)) from error
        original, own_texts = session.encode(pixels.float()), session.embed(ids)
    assert features.pooled is not None
    # What the pooled embedding cannot, patches need not.
    sound = bool(torch.isfinite(features.pooled).all()) and bool(torch.isfinite(texts).all())
    if problem is not None and not sound:
        raise NotApplicable(problem)
    for name, found, own in (
        ("patches", features.patches, original.patches),
        ("pooled", features.pooled, original.pooled),
        ("text embeddings", texts, own_texts),
    ):
        assert own is not None
        if not bool(torch.isfinite(found).all()):
            raise CheckFailed(f"finite {name} {where}", "values that are not finite")
        cosine = float(F.cosine_similarity(found.double(), own.double(), dim=-1).mean())
        if not cosine > REDUCED_COSINE:
            raise CheckFailed(
                f"{name} {where} with a cosine above {REDUCED_COSINE} to the original ones", f"{cosine:.3f}"
            )


def _library_problem(
    session: CheckSession, where: str, adapter: DenseAdapter, pixels: Tensor, ids: Tensor
) -> str | None:
    """Return why the library's own embeddings are missing or not finite at the preferred size; ``None`` if sound."""
    native = session.pixels(1).to(pixels.dtype)
    try:
        if where == "under autocast":
            with torch.autocast(adapter.device.type, torch.bfloat16):
                found = [session.image_reference(adapter, native), session.library_text(adapter, ids)]
        else:
            found = [session.image_reference(adapter, native), session.library_text(adapter, ids)]
    except Exception as error:
        return f"the library itself fails {where}: {error_text(error)}"
    if any(one is None for one in found):
        return f"the library has no embeddings to compare with {where}"
    if not all(bool(torch.isfinite(one).all()) for one in found if one is not None):
        return f"the library's own embeddings are not finite {where}"
    return None
