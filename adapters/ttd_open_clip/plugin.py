"""The plugin: registers the family ``open_clip`` and answers for model objects; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily


@hookimpl
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Register the family ``open_clip``."""
    from ttd_open_clip.family import OpenCLIPFamily

    register(OpenCLIPFamily())


@hookimpl
def adapter_for_model(model: nn.Module) -> str | None:
    """Return ``"open_clip"`` for a CLIP model with open_clip's native vision transformer, judged by structure."""
    from ttd_open_clip.structure import is_native_vit_clip

    return "open_clip" if is_native_vit_clip(model) else None
