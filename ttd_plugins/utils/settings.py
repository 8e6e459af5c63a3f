"""Nested settings as mappings: flat names, and the first difference between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by names such as ``outer.inner``, in order; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, separator, f"{prefix}{name}{separator}")
        else:
            flat[prefix + name] = value
    return flat


def filled(values: Any, defaults: Mapping[str, Any]) -> Any:
    """Return nested values with those of ``defaults`` for the names that they lack; what is no mapping stays."""
    if not isinstance(values, Mapping):
        return values
    own = {
        name: filled(value, defaults[name]) if isinstance(defaults.get(name), Mapping) else value
        for name, value in values.items()
    }
    return {**defaults, **own}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of settings as sorted JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SettingsDifference:
    """One setting that differs: its dotted name, and both values (``None`` where one side has no such name)."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """For a message: ``optimizer.steps: 100 there, 200 now``."""
        return f"{self.name or 'settings'}: {json.dumps(self.old)[:80]} there, {json.dumps(self.new)[:80]} now"


def first_difference(old: Any, new: Any, *, ignore: Collection[str] = (), name: str = "") -> SettingsDifference | None:
    """Return the first setting in which two nested mappings differ, in the order of ``new``, or ``None``.

    Args:
        old, new: mappings of plain values, or plain values.
        ignore: dotted names that may differ.
        name: dotted name of ``old`` and ``new`` themselves.
    """
    if name in ignore:
        return None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            found = first_difference(
                old.get(key), new.get(key), ignore=ignore, name=f"{name}.{key}" if name else str(key)
            )
            if found is not None:
                return found
        return None
    return None if old == new else SettingsDifference(name, old, new)
