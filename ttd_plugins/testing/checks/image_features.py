"""Checks of image features: types and shapes, input sizes, batches, and agreement with the library."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ttd_plugins.errors import ImageSizeError
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


@check(
    "encode_image returns finite ImageFeatures of the specified shapes, in the model's dtype and on its device",
    "prefix tokens (class token, registers) are not removed from the patches",
    "features are taken before the projection, so that their width is not that of the joint space",
    "features are cast to float32, or pixels are not cast to the model's dtype",
    needs=(BUILT, "description"),
)
def image_features(session: CheckSession) -> None:
    features = session.encode(session.pixels())
    assert features.pooled is not None
    dtypes = {parameter.dtype for parameter in session.adapter.model.parameters()}
    for name, tensor in (("patches", features.patches), ("pooled", features.pooled)):
        if tensor.dtype not in dtypes:
            raise CheckFailed(f"{name} in the model's dtype, {session.dtype}", str(tensor.dtype))
        if tensor.device != session.adapter.device:
            raise CheckFailed(f"{name} on {session.adapter.device}", str(tensor.device))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"finite {name}", "values that are not finite")


@check(
    "with pooled=False, pooled is None and the patches are the same",
    "the code path without the pooled embedding runs other blocks, or another mode",
    needs=(BUILT, "image_features", "deterministic"),
)
def pooled_on_request(session: CheckSession) -> None:
    both = session.native_features()
    with torch.no_grad():
        alone = session.encode(session.pixels(), pooled=False)
    session.expect_close("patches without and with the pooled embedding", alone.patches, both.patches)


@check(
    "in evaluation mode, two calls return the same features and text embeddings",
    "dropout, drop path or patch dropout is applied in evaluation mode too",
    "encode_image draws random numbers, for masks or initial tokens",
    needs=(BUILT, "image_features", "text_features"),
)
def deterministic(session: CheckSession) -> None:
    pixels, ids = session.pixels(), session.tokens(["a dog", "two cats on grass"]).ids
    exact = 0.0 if session.adapter.device.type == "cpu" else session.tolerance
    with torch.no_grad():
        first, second = session.encode(pixels), session.encode(pixels)
        texts, again = session.embed(ids), session.embed(ids)
    assert first.pooled is not None
    assert second.pooled is not None
    for name, a, b in (
        ("patches", first.patches, second.patches),
        ("pooled", first.pooled, second.pooled),
        ("text embeddings", texts, again),
    ):
        session.expect_close(f"{name} of two calls", b, a, tolerance=exact)


@check(
    "an image has the same features alone and in a batch",
    "sequence and batch axes are exchanged (batch_first), so that attention runs across images",
    "features are centred or normalised over the batch, or batch norm uses the statistics of the batch",
    "rows are assigned to the wrong images, by a view instead of a permutation",
    needs=(BUILT, "image_features", "deterministic"),
)
def batch_independent(session: CheckSession) -> None:
    pixels, together = session.pixels(), session.native_features()
    assert together.pooled is not None
    with torch.no_grad():
        for index in range(len(pixels)):
            alone = session.encode(pixels[index : index + 1])
            assert alone.pooled is not None
            session.expect_close("patches alone and in a batch", alone.patches[0], together.patches[index])
            session.expect_close("pooled alone and in a batch", alone.pooled[0], together.pooled[index])


@check(
    "other input sizes, including non-square ones, result in the grid that patch_grid returns",
    "height and width of the grid are exchanged",
    "the position embedding is not resampled, or resampled to a square",
    "rotary embeddings or window sizes are those of the preferred size",
    needs=(BUILT, "image_features"),
)
def other_sizes(session: CheckSession) -> None:
    sizes = session.sizes()
    if not sizes:
        raise NotApplicable("patch_grid accepts only the preferred size")
    rows, columns = session.description.patch_size
    with torch.no_grad():
        for size in sizes:
            grid = session.grid(*size)
            if grid != (size[0] // rows, size[1] // columns):
                raise CheckFailed(f"patch_grid{size} is {(size[0] // rows, size[1] // columns)}", str(grid))
            try:
                features = session.encode(session.pixels(2, size))
            except ImageSizeError as error:
                raise CheckFailed(f"features for {size}, which patch_grid accepts", error_text(error)) from error
            if not bool(torch.isfinite(features.patches).all()):
                raise CheckFailed(f"finite features at {size}", "values that are not finite")


@check(
    "encode_image raises ImageSizeError for a size that is not a multiple of the patch size",
    "encode_image does not call patch_grid, and a strided convolution silently drops the last pixels",
    needs=(BUILT, "image_features"),
)
def misfit_sizes(session: CheckSession) -> None:
    rows, columns = session.description.patch_size
    height, width = session.description.image_size
    tried = False
    for size in ((height + max(rows // 2, 1), width), (height, width + max(columns // 2, 1))):
        if session.grid(*size) is None:
            tried = True
            try:
                session.adapter.encode_image(session.pixels(1, size))
            except ImageSizeError:
                continue
            except Exception as error:
                raise CheckFailed(f"an ImageSizeError for {size}", error_text(error)) from error
            raise CheckFailed(f"an ImageSizeError for {size}", "features")
    if not tried:
        raise NotApplicable("patch_grid accepts every size")


@check(
    "the pooled embedding equals the library's own image embedding",
    "the class token is taken from the pass for dense features, which the dense mode modifies",
    "the final LayerNorm or the projection is missing or applied twice",
    "average pooling and class-token pooling are exchanged",
    needs=(BUILT, "image_features", "deterministic"),
)
def pooled_matches_library(session: CheckSession) -> None:
    pixels = session.pixels()
    found = session.native_features().pooled
    assert found is not None
    with torch.no_grad():
        try:
            own = session.image_reference(session.adapter, pixels.to(session.dtype))
        except Exception as error:
            raise NotApplicable(f"the library's own embedding cannot be computed ({error_text(error)})") from error
    if own is None:
        raise NotApplicable("the model has neither encode_image nor get_image_features; override the reference")
    compare_with_library(session, "the pooled embedding", found, own)


def compare_with_library(session: CheckSession, what: str, found: Tensor, own: Tensor) -> None:
    """Fail unless an embedding equals the library's; lengths are ignored if the library normalises."""
    if are_unit(session, own) and not are_unit(session, found):
        found, own = nn.functional.normalize(found, dim=-1), nn.functional.normalize(own, dim=-1)
    # Fused kernels add in another order.
    session.expect_close(f"{what} and the library's", found, own, tolerance=2 * session.tolerance)


def are_unit(session: CheckSession, features: Tensor) -> bool:
    """Return whether all vectors along the last axis have length one."""
    return bool(((features.detach().float().norm(dim=-1) - 1).abs() < max(session.tolerance, 1e-3)).all())


@check(
    "patches, pooled and text embeddings are not L2-normalised",
    "the library normalises by default; pass normalize=False",
    "the adapter normalises, which the engine does in float32",
    needs=(BUILT, "image_features", "text_features"),
)
def not_normalised(session: CheckSession) -> None:
    with torch.no_grad():
        features = session.encode(session.pixels())
        texts = session.embed(session.tokens(["a dog", "two cats on grass", "sky"]).ids)
    assert features.pooled is not None
    for name, tensor in (("patches", features.patches), ("pooled", features.pooled), ("text embeddings", texts)):
        if are_unit(session, tensor):
            raise CheckFailed(f"{name} as the last layer returns them", "vectors that all have length one")
