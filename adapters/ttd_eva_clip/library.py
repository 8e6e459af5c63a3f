"""The one place where open_clip is imported, so that a missing or broken installation is one clear sentence."""

from __future__ import annotations

from typing import Any

from ttd_plugins.errors import MissingDependencyError, one_sentence


def import_open_clip() -> Any:
    """Return the module ``open_clip``.

    Raises:
        MissingDependencyError: it, or something that it imports, is absent or broken.
    """
    try:
        import open_clip
    except Exception as error:  # a torchvision of another build fails with RuntimeError or AttributeError
        raise MissingDependencyError(
            f"EVA-CLIP backbones need open_clip_torch, which cannot be imported ({type(error).__name__}: "
            f"{one_sentence(error)}); run: pip install 'ttd-plugins[eva_clip]'"
        ) from error
    return open_clip
