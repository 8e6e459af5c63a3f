"""The base class of an adapter's conformance tests; pytest is imported when a test runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.testing.all_checks import CHECKS, Session
from ttd_plugins.testing.check_types import Check
from ttd_plugins.testing.library_reference import library_image_embedding, library_text_embedding


class AdapterConformance:
    """One test per check of the kit; a subclass defines how its adapter is built.

    Example::

        class TestMine(AdapterConformance):
            def make_adapter(self):
                return load("my_clip:tiny@random")

    Prefer ``library_reference`` of the adapter to the two references here: the command line reads it too.

    The adapter is built once for the class, and every check restores it.
    """

    not_applicable: ClassVar[Mapping[str, str]] = {}
    """Names of checks that do not apply to this adapter, with the reason; they are skipped."""

    family: ClassVar[str | None] = None
    """Expected family of the adapter; by default the family in its description."""

    _session: ClassVar[Session | None] = None

    def make_adapter(self) -> DenseAdapter:
        """Build the adapter under test; a small model with random weights is enough."""
        raise NotImplementedError(f"{type(self).__name__} must define make_adapter(self), which returns a DenseAdapter")

    def library_image_embedding(self, adapter: DenseAdapter, pixels: Tensor) -> Tensor | None:
        """Return the library's own image embeddings ``[B, D]`` of ``pixels``, or ``None`` if there are none."""
        return library_image_embedding(adapter, pixels)

    def library_text_embedding(self, adapter: DenseAdapter, ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Return the library's own text embeddings ``[N, D]`` of ids ``[N, context]``, or ``None``.

        ``mask`` is 1 up to and including the end token; an override may leave this parameter out.
        """
        return library_text_embedding(adapter, ids, mask)

    def _check(self, name: str) -> None:
        import pytest

        __tracebackhide__ = True
        cls = type(self)
        if "_session" not in vars(cls):
            # A method that is not overridden is the default, which knows that it may guess.
            texts = cls.library_text_embedding is not AdapterConformance.library_text_embedding
            cls._session = Session(
                self.make_adapter,
                family=self.family,
                not_applicable=self.not_applicable,
                image_reference=self.library_image_embedding,
                text_reference=self.library_text_embedding if texts else None,
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
