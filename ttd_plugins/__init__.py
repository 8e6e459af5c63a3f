"""Text-Tag Self-Distillation (TTD, ECCV 2024, arXiv 2404.00384) for any CLIP-like backbone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttd_plugins import _renamed_modules

__version__ = "0.1.0"

_renamed_modules.install()

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.engine import TTD, TTDOptions
    from ttd_plugins.fine_tuning import fine_tune
    from ttd_plugins.hookspecs import hookimpl
    from ttd_plugins.plugins import load, wrap

# Resolved on first use, so that importing the package costs nothing but the names that are used.
_WHERE = {
    "DenseAdapter": "ttd_plugins.adapter",
    "TTD": "ttd_plugins.engine",
    "TTDOptions": "ttd_plugins.engine",
    "fine_tune": "ttd_plugins.fine_tuning",
    "hookimpl": "ttd_plugins.hookspecs",
    "load": "ttd_plugins.plugins",
    "wrap": "ttd_plugins.plugins",
}

__all__ = ["TTD", "DenseAdapter", "TTDOptions", "__version__", "fine_tune", "hookimpl", "load", "wrap"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ttd_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
