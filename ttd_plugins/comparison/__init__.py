"""Compare backbones before and after TTD: the same data, steps and seeds, and a control that trains without TTD."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Resolved on first use: the results are imported by reports, which the runner imports.
    if name == "compare":
        return importlib.import_module("ttd_plugins.comparison.running").compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
