"""Running checks on one adapter: each check is isolated, and the adapter is restored afterwards."""

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
from ttd_plugins.testing.library_reference import (
    Reference,
    call_text_reference,
    library_image_embedding,
    library_text_embedding,
)
from ttd_plugins.testing.module_snapshot import ModuleSnapshot
from ttd_plugins.testing.process_state import ProcessState
from ttd_plugins.utils.deprecation import warn_renamed
from ttd_plugins.utils.rng import preserved_rng, seed_everything

SEED = 20240400
BUILT = "adapter_is_built"
# Relative to the largest value. Accelerators multiply float32 in fewer bits.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
ACCELERATOR = 4e-3
RENAMED_CHECKS = {
    "any_picture": "any_image_mode",
    "lora_comes_out": "lora_unloads_and_merges",
    "pooled_is_the_librarys": "pooled_matches_library",
    "text_is_the_librarys": "text_matches_library",
}
"""Old name of a check to its new name."""


class CheckSession:
    """An adapter under test, and the inputs and helpers that checks share.

    Args:
        make_adapter: builds the adapter; called once, when a check first needs it.
        checks: the checks, in their order.
        family: expected family of the adapter; by default the family in its description.
        not_applicable: names of checks that do not apply to the adapter, with the reason.
        image_reference, text_reference: the library's own embeddings; by default :func:`library_image_embedding` and
            :func:`library_text_embedding`.

    Raises:
        InputError: ``not_applicable`` names an unknown check.
    """

    def __init__(
        self,
        make_adapter: Callable[[], DenseAdapter],
        checks: Iterable[Check],
        *,
        family: str | None = None,
        not_applicable: Mapping[str, str] | None = None,
        image_reference: Reference | None = None,
        text_reference: Reference | None = None,
    ) -> None:
        self.checks: dict[str, Check] = {check.name: check for check in checks}
        self.not_applicable = {self._current_name(name): why for name, why in (not_applicable or {}).items()}
        self.given_family = family
        self.image_reference = image_reference or library_image_embedding
        self.text_reference = text_reference or library_text_embedding
        self.process_changes: dict[str, list[str]] = {}
        self._make = make_adapter
        self._adapter: DenseAdapter | None = None
        self._problem: BaseException | None = None
        self._results: dict[str, CheckResult] = {}
        self._snapshot: ModuleSnapshot | None = None
        self._native: ImageFeatures | None = None
        self._meta: DenseAdapter | None = None

    # The adapter and its inputs --------------------------------------------------------------------------------------

    @property
    def adapter(self) -> DenseAdapter:
        """The adapter under test, in evaluation mode while a check runs.

        Raises:
            CheckFailed: the adapter cannot be built.
        """
        if self._adapter is None and self._problem is None:
            before = ProcessState()
            try:
                made = self._make()
                if before.torch_changes():
                    self.process_changes["make_adapter"] = before.torch_changes()
                    before.restore_torch()
                if not isinstance(made, DenseAdapter):
                    raise TypeError(f"it returned a {type(made).__name__}")
                if not isinstance(made.model, torch.nn.Module):
                    raise TypeError(f"its model is a {type(made.model).__name__}")
                self._adapter = made
            except (Exception, SystemExit) as error:
                self._problem = error
        if self._adapter is None:
            assert self._problem is not None
            raise CheckFailed("a DenseAdapter around a model", error_text(self._problem))
        return self._adapter

    @property
    def description(self) -> BackboneDescription:
        """The adapter's description, which the check ``description`` validates."""
        return self.adapter.description

    @property
    def family(self) -> str | None:
        """Name of the family, or ``None`` if it is unknown."""
        if self.given_family is not None:
            return self.given_family
        try:
            name = self.adapter.description.family
        except (Exception, SystemExit):
            return None
        return name if isinstance(name, str) else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the model's parameters."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.adapter.model.parameters():
            if parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    @property
    def tolerance(self) -> float:
        """Largest difference between equal computations, relative to the largest value."""
        found = TOLERANCES.get(self.dtype, 8e-2)
        return found if self.adapter.device.type == "cpu" else max(found, ACCELERATOR)

    def sizes(self) -> list[tuple[int, int]]:
        """Return input sizes (height, width) other than the preferred one that ``patch_grid`` accepts."""
        rows, columns = self.description.patch_size
        height, width = self.description.image_size
        native = (max(height // rows, 1), max(width // columns, 1))
        grids = [(4, 6), (6, 4), (native[0], native[1] + 1), (native[0] + 2, native[1]), (2, 2)]
        sizes = [(down * rows, across * columns) for down, across in grids]
        return [size for size in sizes if size != (height, width) and self.grid(*size) is not None]

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Return rows and columns of the patch grid at a size, or ``None`` if the adapter refuses the size."""
        from ttd_plugins.errors import ImageSizeError

        try:
            return self.adapter.patch_grid(height, width)
        except ImageSizeError:
            return None

    def pixels(self, count: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
        """Return random normalised images ``[count, 3, height, width]``, float32, on the adapter's device."""
        height, width = size or self.description.image_size
        generator = torch.Generator().manual_seed(SEED + seed)
        return torch.randn(count, 3, height, width, generator=generator).to(self.adapter.device)

    def quick_size(self) -> tuple[int, int]:
        """Return a small input size, for checks that do not depend on the size."""
        native = self.description.image_size
        rows, columns = self.description.patch_size
        small = [size for size in self.sizes() if 9 * rows * columns <= size[0] * size[1] < native[0] * native[1]]
        # Only the check other_sizes reports sizes that fail.
        if not small or self.run("other_sizes").status != "passed":
            return native
        return min(small, key=lambda size: size[0] * size[1])

    def native_features(self) -> ImageFeatures:
        """Return cached features of :meth:`pixels` by the unmodified adapter, without gradient.

        Checks that use them need ``deterministic`` and must not modify them.
        """
        if self._native is None:
            with torch.no_grad():
                self._native = self.encode(self.pixels())
        return self._native

    def on_meta(self) -> DenseAdapter:
        """Return a copy of the adapter without weights, on the meta device."""
        if self._meta is None:
            self._meta = copy.deepcopy(self.adapter).to("meta")
        return copy.deepcopy(self._meta)

    def encode(self, pixels: Tensor, *, pooled: bool = True, adapter: DenseAdapter | None = None) -> ImageFeatures:
        """Return image features after checking their types and shapes.

        Raises:
            CheckFailed: a type or a shape is wrong.
        """
        adapter = adapter or self.adapter
        features = adapter.encode_image(pixels, pooled=pooled)
        grid = adapter.patch_grid(*pixels.shape[-2:])
        width = self.description.embedding_width
        where = f"for pixels {tuple(pixels.shape)}"
        if not isinstance(features, ImageFeatures):
            raise CheckFailed("encode_image returns ImageFeatures", f"a {type(features).__name__}")
        expect_shape(f"patches {where}", features.patches, (len(pixels), *grid, width))
        if pooled:
            expect_shape(f"pooled {where}", features.pooled, (len(pixels), width))
        elif features.pooled is not None:
            raise CheckFailed("pooled is None with pooled=False", f"a {type(features.pooled).__name__}")
        return features

    def tokens(self, texts: list[str]) -> Tokens:
        """Return tokens after checking their types and shapes.

        Raises:
            CheckFailed: a type or a shape is wrong.
        """
        tokens = self.adapter.tokenize(texts)
        if not isinstance(tokens, Tokens):
            raise CheckFailed("tokenize returns Tokens", f"a {type(tokens).__name__}")
        expect_shape(f"ids of {len(texts)} texts", tokens.ids, (len(texts), self.description.context_length))
        expect_shape("lengths", tokens.lengths, (len(texts),))
        if tokens.ids.dtype != torch.int64 or tokens.lengths.dtype != torch.int64:
            raise CheckFailed("ids and lengths are int64", f"{tokens.ids.dtype} and {tokens.lengths.dtype}")
        if tokens.lengths.device.type != "cpu":
            raise CheckFailed("lengths are on the CPU", f"they are on {tokens.lengths.device}")
        return tokens

    def embed(self, ids: Tensor, *, adapter: DenseAdapter | None = None) -> Tensor:
        """Return text embeddings after checking their type and shape.

        Raises:
            CheckFailed: the type or the shape is wrong.
        """
        adapter = adapter or self.adapter
        found = adapter.encode_text(ids.to(next(adapter.model.parameters()).device))
        expect_shape(f"text embeddings of ids {tuple(ids.shape)}", found, (len(ids), self.description.embedding_width))
        return found

    def library_text(self, adapter: DenseAdapter, ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Return the library's own text embeddings of ids ``[N, L]``; by default the mask ends at the end token.

        Raises:
            Exception: what the library raises.
        """
        ids = ids.to(adapter.device)
        if mask is None:
            mask = torch.ones_like(ids)
        return call_text_reference(self.text_reference, adapter, ids, mask.to(ids.device))

    def expect_close(self, what: str, seen: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
        """Fail unless two tensors agree.

        Args:
            what: name of the tensors, for the message.
            seen, expected: the tensors.
            tolerance: largest difference relative to the largest expected value; by default :attr:`tolerance`.

        Raises:
            CheckFailed: shapes differ, a value is not finite, or the difference exceeds the tolerance.
        """
        expect_shape(what, seen, tuple(expected.shape))
        allowed = self.tolerance if tolerance is None else tolerance
        difference = distance(seen, expected)
        if not difference <= allowed:
            raise CheckFailed(
                f"{what} differ by at most {allowed:g} of the largest value", f"{difference:.3g} of the largest value"
            )

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> CheckResult:
        """Run one check after its prerequisites; each check runs once.

        Exceptions of the adapter become failures. Model, modes and random states are unchanged afterwards.

        Raises:
            InputError: the name of the check is unknown.
        """
        name = self._current_name(name)
        if name not in self._results:
            check = self.checks[name]
            broken = [need for need in check.needs if not self._usable(need)]
            if name in self.not_applicable:
                self._results[name] = CheckResult(name, check.what, "skipped", reason=self.not_applicable[name])
            elif broken:
                reason = f"it depends on {' and '.join(broken)}"
                self._results[name] = CheckResult(name, check.what, "skipped", reason=reason)
            else:
                self._results[name] = self._run(check)
        return self._results[name]

    def _current_name(self, name: str) -> str:
        """Return the current name of a check, also for an old one; raises InputError for an unknown name."""
        if name in RENAMED_CHECKS:
            warn_renamed(f"the check {name}", RENAMED_CHECKS[name], stacklevel=3)
            name = RENAMED_CHECKS[name]
        if name not in self.checks:
            raise InputError(choices_sentence("check", name, self.checks))
        return name

    def _usable(self, name: str) -> bool:
        """Return whether checks that need this one can run: neither it nor any of its prerequisites failed."""
        result = self.run(name)
        if name == BUILT and self._adapter is None:
            return False
        if name in self.not_applicable:
            return True
        return result.status != "failed" and all(self._usable(need) for need in self.checks[name].needs)

    def _run(self, check: Check) -> CheckResult:
        started = time.perf_counter()
        status: Any = "passed"
        details: dict[str, Any] = {}
        try:
            self._run_isolated(check)
        except NotApplicable as skipped:
            status, details = "skipped", {"reason": str(skipped)}
        except CheckFailed as failure:
            status = "failed"
            details = {"expected": failure.expected, "seen": failure.seen, "causes": check.causes}
        except (Exception, SystemExit) as error:
            status = "failed"
            details = {"expected": check.what, "seen": error_text(error), "causes": check.causes}
        return CheckResult(check.name, check.what, status, seconds=time.perf_counter() - started, **details)

    def _run_isolated(self, check: Check) -> None:
        try:
            adapter: DenseAdapter | None = self.adapter
        except CheckFailed:
            adapter = None
        # Output of an adapter must not mix with the report.
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            device = (
                torch.device("cpu")
                if adapter is None
                else next((p.device for p in adapter.model.parameters()), torch.device("cpu"))
            )
            stack.enter_context(preserved_rng())
            seed_everything(SEED, accelerators=device.type != "cpu")
            stack.enter_context(torch.enable_grad())
            if adapter is not None:
                if self._snapshot is None:
                    # One snapshot for all checks: copying a large model takes longer than most checks.
                    self._snapshot = ModuleSnapshot(adapter)
                stack.callback(self._snapshot.restore)
                adapter.eval()
            stack.callback(_record_changes, self, check.name, ProcessState())
            check.function(self)

    def restore(self) -> None:
        """Within a check, restore the adapter to its state at the start of the check."""
        assert self._snapshot is not None
        self._snapshot.restore()
        self.adapter.eval()

    def report(self, only: Iterable[str] | None = None) -> Report:
        """Run all checks, or ``only`` some of them, in their order.

        Raises:
            InputError: ``only`` names an unknown check.
        """
        wanted = set(self.checks) if only is None else {self._current_name(name) for name in only}
        results = tuple(self.run(name) for name in self.checks if name in wanted)
        return Report(self.name, results)

    @property
    def name(self) -> str:
        """The backbone's name, or what is known of it."""
        try:
            return str(self.adapter.description.name)
        except (Exception, SystemExit):
            return self.given_family or "an adapter that cannot be described"


def _record_changes(session: CheckSession, name: str, before: ProcessState) -> None:
    """Record which of torch's modes a check left changed, and restore the process."""
    # Checks themselves draw random numbers, and a first import changes environment and filters.
    if before.torch_changes():
        session.process_changes.setdefault(name, before.torch_changes())
    before.restore()


def text_mask(tokens: Tokens) -> Tensor:
    """Return the mask of tokens, int64 ``[N, L]``: 1 up to and including the end token."""
    return (torch.arange(tokens.ids.shape[1]) < tokens.lengths.cpu()[:, None]).long()


def error_text(error: BaseException) -> str:
    """Return the type and message of an exception, as the end of a sentence."""
    return f"{type(error).__name__}: {one_sentence(error)}"


def expect_shape(what: str, found: object, shape: tuple[int, ...]) -> None:
    """Fail unless ``found`` is a tensor of a shape.

    Raises:
        CheckFailed: it is not.
    """
    if not isinstance(found, Tensor):
        raise CheckFailed(f"{what}: a tensor of shape {shape}", f"a {type(found).__name__}")
    if tuple(found.shape) != shape:
        raise CheckFailed(f"{what}: shape {shape}", f"shape {tuple(found.shape)}")


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value of ``b``; infinite if not finite."""
    a, b = a.detach().double(), b.detach().to(a.device).double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
