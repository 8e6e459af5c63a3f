"""Text-Tag Self-Distillation (TTD, ECCV 2024, arXiv 2404.00384) for any CLIP-like backbone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ttd_plugins import _renamed_modules

_renamed_modules.install()

if TYPE_CHECKING:
    from ttd_plugins._version import __version__
    from ttd_plugins.adapter import Calibration, DenseAdapter
    from ttd_plugins.comparison.running import compare
    from ttd_plugins.engine import TTD
    from ttd_plugins.evaluation import evaluate
    from ttd_plugins.export import export_backbone
    from ttd_plugins.fine_tuning import fine_tune
    from ttd_plugins.functional import ttd_loss
    from ttd_plugins.hookspecs import hookimpl
    from ttd_plugins.lora import load_lora, save_lora
    from ttd_plugins.options import TTDOptions
    from ttd_plugins.plugins import load, wrap
    from ttd_plugins.segmenting import segment
    from ttd_plugins.tagging import find_tags
    from ttd_plugins.toolkit.fast_inference import optimize_for_inference
    from ttd_plugins.training.checkpoints import restore_backbone

# Imported on first use, so that importing the package costs nothing but the names that are used.
_MODULES = {
    "Calibration": "ttd_plugins.adapter",
    "DenseAdapter": "ttd_plugins.adapter",
    "TTD": "ttd_plugins.engine",
    "TTDOptions": "ttd_plugins.options",
    "__version__": "ttd_plugins._version",
    "compare": "ttd_plugins.comparison.running",
    "evaluate": "ttd_plugins.evaluation",
    "export_backbone": "ttd_plugins.export",
    "find_tags": "ttd_plugins.tagging",
    "fine_tune": "ttd_plugins.fine_tuning",
    "hookimpl": "ttd_plugins.hookspecs",
    "load": "ttd_plugins.plugins",
    "load_lora": "ttd_plugins.lora",
    "optimize_for_inference": "ttd_plugins.toolkit.fast_inference",
    "restore_backbone": "ttd_plugins.training.checkpoints",
    "save_lora": "ttd_plugins.lora",
    "segment": "ttd_plugins.segmenting",
    "ttd_loss": "ttd_plugins.functional",
    "wrap": "ttd_plugins.plugins",
}

__all__ = [
    "TTD",
    "Calibration",
    "DenseAdapter",
    "TTDOptions",
    "__version__",
    "compare",
    "evaluate",
    "export_backbone",
    "find_tags",
    "fine_tune",
    "hookimpl",
    "load",
    "load_lora",
    "optimize_for_inference",
    "restore_backbone",
    "save_lora",
    "segment",
    "ttd_loss",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ttd_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
