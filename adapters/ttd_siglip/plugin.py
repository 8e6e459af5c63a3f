"""The plugin: registers the family ``siglip`` and answers for model objects; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily


@hookimpl
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Register the family ``siglip``."""
    from ttd_siglip.family import SiglipFamily

    register(SiglipFamily())


@hookimpl
def adapter_for_model(model: nn.Module) -> str | None:
    """Return ``"siglip"`` for a model whose image tower pools with one learnt probe, judged by structure."""
    from ttd_siglip.structure import is_siglip

    return "siglip" if is_siglip(model) else None
