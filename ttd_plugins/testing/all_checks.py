"""The one list of checks, in the order in which they run."""

from __future__ import annotations

from ttd_plugins.testing.check_types import Check
from ttd_plugins.testing.checks import (
    description,
    image_features,
    preprocessing,
    side_effects,
    spatial_alignment,
    text_features,
    training,
)

CHECKS: tuple[Check, ...] = tuple(
    check
    for module in (
        description,
        image_features,
        spatial_alignment,
        text_features,
        preprocessing,
        side_effects,
        training,
    )
    for check in module.CHECKS
)
"""Every check of the kit."""
