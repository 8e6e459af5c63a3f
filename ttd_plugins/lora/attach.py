"""Attach LoRA to a backbone through peft, in place.

What LoRA needs of a backbone is stated here as a protocol, so that the adapter contract depends on this package and
never the other way round.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.lora.handle import ADAPTER_NAME, TOWERS, LoRAHandle, Tower, WrappedModule
from ttd_plugins.utils.running_state import BufferSnapshot

LARGEST_RANK = 16_384
"""Largest rank of LoRA; no weight of a backbone is as wide, so a larger rank is a mistake."""


class LoRABackbone(Protocol):
    """The part of :class:`~ttd_plugins.adapter.DenseAdapter` that LoRA needs; see there."""

    model: nn.Module
    lora_needs_adapter: bool
    _lora: LoRAHandle | None

    @property
    def description(self) -> Any:
        """Facts about the backbone."""

    @property
    def has_lora(self) -> bool:
        """Whether LoRA is attached."""

    def lora_targets(self, tower: Tower) -> list[str]:
        """Return the names of the modules of a tower that LoRA can wrap."""

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Return module classes with LoRA layers of their own."""

    def add_lora(
        self,
        rank: int = ...,
        *,
        alpha: float | None = ...,
        dropout: float = ...,
        towers: Sequence[Tower] = ...,
        modules: str | None = ...,
    ) -> Any:
        """Attach LoRA."""


def attach_lora(
    backbone: LoRABackbone,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    towers: Sequence[Tower] = TOWERS,
    modules: str | None = None,
) -> LoRAHandle:
    """Wrap the modules that ``backbone.lora_targets`` names in LoRA layers, in place, and freeze everything else.

    LoRA weights are float32 if the model is in half precision, so that small steps are not lost.

    Args:
        backbone: the adapter; its ``model`` is changed until the handle's ``merge`` or ``remove``.
        rank: rank of the added matrices.
        alpha: the scale is ``alpha / rank``; by default alpha is ``2 * rank``.
        dropout: probability of dropping an input of the LoRA path while training.
        towers: the towers to adapt.
        modules: a regular expression; of the backbone's targets only those are wrapped in whose names it is found.

    Raises:
        InputError: an option is out of range, or the expression is invalid or found in no name of a tower.
        TTDError: the model has LoRA already, or a tower has no module that LoRA can wrap.
        UnsupportedModelError: peft cannot wrap one of the modules.
        MissingDependencyError: peft cannot be imported.
    """
    rank, alpha, dropout, towers = _checked(rank, alpha, dropout, towers)
    peft = _import_peft()
    model = backbone.model
    if backbone.has_lora:
        raise TTDError(f"{backbone.description.name} has LoRA already; merge() or unload() it first")
    if (foreign := foreign_peft_layer(model)) is not None:
        raise TTDError(foreign)
    names = [name for tower in towers for name in _targets(backbone, tower, modules)]
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
    handle = LoRAHandle(
        config=config,
        towers=towers,
        _model=model,
        _wrapped=wrapped,
        _requires_grad=requires_grad,
        _buffers=BufferSnapshot(model),
        is_partial=modules is not None,
    )
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    except Exception as error:
        handle.detach()
        raise UnsupportedModelError(
            f"peft cannot add LoRA to {backbone.description.name}: {one_sentence(error)}"
        ) from error
    for module in wrapped:
        _match_mode_and_precision(module)
    return handle


def foreign_peft_layer(model: nn.Module) -> str | None:
    """Return a sentence about the first peft layer of a model whose adapter has no LoRA; ``None`` if there is none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return None
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            return (
                f"{name} is a peft layer that this adapter did not add; call merge() or unload() of the adapter that "
                "added it, or merge_and_unload() of its PeftModel, and wrap the model again"
            )
    return None


def _checked(rank: Any, alpha: Any, dropout: Any, towers: Any) -> tuple[int, float | None, float, tuple[Tower, ...]]:
    """Return the options of LoRA; raise InputError if one has the wrong type or range."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if isinstance(rank, bool) or not hasattr(rank, "__index__") or not 1 <= rank <= LARGEST_RANK:
        raise InputError(f"the rank of LoRA must be a whole number from 1 to {LARGEST_RANK}, not {rank!r}")
    if alpha is not None and not (is_number(alpha) and alpha > 0):
        raise InputError(f"alpha of LoRA must be a finite number above 0, not {alpha!r}")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise InputError(f"the dropout of LoRA must be a number of at least 0 and below 1, not {dropout!r}")
    if isinstance(towers, str):
        towers = (towers,)
    try:
        chosen = set(towers)
    except TypeError:
        chosen = set()
    if not chosen or not chosen <= set(TOWERS):
        raise InputError(f"the towers of LoRA must be one or both of {', '.join(TOWERS)}, not {towers!r}")
    return int(rank), alpha, dropout, tuple(tower for tower in TOWERS if tower in chosen)


def _import_peft() -> Any:
    try:
        import peft
    except Exception as error:  # a half-installed dependency of peft fails with more than ImportError
        raise MissingDependencyError(
            f"LoRA needs peft, which cannot be imported ({type(error).__name__}: {one_sentence(error)}); run: "
            "pip install 'ttd-plugins[lora]'"
        ) from error
    return peft


def _targets(backbone: LoRABackbone, tower: Tower, modules: str | None = None) -> list[str]:
    names = backbone.lora_targets(tower)
    if names and modules is not None:
        try:
            chosen = [name for name in names if re.search(modules, name)]
        except re.error as error:
            raise InputError(
                f"{modules!r}, which selects modules for LoRA, is no regular expression: {error}"
            ) from error
        if not chosen:
            raise InputError(
                f"{modules!r} is found in no module of the {tower} tower that LoRA can wrap, such as {names[-1]}"
            )
        return chosen
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
