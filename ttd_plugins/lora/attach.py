"""Attach LoRA to a backbone through peft, in place.

What LoRA needs of a backbone is stated here as a protocol, so that the adapter contract depends on this package and
never the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.lora.handle import ADAPTER_NAME, TOWERS, LoRAHandle, Tower, WrappedModule
from ttd_plugins.utils.batch_norm import freeze_running_averages


class LoRABackbone(Protocol):
    """The part of :class:`~ttd_plugins.adapter.DenseAdapter` that LoRA needs; see there."""

    model: nn.Module
    lora_needs_adapter: bool
    _lora: LoRAHandle | None

    @property
    def description(self) -> Any: ...

    @property
    def has_lora(self) -> bool: ...

    def lora_targets(self, tower: Tower) -> list[str]: ...

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]: ...

    def add_lora(
        self, rank: int = ..., *, alpha: float | None = ..., dropout: float = ..., towers: Sequence[Tower] = ...
    ) -> Any: ...


def attach_lora(
    backbone: LoRABackbone,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    towers: Sequence[Tower] = TOWERS,
) -> LoRAHandle:
    """Wrap the modules that ``backbone.lora_targets`` names in LoRA layers, in place, and freeze everything else.

    Running averages of batch normalisation are frozen too: those modules are in evaluation mode from then on.
    LoRA weights are float32 if the model is in half precision, so that small steps are not lost.

    Args:
        backbone: the adapter; its ``model`` is changed until the handle's ``merge`` or ``remove``.
        rank: rank of the added matrices.
        alpha: the scale is ``alpha / rank``; by default alpha is ``2 * rank``.
        dropout: probability of dropping an input of the LoRA path while training.
        towers: the towers to adapt.

    Raises:
        InputError: an option is out of range.
        TTDError: the model has LoRA already, or a tower has no module that LoRA can wrap.
        UnsupportedModelError: peft cannot wrap one of the modules.
        MissingDependencyError: peft cannot be imported.
    """
    if rank < 1:
        raise InputError(f"the rank of LoRA must be 1 or more, not {rank}")
    if alpha is not None and alpha <= 0:
        raise InputError(f"alpha of LoRA must be above 0, not {alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"the dropout of LoRA must be at least 0 and below 1, not {dropout}")
    towers = tuple(tower for tower in TOWERS if tower in towers) if set(towers) <= set(TOWERS) else ()
    if not towers:
        raise InputError(f"the towers of LoRA must be one or both of {', '.join(TOWERS)}")
    peft = _import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = backbone.model
    if backbone.has_lora or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TTDError(
            f"{backbone.description.name} has LoRA or other peft layers already; merge() or unload() them first"
        )
    names = [name for tower in towers for name in _targets(backbone, tower)]
    layers = dict(backbone.lora_layers())
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():
        if isinstance(base, nn.MultiheadAttention) and not any(isinstance(base, kind) for kind in layers):
            raise UnsupportedModelError(
                f"{name} is an nn.MultiheadAttention, for which peft's own LoRA layer rewrites the base weights at "
                "every forward; the adapter must provide a layer of its own in lora_layers()"
            )
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # A pattern, because peft matches names in a list by their endings, and one tower's names end like the other's.
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in names),
        bias="none",
    )
    if layers:
        config._register_custom_module(layers)
    wrapped = [
        WrappedModule(name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], base)
        for name, base in bases.items()
    ]
    handle = LoRAHandle(config=config, towers=towers, _model=model, _wrapped=wrapped, _requires_grad=requires_grad)
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    except Exception as error:
        handle.detach()
        raise UnsupportedModelError(
            f"peft cannot add LoRA to {backbone.description.name}: {one_sentence(error)}"
        ) from error
    for module in wrapped:
        _match_mode_and_precision(module)
    handle._frozen_norms = freeze_running_averages(model)
    return handle


def _import_peft() -> Any:
    try:
        import peft
    except Exception as error:  # a half-installed dependency of peft fails with more than ImportError
        raise MissingDependencyError(
            f"LoRA needs peft, which cannot be imported ({type(error).__name__}: {one_sentence(error)}); run: "
            "pip install 'ttd-plugins[lora]'"
        ) from error
    return peft


def _targets(backbone: LoRABackbone, tower: Tower) -> list[str]:
    names = backbone.lora_targets(tower)
    if not names:
        raise TTDError(
            f"the {tower} tower of {backbone.description.name} has no module that LoRA can wrap; pass the other tower "
            "alone, or fine-tune without LoRA"
        )
    return names


def _match_mode_and_precision(wrapped: WrappedModule) -> None:
    """Set a new layer to its base's train/eval mode, and its half-precision LoRA weights to float32."""
    base = set(wrapped.base.modules())
    for module in wrapped.layer.modules():
        if module not in base:
            module.training = wrapped.base.training
    frozen = {id(parameter) for parameter in wrapped.base.parameters()}
    for parameter in wrapped.layer.parameters():
        if id(parameter) not in frozen and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
