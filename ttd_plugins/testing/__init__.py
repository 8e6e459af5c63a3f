"""The conformance kit: what every adapter must do, as checks that say what was expected, what was seen, and why.

Authors of adapters subclass :class:`AdapterConformance` in their tests; the command line uses :func:`check_adapter`.
Both run the same list, :data:`CHECKS`. Nothing here needs pytest before a test runs.
"""

from __future__ import annotations

from ttd_plugins.testing.all_checks import CHECKS
from ttd_plugins.testing.check_session import Session, check_adapter
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
