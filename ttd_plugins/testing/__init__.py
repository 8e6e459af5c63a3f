"""The conformance kit: checks that test an adapter against the contract and report usual causes of failures.

Authors of adapters subclass :class:`AdapterConformance` in their tests; the command line uses :func:`check_adapter`.
Both run the same list, :data:`CHECKS`. pytest is imported only when a test runs.
"""

from __future__ import annotations

from ttd_plugins.testing.all_checks import CHECKS, Session, check_adapter
from ttd_plugins.testing.check_types import Check, CheckFailed, CheckResult, NotApplicable, Report
from ttd_plugins.testing.conformance import AdapterConformance

__all__ = [
    "CHECKS",
    "AdapterConformance",
    "Check",
    "CheckFailed",
    "CheckResult",
    "NotApplicable",
    "Report",
    "Session",
    "check_adapter",
]
