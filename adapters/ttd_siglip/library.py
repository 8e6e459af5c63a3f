"""The one place where backbone libraries are imported, so that a missing or broken one is one clear sentence."""

from __future__ import annotations

import importlib
from typing import Any

from ttd_plugins.errors import MissingDependencyError, one_sentence


def import_transformers() -> Any:
    """Return the module ``transformers``.

    Raises:
        MissingDependencyError: it, or something that it imports, is absent or broken.
    """
    return _import("transformers", "the SigLIP models of its hub, and siglip:tiny,", "transformers")


def import_open_clip() -> Any:
    """Return the module ``open_clip``.

    Raises:
        MissingDependencyError: it, or something that it imports, is absent or broken.
    """
    return _import("open_clip", "the SigLIP architectures of open_clip", "open_clip_torch")


def _import(module: str, what: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a torchvision of another build fails with RuntimeError or AttributeError
        raise MissingDependencyError(
            f"{what} need {distribution}, which cannot be imported ({type(error).__name__}: {one_sentence(error)}); "
            "run: pip install 'ttd-plugins[siglip]'"
        ) from error
