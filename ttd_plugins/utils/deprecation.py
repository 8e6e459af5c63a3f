"""Deprecated names: each works as before for one minor release and warns once per use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Emit the ``FutureWarning`` of a renamed name; by default it points at the caller of the caller."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next minor release", FutureWarning, stacklevel=stacklevel
    )


class RenamedAttribute:
    """Descriptor for the old name of an attribute or method: reading it warns and returns the new one.

    Example:
        >>> class Result:
        ...     metrics = {"loss": 1.0}
        ...     figures = RenamedAttribute("metrics")
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        warn_renamed(self.old, f"{owner.__name__}.{self.new}")
        return getattr(owner if instance is None else instance, self.new)


def renamed_names(module: str, names: Mapping[str, str], namespace: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that serves old names.

    Args:
        module: ``__name__`` of the module.
        names: old name to new name.
        namespace: ``globals()`` of the module.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807  (it becomes the module's)
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return namespace[names[name]]

    return __getattr__


def rename_keys(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return ``values`` with old keys replaced by new ones, in order, with one warning for each.

    Args:
        values: keyword arguments or the keys of a file's section.
        names: old key to new key.
        where: what the keys belong to, for the warning, such as ``"TTDOptions"``.

    Raises:
        ValueError: both the old and the new key are given.
    """
    renamed = {}
    for key, value in values.items():
        new = names.get(key, key)
        if new != key:
            if new in values:
                raise ValueError(f"{where} has both {key} and {new}, which is its new name; keep {new}")
            warn_renamed(f"{where}.{key}", f"{where}.{new}", stacklevel=4)
        renamed[new] = value
    return renamed
