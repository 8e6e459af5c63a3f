"""The one place where transformers is imported, so that a missing or broken installation is one clear sentence."""

from __future__ import annotations

from typing import Any

from ttd_plugins.errors import MissingDependencyError, one_sentence


def import_transformers() -> Any:
    """Return the module ``transformers``, its CLIP classes loaded.

    Raises:
        MissingDependencyError: it, or something that it imports, is absent or broken.
    """
    try:
        import transformers

        # The package loads its parts late: what is broken shows when a class is asked for.
        _ = (transformers.CLIPConfig, transformers.CLIPModel)
    except Exception as error:  # a torchvision of another build fails with RuntimeError or AttributeError
        raise MissingDependencyError(
            f"openai_clip backbones by name need transformers, which cannot be imported ({type(error).__name__}: "
            f"{one_sentence(error)}); run: pip install 'ttd-plugins[openai_clip]'"
        ) from error
    return transformers
