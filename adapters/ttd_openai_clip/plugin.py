"""The plugin: registers the family ``openai_clip`` and answers for model objects; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily


@hookimpl
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Register the family ``openai_clip``."""
    from ttd_openai_clip.family import OpenAICLIPFamily

    register(OpenAICLIPFamily())


@hookimpl
def adapter_for_model(model: nn.Module) -> str | None:
    """Return ``"openai_clip"`` for transformers' CLIPModel and the original package's models, judged by structure."""
    from ttd_openai_clip.structure import container

    return "openai_clip" if container(model) is not None else None
