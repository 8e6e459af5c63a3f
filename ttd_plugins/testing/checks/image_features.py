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

MAX_LENGTH_RATIO = 100.0
"""Largest ratio between mean lengths of patch features, pooled and text embeddings of one joint space."""


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


@check(
    "patches end in the same linear projection as the pooled embedding, and lengths in the joint space are comparable",
    "patches are taken before the projection into the joint space, whose width happens to be equal",
    "patches pass the projection without the final LayerNorm, or another head",
    needs=(BUILT, "image_features", "text_features", "not_normalised", "gradients_to_image_parameters"),
)
def joint_space(session: CheckSession) -> None:
    model, pixels = session.adapter.model, session.pixels(size=session.quick_size())
    # Embeddings equal to the library's define the joint space, whatever their lengths; random weights vary much.
    own = all(session.run(name).status == "passed" for name in ("pooled_matches_library", "text_matches_library"))
    model.requires_grad_(True)
    features = session.encode(pixels)
    assert features.pooled is not None
    texts = session.embed(session.tokens(["a dog", "two cats on grass", "sky"]).ids)
    lengths = {
        name: float(tensor.detach().double().norm(dim=-1).mean())
        for name, tensor in (("patches", features.patches), ("pooled", features.pooled), ("text", texts))
    }
    for name in ("patches",) if own else ("patches", "text"):
        ratio = lengths[name] / max(lengths["pooled"], 1e-30)
        if not 1 / MAX_LENGTH_RATIO < ratio < MAX_LENGTH_RATIO:
            raise CheckFailed(
                f"a mean length of {name} within a factor of {MAX_LENGTH_RATIO:g} of that of pooled embeddings",
                f"{lengths[name]:.3g} against {lengths['pooled']:.3g}",
            )
    named = dict(session.adapter.tower_parameters("image"))
    projections = _linear_groups(features.pooled, model, named, session.tolerance)
    patches = _euler_ratios(features.patches, named)
    for group in projections:
        ratio = sum(patches[name] for name in group)
        if abs(ratio - 1) > 0.02:
            raise CheckFailed(
                f"{' and '.join(group)}, which projects pooled embeddings into the joint space, projects patches too",
                "patches do not depend on it" if abs(ratio) < 1e-6 else "patches depend on it in another way",
            )


def _euler_ratios(features: Tensor, named: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return ``p . df/dp / f`` of each parameter p, which is one if f is linear in p (Euler's theorem)."""
    total = (features * features.detach()).sum()
    gradients = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: 0.0 if g is None else float((g.double() * p.detach().double()).sum() / total.detach().double())
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def _linear_groups(
    pooled: Tensor, model: nn.Module, named: dict[str, nn.Parameter], tolerance: float
) -> list[list[str]]:
    """Return groups of parameters (one, or weight and bias of a module) in which the pooled embedding is linear."""
    ratios = _euler_ratios(pooled, named)
    # A second direction excludes accidental ratios of one.
    signs = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3)).abs().to(pooled)
    total = (pooled * pooled.detach().sign() * signs).sum()
    gradients = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    others = {
        name: 0.0 if g is None else float((g.double() * p.detach().double()).sum() / total.detach().double())
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }
    groups = [[name] for name in named]
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{key}".lstrip(".") for key in module._parameters]
        own = [name for name in own if name in named]
        if len(own) == 2 and not list(module.children()):
            groups.append(own)
    allowed = max(10 * tolerance, 2e-3)
    linear = [g for g in groups if all(abs(sum(s[name] for name in g) - 1) < allowed for s in (ratios, others))]
    # If a bias is zero, the weight alone and weight with bias are both linear; use the larger group.
    return [g for g in linear if not any(set(g) < set(other) for other in linear)]
