"""LoRA (arXiv 2106.09685) for any adapter, through peft, in place and without a trace once it is taken out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import TOWERS, Tower
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, UnsupportedModelError, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

ADAPTER_NAME = "default"
"""The name that peft knows our LoRA by; its state-dict helpers take it by default."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, OWN_TYPE = "LORA", "TTD_LORA"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules in its files."""


@dataclass
class _Place:
    """Where a LoRA layer is put, and the base module that it wraps."""

    name: str
    parent: nn.Module
    child: str
    base: nn.Module

    @property
    def layer(self) -> Any:
        """What stands there now."""
        return getattr(self.parent, self.child)

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's own parameters by their names in the layer, without the adapter's name."""
        base = {id(parameter) for parameter in self.base.parameters()}
        named = self.layer.named_parameters()
        return {name.replace(f".{ADAPTER_NAME}.", "."): p for name, p in named if id(p) not in base}


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
        return [parameter for place in self._places for parameter in place.parameters().values()]

    def tensors(self) -> dict[str, Tensor]:
        """LoRA's tensors on the CPU, by the names that ``adapter_model.safetensors`` has for them."""
        self._require_inside()
        return {
            f"{PREFIX}{place.name}.{name}": parameter.detach().cpu().contiguous()
            for place in self._places
            for name, parameter in place.parameters().items()
        }

    @property
    def needs_own_layers(self) -> bool:
        """Whether some layer is none of peft's, so that peft alone cannot serve what :func:`save_lora` writes."""
        return not all(type(place.layer).__module__.startswith("peft.") for place in self._places)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a file into the layers, which must want exactly these.

        Raises:
            TTDError: one is absent, is one too many, or does not fit; nothing is changed then.
        """
        self._require_inside()
        due = self.tensors()
        wrong = sorted(due.keys() ^ tensors.keys()) or sorted(
            name for name, tensor in due.items() if tensor.shape != tensors[name].shape
        )
        if wrong:
            raise TTDError(
                f"this is LoRA of other modules or of another rank ({len(wrong)} tensors differ, such as {wrong[0]}); "
                "load the backbone that it was made for, with the same dense mode"
            )
        with torch.no_grad():
            for place in self._places:
                for name, parameter in place.parameters().items():
                    parameter.copy_(tensors[f"{PREFIX}{place.name}.{name}"])

    def merge(self) -> None:
        """Add LoRA to the base weights, in place, and take the layers out.

        Raises:
            TTDError: LoRA holds values that are not finite (nothing is changed), or is no longer in the model.
        """
        self._require_inside()
        self._require_finite()
        for place in self._places:
            if not place.layer.merged:
                place.layer.merge()
        self._take_out()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """The model as :meth:`merge` would leave it, for as long as the context lasts; then bitwise as it was before.

        The weights of the wrapped modules are kept twice meanwhile.

        Raises:
            TTDError: LoRA holds values that are not finite, or is no longer in the model.
        """
        self._require_inside()
        self._require_finite()
        layers = [place.layer for place in self._places]
        ours = [layer for layer in layers if not layer.merged]
        kept = [(p, p.detach().clone()) for place in self._places for p in place.base.parameters()]
        known = getattr(self._model, "peft_config", None)
        try:
            for layer in ours:
                layer.merge()
            for place in self._places:
                setattr(place.parent, place.child, place.base)
            if known is not None:
                del self._model.peft_config
            yield
        finally:
            if known is not None:
                self._model.peft_config = known
            for place, layer in zip(self._places, layers, strict=True):
                setattr(place.parent, place.child, layer)
            for layer in ours:
                if layer.merged:
                    layer.unmerge()
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)

    def _require_finite(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters()):
            raise TTDError(
                "LoRA holds values that are not finite, so it was not merged; unload() gives the model back as it was"
            )

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
        _Place(name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], base)
        for name, base in bases.items()
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


def save_lora(adapter: DenseAdapter, folder: str | Path) -> bool:
    """Write LoRA alone into an existing folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Where every layer is peft's own and the library's own forward calls it, this is peft's format and
    ``peft.PeftModel.from_pretrained`` takes the folder. Elsewhere the two files are alike, but ``peft_type`` is
    ``TTD_LORA``: peft then refuses the folder, where it would otherwise put layers of its own that compute something
    else in the place of ours, and :func:`load_lora` takes it.

    Returns:
        Whether peft alone suffices.

    Raises:
        TTDError: the model has no LoRA.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    handle = adapter._lora
    if handle is None:
        raise TTDError(f"{adapter.description.name} has no LoRA that could be saved; add_lora() puts it in")
    alone = not (handle.needs_own_layers or adapter.lora_needs_adapter)
    settings = handle.config.to_dict() | {
        "peft_type": PEFT_TYPE if alone else OWN_TYPE,
        "base_model_name_or_path": adapter.description.model,
        "inference_mode": True,
    }
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    save_file(handle.tensors(), str(Path(folder) / WEIGHTS_FILE), metadata={"format": "pt"})
    (Path(folder) / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return alone


def load_lora(adapter: DenseAdapter, folder: str | Path) -> DenseAdapter:
    """Put the LoRA that :func:`save_lora` wrote back into the same backbone, bitwise and ready to be trained.

    Args:
        adapter: the backbone that it was made for, in the same dense mode, without LoRA.
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter that was given.

    Raises:
        TTDError: a file cannot be read, or belongs to another backbone; the adapter is left without LoRA then.
        MissingDependencyError: peft is not installed.
    """
    folder = Path(folder)
    content, tensors = _read_lora(folder)
    unknown = _foreign_options(content)
    if unknown:
        raise TTDError(
            f"{folder / CONFIG_FILE} describes more than plain LoRA ({', '.join(unknown)}); load it with peft"
        )
    names = {name.removeprefix(PREFIX) for name in tensors}
    towers: list[Tower] = [
        tower
        for tower in TOWERS
        if any(name.startswith(f"{target}.") for target in adapter.lora_targets(tower) for name in names)
    ]
    if not towers:
        raise TTDError(
            f"{folder} holds LoRA for none of the modules of {adapter.description.name}; load the backbone that it was "
            f"made for ({content.get('base_model_name_or_path') or 'its name was not saved'})"
        )
    adapter.add_lora(int(content["r"]), alpha=content["lora_alpha"], dropout=content["lora_dropout"], towers=towers)
    handle = adapter._lora
    assert handle is not None
    try:
        handle.fill(tensors)
    except BaseException:
        handle.remove()
        adapter._lora = None
        raise
    return adapter


def _read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content["peft_type"] not in (PEFT_TYPE, OWN_TYPE):
            raise ValueError(f"its peft_type is {content['peft_type']}")
        numbers = [content[name] for name in ("r", "lora_alpha", "lora_dropout")]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("r, lora_alpha and lora_dropout must be numbers")
        return content, load_file(str(folder / WEIGHTS_FILE))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TTDError(
            f"no LoRA can be read from {folder} ({type(error).__name__}: {one_sentence(error)}); give a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as save_lora writes them"
        ) from error


def _foreign_options(content: Mapping[str, Any]) -> list[str]:
    """Names of the settings that change what LoRA computes and that ours never has."""
    plain = {"bias": ("none", None), "init_lora_weights": (True, False, None)}
    names = ("use_dora", "use_rslora", "lora_bias", "bias", "modules_to_save", "layer_replication", "target_parameters",
             "trainable_token_indices", "fan_in_fan_out", "rank_pattern", "alpha_pattern")  # fmt: skip
    return [name for name in names if content.get(name) and content[name] not in plain.get(name, ())]


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
