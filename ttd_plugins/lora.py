"""LoRA (arXiv 2106.09685) for any adapter, through peft, in place and without a trace once it is taken out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ttd_plugins.adapter import TOWERS, Tower
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, UnsupportedModelError, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

ADAPTER_NAME = "default"
"""The name that peft knows our LoRA by; its state-dict helpers take it by default."""


@dataclass
class _Place:
    """Where a LoRA layer is put, and the base module that it wraps."""

    parent: nn.Module
    child: str
    base: nn.Module

    @property
    def layer(self) -> Any:
        """What stands there now."""
        return getattr(self.parent, self.child)


@dataclass
class LoRAHandle:
    """LoRA that is inside a model now: its parameters, and the two ways out.

    Attributes:
        config: the ``peft.LoraConfig`` that describes it.
        towers: the towers that carry it.
    """

    config: Any
    towers: tuple[Tower, ...]
    _model: nn.Module = field(repr=False)
    _places: list[_Place] = field(repr=False)
    _flags: list[tuple[nn.Parameter, bool]] = field(repr=False)

    def parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters, layer by layer in the model's order."""
        parameters: list[nn.Parameter] = []
        for place in self._places:
            base = {id(parameter) for parameter in place.base.parameters()}
            parameters.extend(p for p in place.layer.parameters() if id(p) not in base)
        return parameters

    def merge(self) -> None:
        """Add LoRA to the base weights, in place, and take the layers out.

        Raises:
            TTDError: LoRA holds values that are not finite (nothing is changed), or is no longer in the model.
        """
        self._require_inside()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters()):
            raise TTDError(
                "LoRA holds values that are not finite, so it was not merged; unload() gives the model back as it was"
            )
        for place in self._places:
            if not place.layer.merged:
                place.layer.merge()
        self._take_out()

    def remove(self) -> None:
        """Take LoRA out: the very modules and tensors from before are back, bitwise.

        Raises:
            TTDError: LoRA is no longer in the model, or was folded into the weights behind our back.
        """
        self._require_inside()
        if any(place.layer.merged for place in self._places):
            raise TTDError(
                "LoRA was folded into the weights by peft's merge, which cannot be undone bitwise; call peft's "
                "unmerge first, or merge() to keep it"
            )
        self._take_out()

    def _require_inside(self) -> None:
        if not self._places:
            raise TTDError("LoRA is no longer in the model; it was merged or removed before")

    def _take_out(self) -> None:
        for place in self._places:
            setattr(place.parent, place.child, place.base)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._places = []
        self._flags = []


def attach_lora(
    adapter: DenseAdapter,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    towers: Sequence[Tower] = TOWERS,
) -> LoRAHandle:
    """Wrap the modules that ``adapter.lora_targets`` names in LoRA layers, in place, and freeze everything else.

    LoRA weights are float32 where the model is in half precision, so that small steps are not lost.

    Args:
        adapter: the backbone; its ``model`` is changed until the handle's ``merge`` or ``remove``.
        rank: rank of the added matrices.
        alpha: the scale is ``alpha / rank``; by default alpha is ``2 * rank``.
        dropout: probability of dropping an input of the LoRA path while training.
        towers: which towers are adapted.

    Raises:
        InputError: an option is out of range.
        TTDError: the model has LoRA already, or a tower has nothing that LoRA may wrap.
        MissingDependencyError: peft is not installed, or only half.
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

    model = adapter.model
    if adapter.has_lora or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TTDError(
            f"{adapter.description.name} has LoRA or other peft layers already; merge() or unload() them first"
        )
    names = [name for tower in towers for name in _targets(adapter, tower)]
    layers = dict(adapter.lora_layers())
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():
        if isinstance(base, nn.MultiheadAttention) and not any(isinstance(base, kind) for kind in layers):
            raise UnsupportedModelError(
                f"{name} is an nn.MultiheadAttention, for which peft's own LoRA layer rewrites the base weights at "
                "every forward; the adapter must bring a layer of its own in lora_layers()"
            )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
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
    places = [
        _Place(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], b) for name, b in bases.items()
    ]
    handle = LoRAHandle(config=config, towers=towers, _model=model, _places=places, _flags=flags)
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    except Exception as error:
        handle._take_out()
        raise UnsupportedModelError(
            f"peft cannot put LoRA into {adapter.description.name}: {one_sentence(error)}"
        ) from error
    for place in places:
        _like_base(place)
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


def _targets(adapter: DenseAdapter, tower: Tower) -> list[str]:
    names = adapter.lora_targets(tower)
    if not names:
        raise TTDError(
            f"the {tower} tower of {adapter.description.name} has nothing that LoRA may wrap; name the other tower "
            "alone, or tune fully"
        )
    return names


def _like_base(place: _Place) -> None:
    """Give a new layer its base's train/eval mode, and float32 weights to train."""
    base = set(place.base.modules())
    for module in place.layer.modules():
        if module not in base:
            module.training = place.base.training
    frozen = {id(parameter) for parameter in place.base.parameters()}
    for parameter in place.layer.parameters():
        if id(parameter) not in frozen and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
