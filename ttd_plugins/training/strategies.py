"""What differs between training with full weights and with sharded weights: one interface, two strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ttd_plugins.engine import TTD, TTDOutput
from ttd_plugins.training import sharding
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.trainable_parameters import parameter_groups


class LossModule(nn.Module):
    """The engine as the module that is wrapped for distributed training.

    Returns only loss tensors and statistics, so that DDP sees no unused outputs.
    """

    def __init__(self, ttd: TTD) -> None:
        super().__init__()
        self.ttd = ttd
        # accelerate finds unused weights itself; they stay without gradient, and so without weight decay.
        ttd.covers_unused = False

    def forward(
        self, images: Tensor, captions: list[str], tags: list[list[str]] | None, groups: list[str] | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float | Tensor]]:
        output: TTDOutput = self.ttd(images, captions, tags, groups)
        # Statistics stay on the device: reading them here would synchronise before the backward pass.
        return output.loss, output.losses, output.device_statistics


class Strategy(Protocol):
    """How forward, backward, clipping and collection of weights are carried out.

    Attributes:
        module: what the step calls with images, captions, tags and groups.
        optimizer: AdamW over the trained parameters.
        device: where it computes.
        loss_is_scaled: whether a gradient scaler handles gradients that are not finite.
        scaler: the gradient scaler, or ``None``.
    """

    module: nn.Module
    optimizer: Any
    device: torch.device
    scaler: Any

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without accelerate's wrapper."""
        ...

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        ...

    def accumulation_context(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one batch of a step; only the last one needs to synchronise gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        ...

    def clip_gradients(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Clip gradients to a global norm; returns the norm before clipping."""
        ...

    def full_weights(self, is_main: bool) -> AbstractContextManager[Any]:
        """Context in which the main process has the full weights. Collective."""
        ...

    def gather(self, tensors: Mapping[str, Tensor], is_main: bool) -> dict[str, Tensor]:
        """Return full tensors on the main process. Collective."""
        ...

    def finish(self) -> None:
        """Leave full weights on every process."""
        ...


class ReplicatedStrategy:
    """Every process has the full weights: one process, or data-parallel training through accelerate.

    Args:
        ttd: the engine.
        adam: the optimizer's settings.
        accelerator: accelerate's; ``None`` for one process without accelerate.
    """

    def __init__(self, ttd: TTD, adam: OptimizerConfig, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.device = ttd.backbone.device if accelerator is None else accelerator.device
        self.scaler = None if accelerator is None else accelerator.scaler
        # One fused kernel instead of ten passes over all weights.
        fused = True if accelerator is not None and self.device.type == "cuda" else None
        optimizer = adam_w(parameter_groups(ttd.backbone.model, adam), adam, fused=fused)
        module = LossModule(ttd)
        self.module: nn.Module
        self.optimizer: Any
        self.module, self.optimizer = (
            (module, optimizer) if accelerator is None else accelerator.prepare(module, optimizer)
        )

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """See :class:`Strategy`."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def forward_context(self) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        return nullcontext()

    def accumulation_context(self, last: bool) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        if last or self.accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.module)
        return context

    def backward(self, loss: Tensor) -> None:
        """See :class:`Strategy`."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def clip_gradients(self, parameters: Sequence[Tensor], limit: float) -> float:
        """See :class:`Strategy`."""
        if self.accelerator is None:
            return float(nn.utils.clip_grad_norm_(parameters, limit))
        return float(self.accelerator.clip_grad_norm_(list(parameters), limit))

    def full_weights(self, is_main: bool) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        return nullcontext()

    def gather(self, tensors: Mapping[str, Tensor], is_main: bool) -> dict[str, Tensor]:
        """See :class:`Strategy`."""
        return {name: tensor.detach() for name, tensor in tensors.items()} if is_main else {}

    def finish(self) -> None:
        """See :class:`Strategy`."""


class ShardedStrategy:
    """Every process stores 1/W of each weight, gradient and moment between steps (FSDP2).

    Args:
        ttd: the engine.
        adam: the optimizer's settings.
        accelerator: accelerate's.
    """

    def __init__(self, ttd: TTD, adam: OptimizerConfig, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device = accelerator.device
        self.scaler = None
        # accelerate would shard scalars too, which torch refuses, and does not shard on the CPU at all.
        self.module: nn.Module = LossModule(ttd)
        self._shards = sharding.ShardedModule(self.module, self.device)
        groups = sharding.split_groups(parameter_groups(ttd.backbone.model, adam))
        self.optimizer: Any = accelerator.prepare_optimizer(adam_w(groups, adam))

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """See :class:`Strategy`."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def forward_context(self) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def accumulation_context(self, last: bool) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        # Gradients are averaged after each batch: full ones would take the memory that sharding saves.
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :class:`Strategy`."""
        self.accelerator.backward(loss)

    def clip_gradients(self, parameters: Sequence[Tensor], limit: float) -> float:
        """See :class:`Strategy`."""
        return sharding.clip_sharded_gradients(parameters, limit)

    def full_weights(self, is_main: bool) -> AbstractContextManager[Any]:
        """See :class:`Strategy`."""
        return self._shards.full_weights(is_main)

    def gather(self, tensors: Mapping[str, Tensor], is_main: bool) -> dict[str, Tensor]:
        """See :class:`Strategy`."""
        return sharding.gather_on_main(tensors, is_main)

    def finish(self) -> None:
        """See :class:`Strategy`."""
        self._shards.end()


def adam_w(groups: list[dict[str, Any]], adam: OptimizerConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over parameter groups."""
    return torch.optim.AdamW(groups, lr=adam.learning_rate, betas=adam.betas, eps=adam.eps, fused=fused)


def clip_limit(adam: OptimizerConfig) -> float:
    """The largest global gradient norm; infinite without clipping."""
    return math.inf if adam.clip_norm is None else adam.clip_norm
