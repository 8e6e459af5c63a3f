"""LoRA that is attached to a model: its parameters, its tensors, and how it is merged or removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttd_plugins.errors import TTDError
from ttd_plugins.utils.deprecation import RenamedAttribute
from ttd_plugins.utils.running_state import BufferSnapshot

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")

ADAPTER_NAME = "default"
"""Name of our LoRA within peft; its state-dict helpers use it by default."""

PREFIX = "base_model.model."
"""Prefix of module names in peft's files."""


@dataclass
class WrappedModule:
    """A module that LoRA wraps: its name, its parent, its name in the parent, and the base module itself."""

    name: str
    parent: nn.Module
    child: str
    base: nn.Module

    @property
    def layer(self) -> Any:
        """The module that is at this place now: peft's LoRA layer while LoRA is attached."""
        return getattr(self.parent, self.child)

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's own parameters by their names in the layer, without the adapter's name."""
        base = {id(parameter) for parameter in self.base.parameters()}
        named = self.layer.named_parameters()
        return {name.replace(f".{ADAPTER_NAME}.", "."): p for name, p in named if id(p) not in base}


@dataclass
class LoRAHandle:
    """LoRA that is attached to a model.

    Attributes:
        config: the ``peft.LoraConfig`` that describes it.
        towers: the towers that have it.
        is_partial: whether only some of the modules that the backbone names are wrapped.
    """

    config: Any
    towers: tuple[Tower, ...]
    _model: nn.Module = field(repr=False)
    _wrapped: list[WrappedModule] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _buffers: BufferSnapshot = field(repr=False)
    is_partial: bool = False

    folded = RenamedAttribute("temporarily_merged")
    fill = RenamedAttribute("load_tensors")

    def parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters, layer by layer in the model's order."""
        return [parameter for wrapped in self._wrapped for parameter in wrapped.parameters().values()]

    def second_matrices(self) -> list[nn.Parameter]:
        """The matrices B, in which the update ``scaling * B @ A`` of each layer is linear."""
        self._require_attached()
        return [p for wrapped in self._wrapped for name, p in wrapped.parameters().items() if "lora_B" in name]

    def tensors(self) -> dict[str, Tensor]:
        """Return LoRA's tensors on the CPU, by their names in ``adapter_model.safetensors``."""
        self._require_attached()
        return {
            f"{PREFIX}{wrapped.name}.{name}": parameter.detach().cpu().contiguous()
            for wrapped in self._wrapped
            for name, parameter in wrapped.parameters().items()
        }

    @property
    def needs_own_layers(self) -> bool:
        """Whether a layer is not one of peft's, so that peft cannot load what :func:`save_lora` writes."""
        return not all(type(wrapped.layer).__module__.startswith("peft.") for wrapped in self._wrapped)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of a file, by the names of :meth:`tensors`, into the layers.

        Raises:
            TTDError: names or shapes differ from those of :meth:`tensors`; nothing is changed then.
        """
        self._require_attached()
        expected = self.tensors()
        wrong = sorted(expected.keys() ^ tensors.keys()) or sorted(
            name for name, tensor in expected.items() if tensor.shape != tensors[name].shape
        )
        if wrong:
            raise TTDError(
                f"this is LoRA of other modules or of another rank ({len(wrong)} tensors differ, such as {wrong[0]}); "
                "load the backbone that it was trained on, with the same dense mode"
            )
        with torch.no_grad():
            for wrapped in self._wrapped:
                for name, parameter in wrapped.parameters().items():
                    parameter.copy_(tensors[f"{PREFIX}{wrapped.name}.{name}"])

    def merge(self) -> None:
        """Add LoRA to the base weights, in place, and remove the layers.

        Raises:
            TTDError: LoRA has values that are not finite (nothing is changed), or is not attached any more.
        """
        self._require_attached()
        self._require_finite()
        for wrapped in self._wrapped:
            if not wrapped.layer.merged:
                wrapped.layer.merge()
        self.detach()

    @contextmanager
    def temporarily_merged(self) -> Iterator[None]:
        """Merge LoRA as :meth:`merge` does within a ``with`` block; afterwards the model is bitwise as before.

        The weights of the wrapped modules are stored twice meanwhile.

        Raises:
            TTDError: LoRA has values that are not finite, or is not attached any more.
        """
        self._require_attached()
        self._require_finite()
        layers = [wrapped.layer for wrapped in self._wrapped]
        unmerged = [layer for layer in layers if not layer.merged]
        originals = [(p, p.detach().clone()) for wrapped in self._wrapped for p in wrapped.base.parameters()]
        peft_config = getattr(self._model, "peft_config", None)
        try:
            for layer in unmerged:
                layer.merge()
            for wrapped in self._wrapped:
                setattr(wrapped.parent, wrapped.child, wrapped.base)
            if peft_config is not None:
                del self._model.peft_config
            yield
        finally:
            if peft_config is not None:
                self._model.peft_config = peft_config
            for wrapped, layer in zip(self._wrapped, layers, strict=True):
                setattr(wrapped.parent, wrapped.child, layer)
            for layer in unmerged:
                if layer.merged:
                    layer.unmerge()
            with torch.no_grad():
                for parameter, value in originals:
                    parameter.copy_(value)

    def remove(self) -> None:
        """Remove LoRA; modules, weights and buffers are bitwise those from before.

        Raises:
            TTDError: LoRA is not attached any more, or was merged into the weights through peft.
        """
        self._require_attached()
        if any(wrapped.layer.merged for wrapped in self._wrapped):
            raise TTDError(
                "LoRA was merged into the weights by peft's merge, which cannot be undone bitwise; call peft's "
                "unmerge first, or merge() to make it permanent"
            )
        self.detach()
        self._buffers.restore()

    def detach(self) -> None:
        """Put the base modules and ``requires_grad`` flags back, without a look at the weights."""
        for wrapped in self._wrapped:
            setattr(wrapped.parent, wrapped.child, wrapped.base)
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._wrapped = []
        self._requires_grad = []

    def _require_finite(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters()):
            raise TTDError(
                "LoRA has values that are not finite, so it was not merged; unload() restores the original model"
            )

    def _require_attached(self) -> None:
        if not self._wrapped:
            raise TTDError("LoRA is not attached to the model any more; it was merged or removed before")
