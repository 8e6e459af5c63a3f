"""All checks of the conformance kit in the order in which they run, and running them on an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.testing.check_session import CheckSession
from ttd_plugins.testing.check_types import Check, Report
from ttd_plugins.testing.checks import (
    description,
    exporting,
    image_features,
    inputs,
    joint_space,
    library,
    lora,
    preprocessing,
    process,
    side_effects,
    spatial_alignment,
    text_features,
    training,
)
from ttd_plugins.testing.library_reference import Reference

CHECKS: tuple[Check, ...] = tuple(
    check
    for module in (
        description,
        image_features,
        joint_space,
        spatial_alignment,
        text_features,
        preprocessing,
        library,
        side_effects,
        inputs,
        training,
        lora,
        exporting,
        process,
    )
    for check in module.CHECKS
)
"""All checks of the kit."""


class Session(CheckSession):
    """A session with all checks of the kit; arguments as for :class:`CheckSession`, without ``checks``."""

    def __init__(
        self,
        make_adapter: Callable[[], DenseAdapter],
        *,
        family: str | None = None,
        not_applicable: Mapping[str, str] | None = None,
        image_reference: Reference | None = None,
        text_reference: Reference | None = None,
    ) -> None:
        super().__init__(
            make_adapter,
            CHECKS,
            family=family,
            not_applicable=not_applicable,
            image_reference=image_reference,
            text_reference=text_reference,
        )


def check_adapter(
    make_adapter: Callable[[], DenseAdapter],
    *,
    only: Iterable[str] | None = None,
    family: str | None = None,
    not_applicable: Mapping[str, str] | None = None,
    image_reference: Reference | None = None,
    text_reference: Reference | None = None,
) -> Report:
    """Run the conformance checks on an adapter.

    Model, training modes and random states are unchanged afterwards.

    Args:
        make_adapter: builds the adapter; an exception becomes a failed check.
        only: names of the checks to run; their prerequisites run too but are not reported.
        family: expected family of the adapter; by default the family in its description.
        not_applicable: names of checks that do not apply to this adapter, with the reason.
        image_reference, text_reference: return the library's own embeddings for an adapter and pixels (token ids), or
            ``None`` if there are none; by default they call the model's ``encode_image`` or ``get_image_features``
            (``encode_text`` or ``get_text_features``).

    Returns:
        The result of each check.

    Raises:
        InputError: a name of a check is unknown.
    """
    session = Session(
        make_adapter,
        family=family,
        not_applicable=not_applicable,
        image_reference=image_reference,
        text_reference=text_reference,
    )
    return session.report(only)
