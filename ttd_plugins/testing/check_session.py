"""Run checks on one adapter: each on its own, whatever it raises, everything as found afterwards."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import BackboneDescription, DenseAdapter, ImageFeatures, Tokens
from ttd_plugins.errors import InputError, choices_sentence, one_sentence
from ttd_plugins.testing.check_types import Check, CheckFailed, CheckResult, NotApplicable, Report
from ttd_plugins.testing.module_snapshot import ModuleSnapshot, kept_random_state

SEED = 20240400
BUILT = "adapter_is_built"
# Relative to the largest value. Accelerators multiply float32 in fewer bits.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
ACCELERATOR = 4e-3

Reference = Callable[[DenseAdapter, Tensor], "Tensor | None"]


def library_image_embedding(adapter: DenseAdapter, pixels: Tensor) -> Tensor | None:
    """The library's own image embedding ``[B, D]``: ``model.encode_image`` or ``model.get_image_features``.

    ``None`` where the model has neither; a conformance class overrides it then.
    """
    return _library_embedding(adapter.model, ("encode_image", "get_image_features"), pixels)


def library_text_embedding(adapter: DenseAdapter, ids: Tensor) -> Tensor | None:
    """The library's own text embedding ``[N, D]`` of whole rows: ``model.encode_text`` or ``get_text_features``."""
    return _library_embedding(adapter.model, ("encode_text", "get_text_features"), ids)


def _library_embedding(model: Any, names: tuple[str, str], given: Tensor) -> Tensor | None:
    for name in names:
        function = getattr(model, name, None)
        if callable(function):
            found = function(given)
            found = getattr(found, "pooler_output", found)
            return found[0] if isinstance(found, tuple) else found
    return None


class Session:
    """One adapter under test, and what the checks share.

    Args:
        make_adapter: builds the adapter; called once, when a check first needs it.
        family: name of the family that the adapter should belong to; by default the one that it states.
        not_applicable: names of checks that cannot be passed for a good reason, with the reason.
        image_reference, text_reference: the library's own embeddings; see :func:`library_image_embedding`.
    """

    def __init__(
        self,
        make_adapter: Callable[[], DenseAdapter],
        *,
        family: str | None = None,
        not_applicable: Mapping[str, str] | None = None,
        image_reference: Reference | None = None,
        text_reference: Reference | None = None,
    ) -> None:
        from ttd_plugins.testing.all_checks import CHECKS

        self.checks: dict[str, Check] = {check.name: check for check in CHECKS}
        self.not_applicable = dict(not_applicable or {})
        for name in self.not_applicable:
            if name not in self.checks:
                raise InputError(choices_sentence("check", name, self.checks))
        self.given_family = family
        self.image_reference = image_reference or library_image_embedding
        self.text_reference = text_reference or library_text_embedding
        self._make = make_adapter
        self._adapter: DenseAdapter | None = None
        self._problem: BaseException | None = None
        self._results: dict[str, CheckResult] = {}
        self._keeper: ModuleSnapshot | None = None
        self._native: ImageFeatures | None = None
        self._meta: DenseAdapter | None = None

    # The adapter and inputs for it -----------------------------------------------------------------------------------

    @property
    def adapter(self) -> DenseAdapter:
        """The adapter under test, in evaluation mode while a check runs.

        Raises:
            CheckFailed: it cannot be built.
        """
        if self._adapter is None and self._problem is None:
            try:
                made = self._make()
                if not isinstance(made, DenseAdapter):
                    raise TypeError(f"it returned a {type(made).__name__}")
                if not isinstance(made.model, torch.nn.Module):
                    raise TypeError(f"its model is a {type(made.model).__name__}")
                self._adapter = made
            except (Exception, SystemExit) as error:
                self._problem = error
        if self._adapter is None:
            assert self._problem is not None
            raise CheckFailed("a DenseAdapter around a model", said(self._problem))
        return self._adapter

    @property
    def description(self) -> BackboneDescription:
        """The adapter's description; the check of that name has been through it."""
        return self.adapter.description

    @property
    def family(self) -> str | None:
        """Name of the family, or ``None`` where nothing tells."""
        if self.given_family is not None:
            return self.given_family
        try:
            name = self.adapter.description.family
        except (Exception, SystemExit):
            return None
        return name if isinstance(name, str) else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model: that of most of its parameters."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.adapter.model.parameters():
            if parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    @property
    def tolerance(self) -> float:
        """How far apart, relative to the largest value, equal computations may be."""
        found = TOLERANCES.get(self.dtype, 8e-2)
        return found if self.adapter.device.type == "cpu" else max(found, ACCELERATOR)

    def sizes(self) -> list[tuple[int, int]]:
        """Input sizes other than the preferred one for which the adapter's ``patch_grid`` has an answer."""
        rows, columns = self.description.patch_size
        height, width = self.description.image_size
        native = (max(height // rows, 1), max(width // columns, 1))
        grids = [(4, 6), (6, 4), (native[0], native[1] + 1), (native[0] + 2, native[1]), (2, 2)]
        sizes = [(down * rows, across * columns) for down, across in grids]
        return [size for size in sizes if size != (height, width) and self.grid(*size) is not None]

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Rows and columns of the patch grid at a size, or ``None`` where the adapter refuses the size."""
        from ttd_plugins.errors import ImageSizeError

        try:
            return self.adapter.patch_grid(height, width)
        except ImageSizeError:
            return None

    def pixels(self, count: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
        """Random normalised images ``[count, 3, height, width]``, float32, on the adapter's device."""
        height, width = size or self.description.image_size
        generator = torch.Generator().manual_seed(SEED + seed)
        return torch.randn(count, 3, height, width, generator=generator).to(self.adapter.device)

    def quick_size(self) -> tuple[int, int]:
        """A small size for checks that do not depend on it: large models take long at their own."""
        native = self.description.image_size
        rows, columns = self.description.patch_size
        small = [size for size in self.sizes() if 9 * rows * columns <= size[0] * size[1] < native[0] * native[1]]
        # A size that does not work is the finding of that check alone.
        if not small or self.run("other_sizes").status != "passed":
            return native
        return min(small, key=lambda size: size[0] * size[1])

    def native_features(self) -> ImageFeatures:
        """Features of :meth:`pixels` by the adapter as it was found, without gradient, computed once.

        For checks that build on ``deterministic``: they must not change them.
        """
        if self._native is None:
            with torch.no_grad():
                self._native = self.encode(self.pixels())
        return self._native

    def on_meta(self) -> DenseAdapter:
        """A copy of the adapter without weights, on the meta device."""
        if self._meta is None:
            self._meta = copy.deepcopy(self.adapter).to("meta")
        return copy.deepcopy(self._meta)

    def encode(self, pixels: Tensor, *, pooled: bool = True, adapter: DenseAdapter | None = None) -> ImageFeatures:
        """Features, once their types and shapes are known to be right.

        Raises:
            CheckFailed: they are not.
        """
        adapter = adapter or self.adapter
        features = adapter.encode_image(pixels, pooled=pooled)
        grid = adapter.patch_grid(*pixels.shape[-2:])
        width = self.description.embedding_width
        where = f"for pixels {tuple(pixels.shape)}"
        if not isinstance(features, ImageFeatures):
            raise CheckFailed("encode_image gives ImageFeatures", f"a {type(features).__name__}")
        expect_shape(f"patches {where}", features.patches, (len(pixels), *grid, width))
        if pooled:
            expect_shape(f"pooled {where}", features.pooled, (len(pixels), width))
        elif features.pooled is not None:
            raise CheckFailed("pooled is None with pooled=False", f"a {type(features.pooled).__name__}")
        return features

    def tokens(self, texts: list[str]) -> Tokens:
        """Tokens, once their types and shapes are known to be right.

        Raises:
            CheckFailed: they are not.
        """
        tokens = self.adapter.tokenize(texts)
        if not isinstance(tokens, Tokens):
            raise CheckFailed("tokenize gives Tokens", f"a {type(tokens).__name__}")
        expect_shape(f"ids of {len(texts)} texts", tokens.ids, (len(texts), self.description.context_length))
        expect_shape("lengths", tokens.lengths, (len(texts),))
        if tokens.ids.dtype != torch.int64 or tokens.lengths.dtype != torch.int64:
            raise CheckFailed("ids and lengths are int64", f"{tokens.ids.dtype} and {tokens.lengths.dtype}")
        if tokens.lengths.device.type != "cpu":
            raise CheckFailed("lengths are on the CPU", f"they are on {tokens.lengths.device}")
        return tokens

    def embed(self, ids: Tensor, *, adapter: DenseAdapter | None = None) -> Tensor:
        """Text embeddings, once their type and shape are known to be right.

        Raises:
            CheckFailed: they are not.
        """
        adapter = adapter or self.adapter
        found = adapter.encode_text(ids.to(next(adapter.model.parameters()).device))
        expect_shape(f"text embeddings of ids {tuple(ids.shape)}", found, (len(ids), self.description.embedding_width))
        return found

    def expect_close(self, what: str, seen: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
        """Fail unless two tensors agree.

        Raises:
            CheckFailed: their shapes differ, one holds values that are not finite, or they are too far apart.
        """
        expect_shape(what, seen, tuple(expected.shape))
        allowed = self.tolerance if tolerance is None else tolerance
        far = distance(seen, expected)
        if not far <= allowed:
            raise CheckFailed(
                f"{what} within {allowed:g} of the largest value", f"a difference of {far:.3g} of the largest value"
            )

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> CheckResult:
        """Run one check, and before it those that it needs; each runs once.

        Nothing that the adapter does is raised, and afterwards model, modes and random states are as before.

        Raises:
            InputError: there is no such check.
        """
        if name not in self.checks:
            raise InputError(choices_sentence("check", name, self.checks))
        if name not in self._results:
            check = self.checks[name]
            broken = [need for need in check.needs if not self._stands(need)]
            if name in self.not_applicable:
                self._results[name] = CheckResult(name, check.what, "skipped", reason=self.not_applicable[name])
            elif broken:
                reason = f"it builds on {' and '.join(broken)}"
                self._results[name] = CheckResult(name, check.what, "skipped", reason=reason)
            else:
                self._results[name] = self._run(check)
        return self._results[name]

    def _stands(self, name: str) -> bool:
        """Whether a check that others need did not fail, nor any that it needs itself; and there is an adapter."""
        result = self.run(name)
        if name == BUILT and self._adapter is None:
            return False
        if name in self.not_applicable:
            return True
        return result.status != "failed" and all(self._stands(need) for need in self.checks[name].needs)

    def _run(self, check: Check) -> CheckResult:
        started = time.perf_counter()
        status: Any = "passed"
        details: dict[str, Any] = {}
        try:
            self._guarded(check)
        except NotApplicable as skipped:
            status, details = "skipped", {"reason": str(skipped)}
        except CheckFailed as failure:
            status = "failed"
            details = {"expected": failure.expected, "seen": failure.seen, "causes": check.causes}
        except (Exception, SystemExit) as error:
            status = "failed"
            details = {"expected": check.what, "seen": said(error), "causes": check.causes}
        return CheckResult(check.name, check.what, status, seconds=time.perf_counter() - started, **details)

    def _guarded(self, check: Check) -> None:
        try:
            adapter: DenseAdapter | None = self.adapter
        except CheckFailed:
            adapter = None
        # What an adapter prints must not get between the lines of a report.
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            device = (
                torch.device("cpu")
                if adapter is None
                else next((p.device for p in adapter.model.parameters()), torch.device("cpu"))
            )
            stack.enter_context(kept_random_state(SEED, device))
            stack.enter_context(torch.enable_grad())
            if adapter is not None:
                if self._keeper is None:
                    # One for all checks: copying a large model takes longer than most of them.
                    self._keeper = ModuleSnapshot(adapter)
                stack.callback(self._keeper.restore)
                adapter.eval()
            check.function(self)

    def start_again(self) -> None:
        """Within a check, put the adapter back to where the check started."""
        assert self._keeper is not None
        self._keeper.restore()
        self.adapter.eval()

    def report(self, only: Iterable[str] | None = None) -> Report:
        """Run all checks, or ``only`` some, in their order.

        Raises:
            InputError: ``only`` names no check.
        """
        wanted = list(self.checks) if only is None else list(only)
        for name in wanted:
            if name not in self.checks:
                raise InputError(choices_sentence("check", name, self.checks))
        results = tuple(self.run(name) for name in self.checks if name in wanted)
        return Report(self.name, results)

    @property
    def name(self) -> str:
        """The backbone's name as far as it is known."""
        try:
            return str(self.adapter.description.name)
        except (Exception, SystemExit):
            return self.given_family or "an adapter that cannot be described"


def check_adapter(
    make_adapter: Callable[[], DenseAdapter],
    *,
    only: Iterable[str] | None = None,
    family: str | None = None,
    not_applicable: Mapping[str, str] | None = None,
    image_reference: Reference | None = None,
    text_reference: Reference | None = None,
) -> Report:
    """Run the conformance checks on an adapter.

    Args:
        make_adapter: builds the adapter; whatever it raises becomes a failed check.
        only: names of the checks that are wanted; what they need runs as well, and is not reported.
        family: name of the family that the adapter should belong to; by default the one that its description states.
        not_applicable: names of checks that this adapter cannot pass for a good reason, with the reason.
        image_reference, text_reference: called with the adapter and pixels (token ids), give the library's own
            embeddings, or ``None`` where there are none; by default the model's ``encode_image`` or
            ``get_image_features`` (``encode_text``, ``get_text_features``) is called.

    Returns:
        One result for each check. Model, modes and random states are as before.

    Raises:
        InputError: a name is not that of a check.
    """
    session = Session(
        make_adapter,
        family=family,
        not_applicable=not_applicable,
        image_reference=image_reference,
        text_reference=text_reference,
    )
    return session.report(only)


def said(error: BaseException) -> str:
    """An exception as the end of a sentence."""
    return f"{type(error).__name__}: {one_sentence(error)}"


def expect_shape(what: str, found: object, shape: tuple[int, ...]) -> None:
    """Fail unless ``found`` is a tensor of that shape."""
    if not isinstance(found, Tensor):
        raise CheckFailed(f"{what}: a tensor of shape {shape}", f"a {type(found).__name__}")
    if tuple(found.shape) != shape:
        raise CheckFailed(f"{what}: shape {shape}", f"shape {tuple(found.shape)}")


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value of the second; infinite where not finite."""
    a, b = a.detach().double(), b.detach().to(a.device).double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
