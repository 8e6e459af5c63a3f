"""The plugin: registers the family ``convnext`` and answers for model objects; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily


@hookimpl
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Register the family ``convnext``."""
    from ttd_convnext.family import ConvNeXtFamily

    register(ConvNeXtFamily())


@hookimpl
def adapter_for_model(model: nn.Module) -> str | None:
    """Return ``"convnext"`` for a CLIP model whose image tower is a timm ConvNeXt trunk, judged by structure."""
    from ttd_convnext.structure import is_convnext_clip

    return "convnext" if is_convnext_clip(model) else None
