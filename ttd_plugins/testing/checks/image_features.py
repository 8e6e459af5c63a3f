"""Features of images: types and shapes, sizes, batches, and whether they are the library's own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ttd_plugins.errors import ImageSizeError
from ttd_plugins.testing.check_session import BUILT, Session, said
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

APART = 100.0
"""Patches, pooled and text embeddings of one joint space have lengths within this factor of each other."""


@check(
    "encode_image gives ImageFeatures of the stated shapes, finite, in the dtype of the model, on its device",
    "prefix tokens (class token, registers) are left among the patches",
    "features stop before the projection, so that their width is not the joint space's",
    "features are cast to float32, or pixels are not cast to the dtype of the model",
    needs=(BUILT, "description"),
)
def image_features(session: Session) -> None:
    features = session.encode(session.pixels())
    assert features.pooled is not None
    dtypes = {parameter.dtype for parameter in session.adapter.model.parameters()}
    for name, tensor in (("patches", features.patches), ("pooled", features.pooled)):
        if tensor.dtype not in dtypes:
            raise CheckFailed(f"{name} in the dtype of the model, {session.dtype}", str(tensor.dtype))
        if tensor.device != session.adapter.device:
            raise CheckFailed(f"{name} on {session.adapter.device}", str(tensor.device))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"{name} that are finite", "values that are not")


@check(
    "with pooled=False, pooled is None and the patches are the same",
    "the short cut without the pooled embedding runs other blocks, or another mode",
    needs=(BUILT, "image_features", "deterministic"),
)
def pooled_on_request(session: Session) -> None:
    both = session.native_features()
    with torch.no_grad():
        alone = session.encode(session.pixels(), pooled=False)
    session.expect_close("patches without and with the pooled embedding", alone.patches, both.patches)


@check(
    "in evaluation mode, two calls give the same features and text embeddings",
    "dropout, drop path or patch dropout is applied whatever the mode",
    "random numbers are drawn in encode_image, for masks or initial tokens",
    needs=(BUILT, "image_features", "text_features"),
)
def deterministic(session: Session) -> None:
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
    "an image has the same features alone as in a batch with others",
    "sequence and batch axes are confused, so that attention runs across images (batch first or not)",
    "features are centred or normalised over the batch, or batch norm runs on the statistics of the batch",
    "rows are matched to images wrongly, with a view where a permutation is due",
    needs=(BUILT, "image_features", "deterministic"),
)
def batch_independent(session: Session) -> None:
    pixels, together = session.pixels(), session.native_features()
    assert together.pooled is not None
    with torch.no_grad():
        for index in range(len(pixels)):
            alone = session.encode(pixels[index : index + 1])
            assert alone.pooled is not None
            session.expect_close("patches alone and in a batch", alone.patches[0], together.patches[index])
            session.expect_close("pooled alone and in a batch", alone.pooled[0], together.pooled[index])


@check(
    "other sizes, not square ones too, give the grid that patch_grid says",
    "height and width are exchanged where the grid is made",
    "the position embedding is added as it is, or resampled to a square",
    "rotary embeddings or window sizes stay those of the preferred size",
    needs=(BUILT, "image_features"),
)
def other_sizes(session: Session) -> None:
    sizes = session.sizes()
    if not sizes:
        raise NotApplicable("patch_grid refuses every size but the preferred one")
    rows, columns = session.description.patch_size
    with torch.no_grad():
        for size in sizes:
            grid = session.grid(*size)
            if grid != (size[0] // rows, size[1] // columns):
                raise CheckFailed(f"patch_grid{size} is {(size[0] // rows, size[1] // columns)}", str(grid))
            try:
                features = session.encode(session.pixels(2, size))
            except ImageSizeError as error:
                raise CheckFailed(f"features for {size}, since patch_grid has an answer", said(error)) from error
            if not bool(torch.isfinite(features.patches).all()):
                raise CheckFailed(f"finite features at {size}", "values that are not finite")


@check(
    "a size that does not fit the patch grid is refused with an ImageSizeError",
    "encode_image does not ask patch_grid, and a strided convolution silently drops the last pixels",
    needs=(BUILT, "image_features"),
)
def misfit_sizes(session: Session) -> None:
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
                raise CheckFailed(f"an ImageSizeError for {size}", said(error)) from error
            raise CheckFailed(f"an ImageSizeError for {size}", "features")
    if not tried:
        raise NotApplicable("patch_grid takes every size")


@check(
    "the pooled embedding is the library's own image embedding",
    "the class token of the pass that makes dense features is taken, which the dense mode changed",
    "the final LayerNorm is left out or applied twice, or the projection is",
    "averaged and class-token pooling are confused",
    needs=(BUILT, "image_features", "deterministic"),
)
def pooled_is_the_librarys(session: Session) -> None:
    pixels = session.pixels()
    found = session.native_features().pooled
    assert found is not None
    with torch.no_grad():
        try:
            own = session.image_reference(session.adapter, pixels.to(session.dtype))
        except Exception as error:
            raise NotApplicable(f"the library's own embedding cannot be computed ({said(error)})") from error
    if own is None:
        raise NotApplicable("the model has neither encode_image nor get_image_features; override the reference")
    compare_with_library(session, "the pooled embedding", found, own)


def compare_with_library(session: Session, what: str, found: Tensor, own: Tensor) -> None:
    """Fail unless an embedding is the library's, up to its length where the library normalises."""
    if are_unit(session, own) and not are_unit(session, found):
        found, own = nn.functional.normalize(found, dim=-1), nn.functional.normalize(own, dim=-1)
    # Fused kernels add in another order, and more so in half precision.
    session.expect_close(f"{what} and the library's", found, own, tolerance=2 * session.tolerance)


def are_unit(session: Session, features: Tensor) -> bool:
    """Whether all vectors of the last axis have length one."""
    return bool(((features.detach().float().norm(dim=-1) - 1).abs() < max(session.tolerance, 1e-3)).all())


@check(
    "patches, pooled and text embeddings are not L2-normalised",
    "the library normalises unless it is told not to (normalize=False)",
    "the adapter normalises, which is the engine's part, done in float32",
    needs=(BUILT, "image_features", "text_features"),
)
def not_normalised(session: Session) -> None:
    with torch.no_grad():
        features = session.encode(session.pixels())
        texts = session.embed(session.tokens(["a dog", "two cats on grass", "sky"]).ids)
    assert features.pooled is not None
    for name, tensor in (("patches", features.patches), ("pooled", features.pooled), ("text embeddings", texts)):
        if are_unit(session, tensor):
            raise CheckFailed(f"{name} as the last layer gives them", "vectors that all have length one")


@check(
    "patches end in the same linear map as the pooled embedding, and lengths are alike in the whole joint space",
    "patches are tokens before the projection into the joint space, whose width happens to be the same",
    "patches go through the projection without the final LayerNorm, or through another head",
    needs=(BUILT, "image_features", "text_features", "not_normalised", "gradients_to_image_parameters"),
)
def joint_space(session: Session) -> None:
    model, pixels = session.adapter.model, session.pixels(size=session.quick_size())
    # Embeddings that are the library's own define the joint space, whatever their lengths; fresh weights differ much.
    own = all(session.run(name).status == "passed" for name in ("pooled_is_the_librarys", "text_is_the_librarys"))
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
        if not 1 / APART < ratio < APART:
            raise CheckFailed(
                f"mean length of {name} within a factor of {APART:g} of pooled embeddings'",
                f"{lengths[name]:.3g} against {lengths['pooled']:.3g}",
            )
    named = dict(session.adapter.tower_parameters("image"))
    finishing = _finishing(features.pooled, model, named, session.tolerance)
    patches = _shares(features.patches, named)
    for group in finishing:
        share = sum(patches[name] for name in group)
        if abs(share - 1) > 0.02:
            raise CheckFailed(
                f"{' and '.join(group)}, by which pooled embeddings are mapped into the joint space, maps patches too",
                "patches do not depend on it" if abs(share) < 1e-6 else "patches depend on it in another way",
            )


def _shares(features: Tensor, named: dict[str, nn.Parameter]) -> dict[str, float]:
    """By Euler's theorem: of a function that scales with a parameter, the parameter's derivative is the function."""
    total = (features * features.detach()).sum()
    gradients = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: 0.0 if g is None else float((g.double() * p.detach().double()).sum() / total.detach().double())
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def _finishing(pooled: Tensor, model: nn.Module, named: dict[str, nn.Parameter], tolerance: float) -> list[list[str]]:
    """Groups of parameters (one, or weight and bias of one module) that the pooled embedding is linear in."""
    shares = _shares(pooled, named)
    # In a second direction, so that nothing is linear by accident.
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
    linear = [g for g in groups if all(abs(sum(s[name] for name in g) - 1) < allowed for s in (shares, others))]
    # A weight alone where its bias happens to be zero, and both together, are one map.
    return [g for g in linear if not any(set(g) < set(other) for other in linear)]
