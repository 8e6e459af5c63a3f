"""Old names of toolkit functions, available for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def deprecated_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` that resolves old names to new ones, with a FutureWarning.

    Args:
        module: ``__name__`` of the module.
        renamed: old name to new name, or to ``"other.module.new_name"``.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, _, new_name = renamed[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is now {new_module or module}.{new_name}; the old name goes with the next minor release",
            FutureWarning,
            stacklevel=2,
        )
        __import__(new_module or module)
        return getattr(sys.modules[new_module or module], new_name)

    return __getattr__
