"""Checks of towers, of gradients, and of training mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import TOWERS, DenseAdapter
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.method.text_embeddings import checkpointed_text_blocks
from ttd_plugins.testing.check_session import BUILT, CheckSession, distance, error_text, text_mask
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.checks.image_features import compare_with_library
from ttd_plugins.testing.probes import (
    copied_weights,
    fill_zeros,
    forward_calls,
    perturb,
    reached,
    shown,
    weighted,
    without_randomness,
)

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

TEXTS = ["a dog", "two cats on the green grass"]


@check(
    "tower_parameters uses the model's names, and the towers share no parameter",
    "names lack a prefix, or are those of a submodule",
    "a tower is selected by a prefix that the other tower has too",
    needs=(BUILT,),
)
def tower_parameters(session: CheckSession) -> None:
    known = dict(session.adapter.model.named_parameters())
    towers: list[dict[str, Any]] = []
    for tower in TOWERS:
        own = dict(session.adapter.tower_parameters(tower))
        if not own:
            raise CheckFailed(f"parameters of the {tower} tower", "none")
        wrong = [name for name, parameter in own.items() if known.get(name) is not parameter]
        if wrong:
            raise CheckFailed("names as in model.named_parameters()", f"{shown(wrong)} of the {tower} tower")
        towers.append(own)
    for first, second in pairwise(towers):
        both = set(first) & set(second)
        if both:
            raise CheckFailed("towers without shared parameters", f"{shown(both)} in both")


@check(
    "the towers list every parameter that their features depend on, and the logit scale is in neither",
    "a projection, a final norm or some blocks lie outside of the prefix by which parameters are selected",
    "names are matched by a prefix that the logit scale has too",
    needs=(BUILT, "image_features", "text_features", "tower_parameters"),
)
def towers_complete(session: CheckSession) -> None:
    adapter = session.adapter
    adapter.model.requires_grad_(True)
    fill_zeros(adapter.model)
    named = list(adapter.model.named_parameters())
    listed = {tower: {name for name, _ in adapter.tower_parameters(tower)} for tower in TOWERS}
    features = session.encode(session.pixels(size=session.quick_size()))
    assert features.pooled is not None
    outputs = {"image": (features.patches, features.pooled), "text": (session.embed(session.tokens(["a dog"]).ids),)}
    for tower, tensors in outputs.items():
        # A parameter that both towers use is listed in one.
        missing = set.union(*(reached(tensor, named) for tensor in tensors)) - listed["image"] - listed["text"]
        if missing:
            raise CheckFailed(
                f"every parameter of the {tower} features in tower_parameters({tower!r})", f"not {shown(missing)}"
            )
    scale = session.adapter.logit_scale()
    for tower in TOWERS:
        wrong = reached(scale, named) & listed[tower]
        if wrong:
            raise CheckFailed(
                f"a {tower} tower without the logit scale", f"{shown(wrong)} in tower_parameters({tower!r})"
            )


@check(
    "gradients of patches and of the pooled embedding reach the pixels",
    "encode_image runs under torch.no_grad() or torch.inference_mode()",
    "features are detached, or pass through NumPy or PIL",
    needs=(BUILT, "image_features"),
)
def gradients_to_pixels(session: CheckSession) -> None:
    pixels = session.pixels().requires_grad_(True)
    features = session.encode(pixels)
    for name, output in (("patches", features.patches), ("pooled", features.pooled)):
        assert output is not None
        if not output.requires_grad:
            raise CheckFailed(f"{name} with a gradient", f"{name} without a gradient")
        (found,) = torch.autograd.grad(weighted(output), pixels, retain_graph=True, allow_unused=True)
        if found is None or not bool((found.abs().flatten(1).amax(1) > 0).all()):
            raise CheckFailed(f"a gradient of {name} with respect to the pixels", "none")
        if not bool(torch.isfinite(found).all()):
            raise CheckFailed(f"a finite gradient of {name}", "values that are not finite")


@check(
    "gradients of the pooled embedding and of patches reach the parameters of the image tower",
    "a part of encode_image runs under torch.no_grad(), or its result is detached",
    "weights are read through .data, which has no gradient",
    "the blocks before the last one run in inference mode, to save memory",
    needs=(BUILT, "image_features", "tower_parameters"),
)
def gradients_to_image_parameters(session: CheckSession) -> None:
    session.adapter.model.requires_grad_(True)
    named = list(session.adapter.tower_parameters("image"))
    pixels = session.pixels(1)
    features = session.encode(pixels)
    assert features.pooled is not None
    pooled = reached(features.pooled, named)
    patches = reached(features.patches, named)
    own = _library_reach(lambda: session.image_reference(session.adapter, pixels.to(session.dtype)), named)
    _expect_reach("the pooled embedding", pooled, own, named)
    if 2 * len(patches) < len(pooled):
        raise CheckFailed(
            f"gradients of patches reach most of the {len(pooled)} parameters that those of the pooled embedding reach",
            f"{len(patches)}, and not {shown(pooled - patches)}",
        )


def _library_reach(reference: Callable[[], Tensor | None], named: list[tuple[str, nn.Parameter]]) -> set[str] | None:
    """Return the parameters that gradients of the library's own embedding reach, or ``None`` without such embedding."""
    try:
        own = reference()
    except Exception:
        # The checks of the embeddings report it.
        return None
    return reached(own, named) if isinstance(own, Tensor) else None


def _expect_reach(what: str, found: set[str], own: set[str] | None, named: list[tuple[str, nn.Parameter]]) -> None:
    if own is not None:
        if own - found:
            expected = f"gradients of {what} reach every parameter that those of the library's embedding reach"
            raise CheckFailed(expected, f"no gradient for {shown(own - found)}")
    elif 2 * len(found) < len(named):
        missing = {name for name, _ in named} - found
        expected = f"gradients of {what} reach most of the {len(named)} parameters"
        raise CheckFailed(expected, f"{len(found)}, and not {shown(missing)}")


@check(
    "gradients of text embeddings reach the text tower's parameters, and are equal with activation checkpointing",
    "encode_text runs under torch.no_grad() or torch.inference_mode(), as for a frozen text tower",
    "word embeddings are read through .data or cached",
    "tower_blocks returns modules of the other tower, or blocks that modify their own state in a forward pass",
    needs=(BUILT, "text_features", "tower_parameters"),
)
def gradients_to_text_parameters(session: CheckSession) -> None:
    session.adapter.model.requires_grad_(True)
    named = list(session.adapter.tower_parameters("text"))
    tokens = session.tokens(TEXTS)
    ids = tokens.ids.to(session.adapter.device)
    found = reached(session.embed(ids), named)
    own = _library_reach(lambda: session.library_text(session.adapter, ids, text_mask(tokens)), named)
    _expect_reach("the embedding", found, own, named)
    _expect_blocks(session, ids, [parameter for _, parameter in named])


def _expect_blocks(session: CheckSession, ids: Tensor, parameters: list[nn.Parameter]) -> None:
    """Fail unless blocks belong to their tower, and text blocks support activation checkpointing."""
    names = {id(module): name for name, module in session.adapter.model.named_modules()}
    for tower in TOWERS:
        own = {id(parameter) for _, parameter in session.adapter.tower_parameters(tower)}
        for block in session.adapter.tower_blocks(tower):
            if id(block) not in names:
                raise CheckFailed("blocks that are modules of the model", f"another {type(block).__name__}")
            if any(id(parameter) not in own for parameter in block.parameters()):
                raise CheckFailed(
                    f"blocks of the {tower} tower", f"{names[id(block)]}, whose parameters belong elsewhere"
                )

    def gradient() -> Tensor:
        found = torch.autograd.grad(weighted(session.embed(ids)), parameters, allow_unused=True)
        complete = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return torch.cat([g.flatten().double() for g in complete])

    plain = gradient()
    with checkpointed_text_blocks(session.adapter):
        checkpointed = gradient()
    difference = float((checkpointed - plain).norm() / plain.norm())
    # In half precision sums are rounded, in an order that a GPU may choose.
    if not difference <= (1e-4 if session.dtype in (torch.float32, torch.float64) else 0.05):
        raise CheckFailed(
            "the same gradient with activation checkpointing in the text tower",
            f"a relative difference of {difference:.2g}",
        )


class _Reach:
    """Features of an adapter, and the parameters that gradients of each of them reach."""

    def __init__(self, session: CheckSession, adapter: DenseAdapter, size: tuple[int, int] | None = None) -> None:
        named = list(adapter.model.named_parameters())
        features = session.encode(session.pixels(size=size), adapter=adapter)
        assert features.pooled is not None
        texts = session.embed(session.tokens(TEXTS).ids, adapter=adapter)
        self.outputs = {"patches": features.patches, "pooled": features.pooled, "text embeddings": texts}
        self.reached = {what: reached(output, named) for what, output in self.outputs.items()}

    def lost(self, other: _Reach) -> tuple[str, set[str]] | None:
        """Return the first feature whose gradient reaches less in ``other``, and the lost parameters."""
        for what, names in self.reached.items():
            if names - other.reached[what]:
                return what, names - other.reached[what]
        return None


@check(
    "training mode without dropout and with frozen norms returns the features and gradients of evaluation mode",
    "encode_image or encode_text tests self.training, and computes another dense mode or another pooling",
    "a part of a tower runs under torch.no_grad() in training mode, to save memory",
    needs=(BUILT, "image_features", "text_features", "deterministic", "gradients_to_image_parameters"),
)
def training_mode(session: CheckSession) -> None:
    adapter, size = session.adapter, session.quick_size()
    adapter.model.requires_grad_(True)
    fill_zeros(adapter.model)
    without_randomness(adapter.model)
    evaluated = _Reach(session, adapter, size)
    adapter.train()
    without_randomness(adapter.model)
    trained, again = _Reach(session, adapter, size), _Reach(session, adapter, size)
    for what, output in trained.outputs.items():
        if distance(again.outputs[what], output) > session.tolerance:
            raise NotApplicable(f"{what} are random in training mode, also without dropout")
        session.expect_close(
            f"{what} in training and in evaluation mode",
            output,
            evaluated.outputs[what],
            tolerance=2 * session.tolerance,
        )
    lost = evaluated.lost(trained)
    if lost is not None:
        raise CheckFailed(
            f"gradients of {lost[0]} in training mode reach what they reach in evaluation mode", f"not {shown(lost[1])}"
        )


@check(
    "a first call under torch.inference_mode() does not disturb training afterwards, at any size",
    "a resampled position embedding, a mask or a text embedding is cached with the mode of its first call",
    "cached tensors are detached, so that their parameters get no gradient",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "deep_copy", "gradients_to_image_parameters"),
)
def trains_after_inference(session: CheckSession) -> None:
    fresh = copy.deepcopy(session.adapter)
    fill_zeros(fresh.model)
    fresh.model.requires_grad_(True)
    for size in _two_sizes(session):
        used = copy.deepcopy(fresh)
        with torch.inference_mode():
            session.encode(session.pixels(size=size), adapter=used)
            session.embed(session.tokens(TEXTS).ids, adapter=used)
        try:
            found = _Reach(session, used, size)
        except CheckFailed:
            raise
        except RuntimeError as error:
            raise CheckFailed(f"gradients at {size} after a call in inference mode", error_text(error)) from error
        lost = _Reach(session, copy.deepcopy(fresh), size).lost(found)
        if lost is not None:
            raise CheckFailed(
                f"gradients of {lost[0]} at {size} after a call in inference mode as before it",
                f"not for {shown(lost[1])}",
            )
    # Parameters that take part at the preferred size take part at others.
    first, *others = _two_sizes(session)
    for size in others:
        lost = _Reach(session, fresh, first).lost(_Reach(session, fresh, size))
        if lost is not None:
            raise CheckFailed(
                f"gradients of {lost[0]} at {size} reach what they reach at {first}", f"not {shown(lost[1])}"
            )


def _two_sizes(session: CheckSession) -> list[tuple[int, int]]:
    return [session.description.image_size, *session.sizes()[:1]]


@check(
    "after the weights change, features and text embeddings are those of the new weights",
    "features, text embeddings or resampled position embeddings are cached and never refreshed",
    "a weight or a block is copied when the adapter is created, or at the first call",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "deep_copy"),
)
def new_weights_count(session: CheckSession) -> None:
    used, fresh = session.adapter, copy.deepcopy(session.adapter)
    ids = session.tokens(TEXTS).ids
    sizes = _two_sizes(session)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for size in sizes:
                session.encode(session.pixels(size=size))
            session.embed(ids)
    kept = copied_weights(used)
    if kept:
        raise CheckFailed("an adapter without copies of its model's weights", f"{kept[0]} has the values of {kept[1]}")
    perturb(used.model)
    perturb(fresh.model)
    with torch.no_grad():
        for size in sizes:
            found, wanted = (
                session.encode(session.pixels(size=size)),
                session.encode(session.pixels(size=size), adapter=fresh),
            )
            assert found.pooled is not None
            assert wanted.pooled is not None
            session.expect_close(f"patches at {size} after the weights changed", found.patches, wanted.patches)
            session.expect_close(f"pooled at {size} after the weights changed", found.pooled, wanted.pooled)
        session.expect_close(
            "text embeddings after the weights changed", session.embed(ids), session.embed(ids, adapter=fresh)
        )
        if session.run("pooled_matches_library").status == "passed":
            own = session.image_reference(used, session.pixels().to(session.dtype))
            pooled = session.encode(session.pixels()).pooled
            assert own is not None
            assert pooled is not None
            compare_with_library(session, "the pooled embedding after the weights changed", pooled, own)


@check(
    "set_grad_checkpointing(True) makes blocks run again in the backward pass and changes no gradient",
    "the method is overridden and does nothing; leave it to the contract, or raise UnsupportedModelError",
    "encode_image calls parts of blocks, around the library's own checkpointing",
    needs=(BUILT, "training_mode"),
)
def grad_checkpointing(session: CheckSession) -> None:
    adapter, size = session.adapter, session.quick_size()
    adapter.model.requires_grad_(True)
    adapter.train()
    without_randomness(adapter.model)
    plain, calls = _gradients(session, size)
    try:
        adapter.set_grad_checkpointing(True)
    except UnsupportedModelError as error:
        raise NotApplicable("the model has no switch for activation checkpointing") from error
    except Exception as error:
        if type(adapter).set_grad_checkpointing is DenseAdapter.set_grad_checkpointing:
            raise NotApplicable(f"the model's own switch fails ({error_text(error)})") from error
        raise CheckFailed("an UnsupportedModelError where the model has no switch", error_text(error)) from error
    checkpointed, more = _gradients(session, size)
    for what, gradient in plain.items():
        session.expect_close(
            f"{what} with activation checkpointing", checkpointed[what], gradient, tolerance=10 * session.tolerance
        )
    if type(adapter).set_grad_checkpointing is not DenseAdapter.set_grad_checkpointing and more <= calls:
        raise CheckFailed("modules that run again in the backward pass", "no module runs again")
    adapter.set_grad_checkpointing(False)
    if _gradients(session, size)[1] > calls:
        raise CheckFailed("no activation checkpointing after set_grad_checkpointing(False)", "modules that run again")


def _gradients(session: CheckSession, size: tuple[int, int]) -> tuple[dict[str, Tensor], int]:
    """Return gradients of both towers, flattened, and the number of calls of modules in forward and backward."""
    found: dict[str, Tensor] = {}
    with forward_calls() as calls:
        features = session.encode(session.pixels(size=size))
        assert features.pooled is not None
        texts = session.embed(session.tokens(TEXTS).ids)
        for tower, output in (
            ("image", weighted(features.patches) + weighted(features.pooled)),
            ("text", weighted(texts)),
        ):
            parameters = [p for _, p in session.adapter.tower_parameters(tower)]  # type: ignore[arg-type]
            gradients = torch.autograd.grad(output, parameters, allow_unused=True)
            found[f"gradients of the {tower} tower"] = torch.cat([g.flatten() for g in gradients if g is not None])
    return found, len(calls)
