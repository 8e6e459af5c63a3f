"""Checks of the adapter's family, description, calibration and logits."""

from __future__ import annotations

import contextlib
import math
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import (
    API_VERSION,
    SUPPORTED_API_VERSIONS,
    TOWERS,
    AdapterFamily,
    BackboneDescription,
    Calibration,
)
from ttd_plugins.errors import AdapterConflictError, BackboneNameError, PluginError, TTDError
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.probes import reached
from ttd_plugins.utils.rng import preserved_rng

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

SMALL = "tiny"
"""Name of the small model that shipped families have."""
SIZE_NAMES = ("image_size", "img_size", "input_size", "grid", "grid_size", "feat_size")
"""Attributes by which libraries state the size or the grid of images."""
LARGEST_LOGARITHM = math.log(100)
"""CLIP models clip their logit scale at 100, so a smaller scale that is stored as it is may be a logarithm."""


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
    "a non-square preferred size is (height, width), as the model's position embeddings and settings are",
    "image_size is passed on from a library that says (width, height)",
    needs=(BUILT, "image_features", "description"),
)
def preferred_size(session: CheckSession) -> None:
    height, width = session.description.image_size
    grid = session.grid(height, width)
    if grid is None or (grid[0] == grid[1] and height == width):
        raise NotApplicable("the preferred size is square")
    right, wrong = _stated_sizes(session, (height, width), grid)
    if wrong and not right:
        raise CheckFailed(f"an image_size in the order of {wrong[0]}", f"{(height, width)}, which is reversed")
    _expect_own_positions(session, grid)


def _stated_sizes(session: CheckSession, size: tuple[int, int], grid: tuple[int, int]) -> tuple[list[str], list[str]]:
    """Return attributes of the model that state the size or grid of images in the same and in the reversed order."""
    same: list[str] = []
    reversed_: list[str] = []
    for name, module in session.adapter.model.named_modules():
        for key, value in vars(module).items():
            if key not in SIZE_NAMES or not isinstance(value, tuple | list) or len(value) != 2:
                continue
            where = f"{name}.{key} = {tuple(value)}".lstrip(".")
            if tuple(value) in (size, grid):
                same.append(where)
            elif tuple(value)[::-1] in (size, grid):
                reversed_.append(where)
    return same, reversed_


def _expect_own_positions(session: CheckSession, grid: tuple[int, int]) -> None:
    """Fail if a table with one position for each patch is resampled at the preferred size."""
    rows, columns = grid
    named = dict(session.adapter.tower_parameters("image"))
    for name, table in named.items():
        axis = next((a for a, n in enumerate(table.shape) if 0 <= n - rows * columns <= 16), None)
        if table.ndim not in (2, 3) or axis is None or table.numel() != table.shape[axis] * table.shape[-1]:
            continue
        prefix = table.shape[axis] - rows * columns
        pixels, moved = session.pixels(1), []
        with torch.no_grad():
            before = session.encode(pixels, pooled=False).patches
            for index in range(rows * columns):
                old = table.detach().clone()
                table.select(axis, prefix + index).add_(3 * table.std())
                change = (session.encode(pixels, pooled=False).patches - before).float().norm(dim=-1)
                moved.append(divmod(int(change.flatten().argmax()), columns) == divmod(index, columns))
                table.copy_(old)
        if sum(moved) < len(moved) / 2:
            raise CheckFailed(
                f"position {prefix} + i of {name} moves patch i most at the preferred size {grid[0]} x {grid[1]}",
                f"{sum(moved)} of {len(moved)} positions do, as if the table were resampled",
            )


@check(
    "the adapter's own family claims the model object, no other family does, and it claims no small model of another",
    "claims() tests attributes that many libraries have, such as visual or encode_image",
    "claims() raises an exception for an object without the attributes of the family",
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
    for what, other in {**_odd_objects(), **small_models()}.items():
        if what == family.name or other is None:
            continue
        try:
            claimed = family.claims(other)
        except Exception as error:
            raise CheckFailed(f"claims() returns False for {what}", error_text(error)) from error
        if claimed:
            raise CheckFailed(f"family {family.name!r} does not claim {what}", "it does")


def _odd_objects() -> dict[str, object]:
    class Both(nn.Module):
        """Has what most CLIP models have, and nothing of any library."""

        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text, self.logit_scale = nn.Identity(), nn.Identity(), nn.Parameter(torch.zeros(()))

        def encode_image(self, pixels: Tensor) -> Tensor:
            return pixels

        def encode_text(self, ids: Tensor) -> Tensor:
            return ids

    return {"a linear layer": nn.Linear(2, 2), "an empty module": nn.Module(), "an unknown CLIP model": Both()}


@cache
def small_models() -> dict[str, nn.Module | None]:
    """Return the small random model of each installed family of ours, by its name; built once in a process."""
    from ttd_plugins.plugins import families, list_plugins, load

    shipped = {name for plugin in list_plugins() if plugin.distribution == "ttd-plugins" for name in plugin.families}
    found: dict[str, nn.Module | None] = {}
    for name, family in families().items():
        with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
            if name in shipped and SMALL in family.models():
                with preserved_rng():
                    found[name] = load(f"{name}:{SMALL}@random").model
    return found


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
    "the model has a logit bias, and logit_bias() is not overridden",
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
    _expect_exponentiated(session)
    if session.description.logits == "sigmoid" and bias is None:
        raise CheckFailed("a logit bias, since logits are sigmoid", "None")
    if bias is not None and (not isinstance(bias, Tensor) or bias.ndim != 0 or not torch.isfinite(bias)):
        raise CheckFailed("logit_bias() is a finite scalar tensor or None", _value(bias))
    _expect_stored_bias(session, bias)


def _expect_exponentiated(session: CheckSession) -> None:
    """Fail if the scale is a stored logarithm under any name, its double exponential, or cut off from its parameter."""
    scalars = {name: p for name, p in session.adapter.model.named_parameters() if p.numel() == 1}
    session.adapter.model.requires_grad_(True)
    scale = session.adapter.logit_scale()
    sources = reached(scale, list(scalars.items()))
    value, close = float(scale.detach()), max(session.tolerance, 1e-6)
    for name, parameter in scalars.items():
        stored = float(parameter.detach())
        exponential = math.exp(stored) if stored < 50 else math.inf
        # A temperature of one equals its reciprocal, but not in its slope.
        slope = float(torch.autograd.grad(scale, parameter, retain_graph=True)[0]) if name in sources else 0.0
        is_stored = abs(value - stored) <= close * abs(stored) and abs(slope - 1) <= close
        if is_stored and 0 < stored <= LARGEST_LOGARITHM:
            raise CheckFailed(f"the exponential of {name}, {exponential:.6g}", f"its stored value, {value:.6g}")
        if name in sources and exponential < 50 and abs(value - math.exp(exponential)) <= close * value:
            raise CheckFailed(f"the exponential of {name}, {exponential:.6g}", f"{value:.6g}, the exponential of that")
        if not sources and abs(value - exponential) <= close * value and stored != 0:
            raise CheckFailed(f"a scale with a gradient for {name}", "a scale that is detached from it")


def _expect_stored_bias(session: CheckSession, bias: Tensor | None) -> None:
    """Fail if the model stores a bias of logits that logit_bias() does not return."""
    adapter = session.adapter
    towers = {name for tower in TOWERS for name, _ in adapter.tower_parameters(tower)}
    for name, parameter in adapter.model.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.numel() != 1 or name in towers or not ("bias" in last and ("logit" in name or "." not in name)):
            continue
        if bias is None or abs(float(bias.detach()) - float(parameter.detach())) > 1e-3 * (
            1 + abs(float(parameter.detach()))
        ):
            raise CheckFailed(f"logit_bias() is the model's {name}, {float(parameter.detach()):.6g}", _value(bias))


def _value(found: object) -> str:
    if isinstance(found, Tensor):
        return f"shape {tuple(found.shape)}" if found.ndim else f"{float(found.detach()):.6g}"
    return f"a {type(found).__name__}"
