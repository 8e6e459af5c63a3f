"""Nested mappings, as settings and figures are, by one name for each value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flattened(values: Mapping[str, Any], separator: str = ".", before: str = "") -> dict[str, Any]:
    """The values of a nested mapping in its order, by names such as ``outer.inner``; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, separator, f"{before}{name}{separator}")
        else:
            found[before + name] = value
    return found
