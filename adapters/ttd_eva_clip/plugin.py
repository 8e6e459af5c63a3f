"""The plugin: registers the family ``eva_clip`` and answers for model objects; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily


@hookimpl
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Register the family ``eva_clip``."""
    from ttd_eva_clip.family import EvaCLIPFamily

    register(EvaCLIPFamily())


@hookimpl
def adapter_for_model(model: nn.Module) -> str | None:
    """Return ``"eva_clip"`` for a CLIP model whose image tower is a timm EVA trunk, judged by structure."""
    from ttd_eva_clip.structure import is_eva_clip

    return "eva_clip" if is_eva_clip(model) else None
