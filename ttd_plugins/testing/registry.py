"""The one list of checks, in the order in which they run."""

from __future__ import annotations

from ttd_plugins.testing.check import Check
from ttd_plugins.testing.checks import identity, images, pictures, places, state, text, training

CHECKS: tuple[Check, ...] = tuple(
    check for module in (identity, images, places, text, pictures, state, training) for check in module.CHECKS
)
"""Every check of the kit."""
