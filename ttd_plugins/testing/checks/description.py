"""Checks of the adapter's family, description, calibration and logits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import API_VERSION, SUPPORTED_API_VERSIONS, AdapterFamily, BackboneDescription, Calibration
from ttd_plugins.errors import AdapterConflictError, BackboneNameError, PluginError, TTDError
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


def _family(session: CheckSession) -> AdapterFamily:
    """Return the registered family; raises NotApplicable if there is none, and PluginError if it was refused."""
    from ttd_plugins.plugins import get_family

    name = session.family
    if name is None:
        raise NotApplicable("the name of the family is unknown")
    try:
        return get_family(name)
    except AdapterConflictError as error:
        raise NotApplicable(f"family {name!r} is registered more than once") from error
    except BackboneNameError as error:
        raise NotApplicable(f"no installed plugin registers a family {name!r}") from error


@check(
    "the family states a contract version that this release supports",
    "the class of the family does not set api_version, so that it claims whatever version is installed",
    "the adapter was written for another release of ttd-plugins; docs/contract.md lists the changes",
)
def api_version(session: CheckSession) -> None:
    expected = f"api_version = {' or '.join(map(str, SUPPORTED_API_VERSIONS))} in the class of the family"
    try:
        family = _family(session)
    except PluginError as error:
        raise CheckFailed(expected, error_text(error)) from error
    own = [kind for kind in type(family).__mro__ if kind is not AdapterFamily and "api_version" in vars(kind)]
    if not own and "api_version" not in vars(family):
        raise CheckFailed(expected, f"{type(family).__name__} sets none and inherits {API_VERSION}")
    if family.api_version not in SUPPORTED_API_VERSIONS:
        raise CheckFailed(expected, f"api_version = {family.api_version!r}")


@check(
    "exactly one plugin registers the family's name",
    "two installed distributions provide the same family, for instance an old and a new name of one package",
    "an entry point is declared twice under two names",
)
def registered_once(session: CheckSession) -> None:
    from ttd_plugins.plugins import get_family

    if session.family is None:
        raise NotApplicable("the name of the family is unknown")
    try:
        get_family(session.family)
    except AdapterConflictError as error:
        raise CheckFailed(f"one plugin that registers family {session.family!r}", error_text(error)) from error
    except BackboneNameError as error:
        raise NotApplicable(f"no installed plugin registers a family {session.family!r}") from error
    except PluginError:
        return  # the check api_version reports other reasons


@check(
    "make_adapter returns a DenseAdapter around a torch module",
    "a library that the family needs is not installed, or has another version",
    "load() or wrap() of the family raises an exception, or returns the model instead of an adapter",
)
def adapter_is_built(session: CheckSession) -> None:
    try:
        session.adapter  # noqa: B018
    except CheckFailed:
        for other in ("api_version", "registered_once"):
            if session.run(other).status == "failed":
                raise NotApplicable(f"it depends on {other}") from None
        raise
    if next(session.adapter.model.parameters(), None) is None:
        raise CheckFailed("a model with parameters", "a model without parameters")


@check(
    "the description has correct types and finite values, fits its own patch grid and does not change",
    "a value is passed on from the library as a tensor, a list or a number instead of a tuple",
    "image_size is the side of a crop that is not a multiple of the patch size",
    "mean and std refer to pixels from 0 to 255",
    needs=(BUILT,),
)
def description(session: CheckSession) -> None:
    found = session.adapter.description
    if not isinstance(found, BackboneDescription):
        raise CheckFailed("a BackboneDescription", f"a {type(found).__name__}")
    for name in ("family", "model", "dense_mode"):
        value = getattr(found, name)
        if not isinstance(value, str) or not value:
            raise CheckFailed(f"{name} is a non-empty string", repr(value))
    for name in ("embedding_width", "context_length"):
        _whole(name, getattr(found, name))
    for name in ("patch_size", "image_size"):
        value = getattr(found, name)
        if not isinstance(value, tuple) or len(value) != 2:
            raise CheckFailed(f"{name} is a tuple (height, width)", repr(value))
        for side in value:
            _whole(name, side)
    for name in ("mean", "std"):
        value = getattr(found, name)
        if not isinstance(value, tuple) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
            raise CheckFailed(f"{name} is a tuple of three numbers", repr(value))
        # For pixels in [0, 1], no mean and no standard deviation exceeds 1.
        if not all(math.isfinite(v) and 0 <= v <= 1 and (name == "mean" or v > 0) for v in value):
            raise CheckFailed(f"{name} for pixels in [0, 1]", repr(value))
    known: dict[str, tuple[Any, ...]] = {
        "interpolation": ("bicubic", "bilinear"),
        "logits": ("softmax", "sigmoid"),
        "text_needs_full_context": (True, False),
    }
    for name, values in known.items():
        if getattr(found, name) not in values:
            raise CheckFailed(f"{name} is one of {', '.join(map(repr, values))}", repr(getattr(found, name)))
    grid = session.adapter.patch_grid(*found.image_size)
    if not isinstance(grid, tuple) or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise CheckFailed("patch_grid of the preferred size returns rows and columns", repr(grid))
    if session.adapter.description != found:
        raise CheckFailed("the same description in every call", "two calls that differ")


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckFailed(f"{name} is a positive integer", repr(value))


@check(
    "the adapter's own family claims the model object, and no other family does",
    "claims() tests attributes that many libraries have, such as visual or encode_image",
    "two plugins serve the same library; their claims must differ by structure",
    "claims() of the family returns False for its own models",
    needs=(BUILT, "description", "registered_once"),
)
def claimed_by_one_family(session: CheckSession) -> None:
    from ttd_plugins.plugins import family_for_model

    family = _family(session)
    expected = f"family {family.name!r} claims the model object, and no other family does"
    try:
        taker = family_for_model(session.adapter.model)
    except TTDError as error:
        raise CheckFailed(expected, error_text(error)) from error
    if taker != family.name:
        raise CheckFailed(expected, f"family {taker!r} claims it")


@check(
    "the description has a calibration with a finite positive scale and a finite shift",
    "the family passes on calibration=None instead of Calibration()",
    "shift and scale are exchanged, or the probability decreases with the cosine",
    needs=(BUILT, "description"),
)
def calibration(session: CheckSession) -> None:
    found = session.description.calibration
    if not isinstance(found, Calibration):
        raise CheckFailed("a Calibration", f"a {type(found).__name__}")
    numbers = (found.scale, found.shift)
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) or found.scale <= 0:
        raise CheckFailed("a finite positive scale and a finite shift", f"scale {found.scale}, shift {found.shift}")


@check(
    "logit_scale() is an exponentiated scalar, and logit_bias() is a scalar for sigmoid logits and otherwise None",
    "the model stores the logarithm of the scale, and exp() is missing or applied twice",
    "the library stores the scale or the bias with shape [1]; reshape(()) makes it a scalar",
    needs=(BUILT, "description"),
)
def logits(session: CheckSession) -> None:
    scale, bias = session.adapter.logit_scale(), session.adapter.logit_bias()
    if not isinstance(scale, Tensor) or scale.ndim != 0 or not torch.isfinite(scale) or scale <= 0:
        raise CheckFailed("logit_scale() is a finite positive scalar tensor", _value(scale))
    stored = getattr(session.adapter.model, "logit_scale", None)
    if isinstance(stored, Tensor) and stored.numel() == 1:
        own = float(stored.detach().double().exp())
        if abs(float(scale.detach()) - own) > session.tolerance * own:
            raise CheckFailed(f"the exponential of the model's logit_scale, {own:.6g}", _value(scale))
    if session.description.logits == "sigmoid" and bias is None:
        raise CheckFailed("a logit bias, since logits are sigmoid", "None")
    if bias is not None and (not isinstance(bias, Tensor) or bias.ndim != 0 or not torch.isfinite(bias)):
        raise CheckFailed("logit_bias() is a finite scalar tensor or None", _value(bias))


def _value(found: object) -> str:
    if isinstance(found, Tensor):
        return f"shape {tuple(found.shape)}" if found.ndim else f"{float(found.detach()):.6g}"
    return f"a {type(found).__name__}"
