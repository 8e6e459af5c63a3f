"""State that a forward pass changes by itself: buffers, and running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """Copies of all buffers of a model, by module and name, so that moving the model does not lose them."""

    def __init__(self, model: nn.Module) -> None:
        self._values: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, in place where the buffer has the same shape; device and dtype stay."""
        for module, name, value in self._values:
            current = module._buffers.get(name)
            if current is not None and current.shape == value.shape:
                current.copy_(value)
            else:
                module._buffers[name] = value.clone()


class WeightSnapshot:
    """Copies of the parameters and buffers of a model.

    Args:
        model: the model.
        left_out: parameters that are not copied.
    """

    def __init__(self, model: nn.Module, left_out: Iterable[nn.Parameter] = ()) -> None:
        skipped = {id(parameter) for parameter in left_out}
        self._parameters = [(p, p.detach().clone()) for p in model.parameters() if id(p) not in skipped]
        self._buffers = BufferSnapshot(model)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, in place."""
        for parameter, value in self._parameters:
            parameter.copy_(value)
        self._buffers.restore()


def running_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._NormBase]:
    """Yield the normalisation layers with running statistics: batch normalisation, and instance normalisation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            yield module


def keep_frozen_norms_in_eval(model: nn.Module) -> None:
    """Set normalisation layers that are not trained to evaluation mode, so that their running statistics stay.

    A layer is trained if one of its own parameters requires a gradient. One without parameters is trained with the
    rest of the module that contains it. LoRA trains no normalisation layer.
    """
    norms = [norm for norm in running_norms(model) if norm.training]
    if not norms:
        return
    parents = {child: module for module in model.modules() for child in module.children()}
    for norm in norms:
        owner: nn.Module = norm if any(True for _ in norm.parameters()) else parents.get(norm, norm)
        if not any(p.requires_grad and "lora_" not in name for name, p in owner.named_parameters()):
            norm.eval()
