"""Batch normalisation with frozen weights keeps its running averages, so that frozen parts of a model stay the same."""

from __future__ import annotations

from torch import nn


def freeze_running_averages(model: nn.Module) -> list[nn.Module]:
    """Set batch normalisation without trainable parameters to evaluation mode, in place.

    In training mode its buffers would change at each forward pass, although its weights are frozen.

    Returns:
        The modules that were in training mode.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.training:
            continue
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            # Not eval(): in timm an activation and a dropout are inside.
            module.training = False
            changed.append(module)
    return changed
