"""Names of the modules that LoRA may wrap."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_layer(module: nn.Module) -> nn.Module:
    """The module that a LoRA layer wraps, or the module itself."""
    layer: Any = module
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def linear_layers_of_blocks(tower: nn.Module, prefix: str) -> list[str]:
    """Names of the linear layers inside numbered blocks; a pooler outside of them may be unused.

    Args:
        tower: the module to search.
        prefix: name of ``tower`` in the model, which starts every returned name.
    """
    named = tower.named_modules(prefix=prefix)
    return [
        name
        for name, module in named
        if isinstance(base_layer(module), nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        and "lora_" not in name
        and not name.endswith("base_layer")
    ]
