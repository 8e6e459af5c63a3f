"""What the tests of the conformance kit share: the conforming toy as an installed plugin, and a report as text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conforming_toy import ConformingFamily, ConformingPlugin

from ttd_plugins.plugins import temporary_plugin
from ttd_plugins.testing import Report


@pytest.fixture(name="plugin")
def conforming_plugin() -> Iterator[ConformingFamily]:
    """The conforming family, registered while a test runs."""
    family = ConformingFamily()
    with temporary_plugin(ConformingPlugin(family), name="conforming_plugin"):
        yield family


def lines(report: Report) -> str:
    """The results that are not passed, one a line."""
    return "\n".join(str(result) for result in report.results if result.status != "passed")
