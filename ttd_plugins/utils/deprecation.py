"""Deprecated aliases: an old name works as before for one minor release, with a FutureWarning that names the new one.

Python's :class:`DeprecationWarning` is hidden by default; a :class:`FutureWarning` reaches users.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that a name changed.

    Args:
        old, new: the names, as a user writes them.
        stacklevel: as for :func:`warnings.warn`; 2 blames the caller of the function that calls this one.
    """
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next minor release", FutureWarning, stacklevel=stacklevel + 1
    )


class RenamedAttribute:
    """The old name of an attribute, property or method of a class.

    Reading and setting it through an object warns and uses the new name::

        class TrainResult:
            metrics: dict[str, float]
            numbers = RenamedAttribute("metrics")
    """

    def __init__(self, new: str) -> None:
        self.new = new
        self.names = ("", new)

    def __set_name__(self, owner: type, name: str) -> None:
        self.names = (f"{owner.__name__}.{name}", f"{owner.__name__}.{self.new}")

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        warn_renamed(*self.names)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        warn_renamed(*self.names)
        setattr(instance, self.new, value)


def renamed_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` that resolves old names of functions, classes and constants.

    Args:
        module: ``__name__`` of the module.
        renamed: old name to new name; a new name with dots is in another module, as in ``"package.module.name"``.

    Example, hidden from type checkers, which would otherwise accept any name of the module::

        if not TYPE_CHECKING:
            __getattr__ = renamed_names(__name__, {"Lines": "JsonlLog"})
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, _, new_name = renamed[name].rpartition(".")
        new_module = new_module or module
        warn_renamed(f"{module}.{name}", f"{new_module}.{new_name}")
        return getattr(importlib.import_module(new_module), new_name)

    return __getattr__


def renamed_keyword(old: str, new: str) -> Callable[[_F], _F]:
    """Decorate a function, or a class for the sake of its constructor, so that it accepts the old name of a keyword.

    Raises:
        TypeError: when the decorated function is called with both names.
    """

    def decorate(function: _F) -> _F:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)  # type: ignore[misc]
            return function
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def accept_old_name(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name}() got both {new} and its old name {old}; pass {new} only")
                warn_renamed(f"{name}({old}=...)", f"{name}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accept_old_name  # type: ignore[return-value]

    return decorate


def rename_keys(values: Mapping[str, Any], renamed: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return ``values`` with old keys replaced by new ones, in order, with one warning for each.

    Args:
        values: keyword arguments, or the keys of a section of a file.
        renamed: old key to new key.
        where: what the keys belong to, such as ``"TTDOptions"``.

    Raises:
        ValueError: an old key and its new name are both given.
    """
    current = {}
    for key, value in values.items():
        new = renamed.get(key, key)
        if new != key:
            if new in values:
                raise ValueError(f"{where} has both {key} and {new}, which is its new name; keep {new}")
            warn_renamed(f"{where}.{key}", f"{where}.{new}", stacklevel=3)
        current[new] = value
    return current
