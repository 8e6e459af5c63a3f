"""Import of a backbone library, so that a missing or broken installation is one clear sentence."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ttd_plugins.errors import MissingDependencyError, one_sentence
from ttd_plugins.utils.loading_lock import LOADING_LOCK
from ttd_plugins.utils.quick_start import collection_paused, compiler_deferred


def import_library(
    module: str, needed_by: str, *, distribution: str, install: str, attributes: Sequence[str] = ()
) -> Any:
    """Import and return a module; one thread at a time imports libraries.

    Args:
        module: name of the module.
        needed_by: plural subject of the message, such as ``"EVA-CLIP backbones"``.
        distribution: name of the distribution that brings the module.
        install: argument of ``pip install``.
        attributes: attributes to access, for libraries that import their parts late.

    Raises:
        MissingDependencyError: the module, or something that it imports, is absent or broken.
    """
    try:
        with LOADING_LOCK, collection_paused(), compiler_deferred():
            library = importlib.import_module(module)
            for attribute in attributes:
                getattr(library, attribute)
    except Exception as error:  # a torchvision of another build raises RuntimeError or AttributeError
        raise MissingDependencyError(
            f"{needed_by} need {distribution}, which cannot be imported ({type(error).__name__}: "
            f"{one_sentence(error)}); run: pip install {install}"
        ) from error
    return library
