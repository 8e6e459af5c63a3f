"""Data types of the conformance kit: a check, its result, and a report of all results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


class CheckFailed(Exception):  # noqa: N818  # a finding about the adapter, not an error of the kit
    """An adapter violates the contract.

    Attributes:
        expected, seen: expected and observed behaviour, as ends of "expected: ..." and "seen: ...".
    """

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}; seen: {seen}")
        self.expected = expected
        self.seen = seen


class NotApplicable(Exception):  # noqa: N818
    """A check does not apply to this adapter; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """A requirement on every adapter.

    Attributes:
        name: a Python identifier; the test of :class:`AdapterConformance` is ``test_`` followed by this name.
        what: the requirement, one sentence without a full stop.
        causes: usual causes of a failure, each one sentence without a full stop.
        function: performs the check on a :class:`~ttd_plugins.testing.check_session.CheckSession`; returns ``None``, or
            raises :class:`CheckFailed` or :class:`NotApplicable`.
        needs: names of prerequisites; the check is skipped if one of them failed.
    """

    name: str
    what: str
    causes: tuple[str, ...]
    function: Callable[[Any], None] = field(repr=False)
    needs: tuple[str, ...] = ()


def collect(checks: list[Check], what: str, *causes: str, needs: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Return a decorator that appends a :class:`Check` to ``checks``, named after the decorated function."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        checks.append(Check(function.__name__, what, causes, function, needs))
        return function

    return add


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name, what: name and requirement of the check.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        reason: why the check was skipped.
        expected, seen: expected and observed behaviour, if the check failed.
        causes: usual causes of such a failure.
        seconds: duration.
    """

    name: str
    what: str
    status: Status
    reason: str | None = None
    expected: str | None = None
    seen: str | None = None
    causes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.status == "failed":
            lines = [f"{self.name}: {self.what}", f"  expected: {self.expected}", f"  seen: {self.seen}"]
            return "\n".join([*lines, *(f"  usual cause: {cause}" for cause in self.causes)])
        return f"{self.name}: {self.status}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """Results of all checks of one adapter, in their order.

    Attributes:
        adapter: name of the backbone, or what is known of it if it could not be built.
        results: one result per check.
    """

    adapter: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> list[str]:
        """Names of the checks that passed."""
        return [result.name for result in self.results if result.status == "passed"]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [result.name for result in self.results if result.status == "failed"]

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the checks that were skipped, each with the reason."""
        return {result.name: result.reason or "" for result in self.results if result.status == "skipped"}

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return {"adapter": self.adapter, "ok": self.ok, "checks": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        return "\n".join([f"{self.adapter}:", *(str(result) for result in self.results)])
