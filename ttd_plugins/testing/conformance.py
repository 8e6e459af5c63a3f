"""The test class that an adapter's tests subclass; pytest is imported when a test runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.testing.all_checks import CHECKS
from ttd_plugins.testing.check_session import Session, library_image_embedding, library_text_embedding
from ttd_plugins.testing.check_types import Check


class AdapterConformance:
    """One test for each check of the kit, for a subclass that says how its adapter is made.

    Example::

        class TestMine(AdapterConformance):
            def make_adapter(self):
                return load("my_clip:tiny@random")

    The adapter is made once for the class, and every check leaves it as it was.
    """

    not_applicable: ClassVar[Mapping[str, str]] = {}
    """Names of checks that this adapter cannot pass for a good reason, with the reason; they are skipped."""

    family: ClassVar[str | None] = None
    """Name of the family that the adapter should belong to; by default the one that its description states."""

    _session: ClassVar[Session | None] = None

    def make_adapter(self) -> DenseAdapter:
        """Build the adapter under test: a small model with random weights is enough."""
        raise NotImplementedError(f"{type(self).__name__} must have make_adapter(self), which gives a DenseAdapter")

    def library_image_embedding(self, adapter: DenseAdapter, pixels: Tensor) -> Tensor | None:
        """The library's own image embeddings ``[B, D]`` of ``pixels``, or ``None`` where there are none."""
        return library_image_embedding(adapter, pixels)

    def library_text_embedding(self, adapter: DenseAdapter, ids: Tensor) -> Tensor | None:
        """The library's own text embeddings ``[N, D]`` of whole rows of ids, or ``None`` where there are none."""
        return library_text_embedding(adapter, ids)

    def _check(self, name: str) -> None:
        import pytest

        __tracebackhide__ = True
        cls = type(self)
        if "_session" not in vars(cls):
            cls._session = Session(
                self.make_adapter,
                family=self.family,
                not_applicable=self.not_applicable,
                image_reference=self.library_image_embedding,
                text_reference=self.library_text_embedding,
            )
        assert cls._session is not None
        result = cls._session.run(name)
        if result.status == "skipped":
            pytest.skip(result.reason or "not applicable")
        if result.status == "failed":
            pytest.fail(str(result), pytrace=False)


def _test_of(check: Check) -> Callable[[AdapterConformance], None]:
    def test(self: AdapterConformance) -> None:
        __tracebackhide__ = True
        self._check(check.name)

    test.__name__ = f"test_{check.name}"
    test.__qualname__ = f"AdapterConformance.test_{check.name}"
    test.__doc__ = f"{check.what}."
    return test


for _one in CHECKS:
    setattr(AdapterConformance, f"test_{_one.name}", _test_of(_one))
