"""What a check is, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ttd_plugins.testing.check_session import Session

Status = Literal["passed", "failed", "skipped"]


class CheckFailed(Exception):  # noqa: N818  # it is a finding, not an error of ours
    """An adapter does not do what the contract asks.

    Attributes:
        expected, seen: ends of the sentences "expected: ..." and "seen: ...".
    """

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}; seen: {seen}")
        self.expected = expected
        self.seen = seen


class NotApplicable(Exception):  # noqa: N818
    """A check has nothing to look at here; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One thing that every adapter must do.

    Attributes:
        name: a Python identifier; the test of :class:`AdapterConformance` is ``test_`` and this name.
        what: what is checked, one sentence without a full stop.
        causes: what usually causes a failure, each one sentence without a full stop.
        function: does it; returns quietly, or raises :class:`CheckFailed` or :class:`NotApplicable`.
        needs: names of checks without which this one means nothing; it is skipped where one of them failed.
    """

    name: str
    what: str
    causes: tuple[str, ...]
    function: Callable[[Session], None] = field(repr=False)
    needs: tuple[str, ...] = ()


def collect(checks: list[Check], what: str, *causes: str, needs: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A decorator that makes a :class:`Check` of a function, named after it, and appends it to ``checks``."""

    def add(function: Callable[[Session], None]) -> Callable[[Session], None]:
        checks.append(Check(function.__name__, what, causes, function, needs))
        return function

    return add


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        name, what: of the check.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        reason: why it was skipped.
        expected, seen: what should have been, and what was, where it failed.
        causes: what usually causes such a failure.
        seconds: how long it took.
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
    """What came of all checks of one adapter, in their order.

    Attributes:
        adapter: name of the backbone, or what is known of it where it could not be built.
        results: one for each check.
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
        """A dictionary that JSON can hold."""
        return {"adapter": self.adapter, "ok": self.ok, "checks": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        return "\n".join([f"{self.adapter}:", *(str(result) for result in self.results)])
