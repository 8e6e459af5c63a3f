"""Checks that patches end in the layers that map the pooled embedding into the joint space.

All comparisons are of gradients. If multiplying a row of the last weight multiplies a channel of the pooled embedding,
adding to the last bias adds to a channel, or a change of a norm's scale is undone by the weight after it, then the same
must hold for patches: they pass the same layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.testing.check_session import BUILT, CheckSession
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.probes import fill_zeros, is_small

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

MAX_LENGTH_RATIO = 100.0
"""Largest ratio between mean lengths of patch features, pooled and text embeddings of one joint space."""
CENTRED = 1e-3
"""Largest length of the mean of an image's patches, relative to their mean length, that means centring."""


@check(
    "patches pass the last layers of the pooled embedding, and lengths in the joint space are comparable",
    "patches are taken before the projection into the joint space, whose width happens to be equal",
    "patches pass the projection without its bias or without the final LayerNorm, or another head",
    "the map is centred, negated or scaled after the projection",
    needs=(
        BUILT,
        "image_features",
        "text_features",
        "not_normalised",
        "deterministic",
        "batch_independent",
        "deep_copy",
        "gradients_to_image_parameters",
    ),
)
def joint_space(session: CheckSession) -> None:
    pixels = session.pixels(size=session.quick_size())
    with torch.no_grad():
        features = session.encode(pixels)
        texts = session.embed(session.tokens(["a dog", "two cats on grass", "sky"]).ids)
    assert features.pooled is not None
    _expect_lengths(session, features.patches, features.pooled, texts)
    _expect_scale(session, features.patches, features.pooled)
    layers = LastLayers(*_exact_copy(session, pixels))
    layers.expect_projection()
    layers.expect_bias()
    layers.expect_norms()


def _expect_lengths(session: CheckSession, patches: Tensor, pooled: Tensor, texts: Tensor) -> None:
    # Embeddings equal to the library's define the joint space, whatever their lengths; random weights vary much.
    own = all(session.run(name).status == "passed" for name in ("pooled_matches_library", "text_matches_library"))
    lengths = {
        name: float(tensor.double().norm(dim=-1).mean())
        for name, tensor in (("patches", patches), ("pooled", pooled), ("text", texts))
    }
    for name in ("patches",) if own else ("patches", "text"):
        ratio = lengths[name] / max(lengths["pooled"], 1e-30)
        if not 1 / MAX_LENGTH_RATIO < ratio < MAX_LENGTH_RATIO:
            raise CheckFailed(
                f"a mean length of {name} within a factor of {MAX_LENGTH_RATIO:g} of that of pooled embeddings",
                f"{lengths[name]:.3g} against {lengths['pooled']:.3g}",
            )
    if patches.shape[1] * patches.shape[2] > 1:
        centre = float((patches.double().mean((1, 2)).norm(dim=-1)).max())
        if centre < CENTRED * lengths["patches"]:
            raise CheckFailed("patches as the last layer returns them", "patches whose mean in every image is zero")


def _expect_scale(session: CheckSession, patches: Tensor, pooled: Tensor) -> None:
    """Fail if the mean of patches is the pooled embedding times a factor: a tower that averages has no such factor."""
    if session.dtype not in (torch.float32, torch.float64):
        return  # Rounding hides what exactly is parallel.
    mean, own = patches.double().mean((1, 2)), pooled.double()
    cosines = nn.functional.cosine_similarity(mean, own, dim=-1)
    if float((cosines.abs() - 1).abs().max()) > max(session.tolerance**2, 1e-7):
        return
    factor = float(((mean * own).sum(-1) / own.square().sum(-1)).mean())
    if abs(factor - 1) > 10 * session.tolerance:
        raise CheckFailed(
            "a mean of patches that equals the pooled embedding, since they have one direction",
            f"the pooled embedding times {factor:.3g}",
        )


def _exact_copy(session: CheckSession, pixels: Tensor) -> tuple[DenseAdapter, Tensor, float]:
    """Return a copy of the adapter without weights of zero, in float64 if possible, and the tolerance of gradients."""
    wide = is_small(session) and session.adapter.device.type != "mps"
    adapter = copy.deepcopy(session.adapter)
    fill_zeros(adapter.model)
    if wide:
        try:
            adapter = adapter.double()
            with torch.no_grad():
                found = adapter.encode_image(pixels[:1].double())
            if found.patches.dtype == torch.float64 and found.pooled is not None:
                return adapter, pixels.double(), 1e-3
        except Exception:
            adapter = copy.deepcopy(session.adapter)
            fill_zeros(adapter.model)
    if session.dtype not in (torch.float32, torch.float64):
        raise NotApplicable(f"the comparison needs float32, and the adapter returns {session.dtype} only")
    return adapter, pixels, max(10 * session.tolerance, 2e-3)


class LastLayers:
    """Gradients of the pooled embedding and of patches with respect to all parameters, along one random direction."""

    def __init__(self, adapter: DenseAdapter, pixels: Tensor, tolerance: float) -> None:
        model = adapter.model.requires_grad_(True)
        features = adapter.encode_image(pixels)
        assert features.pooled is not None
        self.model = model
        self.tolerance = tolerance
        self.named = dict(model.named_parameters())
        self.features = {"pooled": features.pooled, "patches": features.patches.flatten(0, 2)}
        width = features.pooled.shape[-1]
        self.direction = (torch.rand(width, generator=torch.Generator().manual_seed(3)) + 0.5).to(features.pooled)
        self.direction[1::2] *= -1
        self.gradients = {name: self._gradient(tensor) for name, tensor in self.features.items()}
        # Vectors of one gradient are equal by chance only if both are tiny.
        self.finals: list[tuple[str, int]] = []

    def _gradient(self, features: Tensor) -> dict[str, Tensor]:
        total = (features * self.direction).sum()
        found = torch.autograd.grad(total, list(self.named.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.named.items(), found, strict=True)}

    def _close(self, a: Tensor, b: Tensor, slack: float = 1.0) -> bool:
        size = max(float(a.abs().max()), float(b.abs().max()))
        return float((a - b).abs().max()) <= slack * self.tolerance * size if size > 0 else True

    def _scaled(self, what: str, name: str, axis: int) -> Tensor:
        """Return, for each index along an axis of a parameter, its product with its gradient."""
        product = self.named[name].detach() * self.gradients[what][name]
        return product.movedim(axis, 0).flatten(1).sum(1) if product.ndim > 1 else product

    def _bias(self, name: str) -> str | None:
        """Return the name of the only other parameter of a parameter's module, if it is a vector."""
        prefix, _, _ = name.rpartition(".")
        own = [n for n in self.named if n.rpartition(".")[0] == prefix and n != name]
        return own[0] if prefix and len(own) == 1 and self.named[own[0]].ndim == 1 else None

    def expect_projection(self) -> None:
        """Fail unless patches are linear in the weights in which the pooled embedding is, channel by channel."""
        width = len(self.direction)
        for name, parameter in self.named.items():
            for axis in range(parameter.ndim if parameter.ndim > 1 else 0):
                if parameter.shape[axis] != width:
                    continue
                found = {what: self._projected(what, name, axis) for what in self.features}
                wanted = {what: tensor.detach().sum(0) * self.direction for what, tensor in self.features.items()}
                if not self._close(found["pooled"], wanted["pooled"]):
                    continue
                self.finals.append((name, axis))
                if self._close(found["patches"], wanted["patches"], 10):
                    continue
                unused = not bool(self.gradients["patches"][name].any())
                total = float(found["patches"].sum() / wanted["patches"].sum())
                seen = "patches do not depend on it" if unused else "patches depend on it in another way"
                if not unused and abs(total - 1) < 0.02:
                    seen = "the channels of patches depend on other channels of it"
                bias = self._bias(name)
                both = name if bias is None or self.named[bias].shape != (width,) else f"{name} and {bias}"
                raise CheckFailed(
                    f"{both}, which projects pooled embeddings into the joint space, projects patches too", seen
                )

    def _projected(self, what: str, name: str, axis: int) -> Tensor:
        found = self._scaled(what, name, axis)
        bias = self._bias(name)
        if bias is not None and self.named[bias].shape == found.shape:
            found = found + self._scaled(what, bias, 0)
        return found

    def expect_bias(self) -> None:
        """Fail unless vectors added to the pooled embedding, or before its last weight, are added to patches."""
        one = {what: self.direction * len(tensor) for what, tensor in self.features.items()}
        for name, parameter in self.named.items():
            if parameter.ndim != 1:
                continue
            for wanted, where in self._additions(parameter, one):
                if not self._close(self.gradients["pooled"][name], wanted["pooled"]):
                    continue
                if not self._close(self.gradients["patches"][name], wanted["patches"], 10):
                    unused = not bool(self.gradients["patches"][name].any())
                    raise CheckFailed(
                        f"{name}, which is added to pooled embeddings{where}, is added to patches too",
                        "patches do not depend on it" if unused else "patches depend on it in another way",
                    )

    def _additions(self, parameter: nn.Parameter, one: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
        if parameter.shape == self.direction.shape:
            yield one, ""
        for name, axis in self.finals:
            weight = self.named[name].detach()
            if weight.ndim != 2 or weight.shape[1 - axis] != len(parameter):
                continue
            matrix = weight if axis == 0 else weight.T
            yield {what: matrix.T @ vector for what, vector in one.items()}, f" before {name}"

    def expect_norms(self) -> None:
        """Fail unless each norm whose scale the next weight can undo in the pooled embedding is so for patches too."""
        weights: dict[int, list[tuple[str, int]]] = {}
        for name, parameter in self.named.items():
            for axis in (
                range(1, parameter.ndim) if parameter.ndim > 2 else range(parameter.ndim if parameter.ndim > 1 else 0)
            ):
                weights.setdefault(parameter.shape[axis], []).append((name, axis))
        products: dict[tuple[str, str, int], Tensor] = {}

        def product(what: str, name: str, axis: int) -> Tensor:
            key = what, name, axis
            if key not in products:
                products[key] = self._scaled(what, name, axis)
            return products[key]

        for name, parameter in self.named.items():
            if parameter.ndim != 1 or not name.endswith("weight") or len(parameter) < 4:
                continue
            bias = self._bias(name)
            own = {what: self._scaled(what, name, 0) for what in self.features}
            if bias is not None and self.named[bias].shape == parameter.shape:
                own = {what: tensor + self._scaled(what, bias, 0) for what, tensor in own.items()}
            if not bool(own["pooled"].any()):
                continue
            for other, axis in weights.get(len(parameter), []):
                if not self._close(own["pooled"], product("pooled", other, axis)):
                    continue
                theirs = product("patches", other, axis)
                if not self._close(own["patches"], theirs, 10):
                    raise CheckFailed(
                        f"patches pass {name.rpartition('.')[0]} before {other}, as pooled embeddings do",
                        "patches do not depend on the norm" if not bool(own["patches"].any())
                        else "patches do not depend on the weight" if not bool(theirs.any())
                        else "patches depend on the two in another way",
                    )  # fmt: skip
