"""Model objects that cannot be adapted as they are: wrappers around a model, compiled and quantised models.

Adapters read weights by their names in the model. A wrapper puts a prefix before these names, and a quantised module
has no floating-point weights. Both are refused in one sentence that says what to pass instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.errors import UnsupportedModelError

AROUND_TTD = "and put {kind} around the engine: {kind}(TTD(wrap(model)))"


@dataclass(frozen=True)
class _Wrapper:
    """A class of wrappers: its name, the start of its module's name, where the model is, and what to do."""

    name: str
    module: str
    inside: str
    advice: str


_UNWRAP_AND_REWRAP = "pass the model itself, {inside}, " + AROUND_TTD
_WRAPPERS = (
    _Wrapper("OptimizedModule", "torch.", "_orig_mod", "pass the model itself, {inside}, and compile after wrapping"),
    _Wrapper("DistributedDataParallel", "torch.", "module", _UNWRAP_AND_REWRAP),
    _Wrapper(
        "DataParallel",
        "torch.",
        "module",
        "pass the model itself, {inside}, and train with DistributedDataParallel(TTD(wrap(model))), which splits lists "
        "of captions correctly",
    ),
    _Wrapper("FullyShardedDataParallel", "torch.", "module", _UNWRAP_AND_REWRAP),
    _Wrapper("FSDPModule", "torch.", "", "wrap the model before it is sharded, " + AROUND_TTD.format(kind="FSDP")),
    _Wrapper("AveragedModel", "torch.", "module", "pass the model itself, {inside}"),
    _Wrapper(
        "PeftModel",
        "peft",
        "base_model.model",
        "pass what merge_and_unload() returns (its LoRA merged) or what unload() returns (its LoRA removed), with "
        "wrap(..., lora=RANK) for new LoRA",
    ),
    _Wrapper(
        "BaseTuner",
        "peft",
        "model",
        "pass what merge_and_unload() or unload() returns, with wrap(..., lora=RANK) for new LoRA",
    ),
    _Wrapper("PeftMixedModel", "peft", "base_model.model", "pass what merge_and_unload() or unload() returns"),
    _Wrapper("DeepSpeedEngine", "deepspeed", "module", "pass the model itself, {inside}"),
    _Wrapper("_FabricModule", "lightning", "module", "pass the model itself, {inside}, and set up TTD(wrap(model))"),
    _Wrapper("ScriptModule", "torch.", "", "load the Python model (jit=False) and pass that"),
    _Wrapper("GraphModule", "torch.fx", "", "pass the model that was traced"),
)


def refusal(model: object) -> str | None:
    """Why a model object cannot be adapted whatever its family, as one sentence; ``None`` where it can.

    A wrapper (compiled, distributed, sharded, averaged, of peft), a TorchScript module, weights without a model, and a
    quantised model are refused.
    """
    what = class_name(model)
    for cls in type(model).__mro__:
        for wrapper in _WRAPPERS:
            if cls.__name__ == wrapper.name and cls.__module__.startswith(wrapper.module):
                inside = f"model.{wrapper.inside}" if wrapper.inside else "model"
                return f"{what} is a wrapper around a model; " + wrapper.advice.format(
                    inside=inside, kind=wrapper.name.lstrip("_")
                )
    if not isinstance(model, nn.Module):
        return None
    for name, parameter in model.named_parameters():
        # Not isinstance: without torch.distributed the class may be missing.
        if hasattr(parameter, "full_tensor"):
            return (
                f"the parameter {name} of {what} is sharded over processes; wrap the model before it is sharded, "
                + AROUND_TTD.format(kind="FSDP")
            )
    part = quantised_part(model)
    if part is not None:
        return (
            f"{what} is quantised ({part}), and TTD reads and trains floating-point weights; load the model in "
            "float32, bfloat16 or float16, and quantise it after merge()"
        )
    return None


def refuse(model: object) -> None:
    """Raise UnsupportedModelError with the :func:`refusal` of a model object, if there is one."""
    reason = refusal(model)
    if reason is not None:
        raise UnsupportedModelError(reason)


def quantised_part(model: nn.Module) -> str | None:
    """Return the first quantised module or parameter and its kind; ``None`` for a floating-point model."""
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        # torch's own quantised layers have a method instead of a parameter.
        packed = weight is not None and not isinstance(weight, Tensor) and callable(weight)
        if packed or isinstance(getattr(module, "qweight", None), Tensor):
            return f"{name or 'the model'} is a {class_name(module)}"
    for name, parameter in model.named_parameters():
        kinds = (type(parameter), type(parameter.data))
        subclass = [kind for kind in kinds if kind.__module__.partition(".")[0] in _QUANTISERS]
        if subclass:
            return f"{name} is a {subclass[0].__module__}.{subclass[0].__qualname__}"
        narrow = parameter.dtype in (torch.int8, torch.uint8) and parameter.ndim >= 2
        if narrow or (parameter.is_floating_point() and parameter.element_size() < 2):
            return f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}"
    return None


_QUANTISERS = frozenset({"bitsandbytes", "torchao", "quanto", "optimum", "hqq"})


def advice_for_unclaimed(model: object, claimed: Callable[[object], bool]) -> str | None:
    """What to pass instead of an object that no family claims, as the end of a sentence; ``None`` if unknown.

    Args:
        model: the object.
        claimed: whether a family claims an object; called for parts of ``model``.
    """
    if isinstance(model, tuple | list):
        found = [number for number, item in enumerate(model) if isinstance(item, nn.Module)]
        return f"pass the model alone, item {found[0]} of this {type(model).__name__}" if found else None
    if isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values()):
        return "these are weights without a model: build the model, call load_state_dict(), and pass the model"
    if isinstance(model, type):
        return f"pass an object of the class, not the class {model.__qualname__}"
    if isinstance(model, nn.Module):
        for name, module in list(model.named_modules())[1:]:
            if name.count(".") < 3 and claimed(module):
                return f"pass the model inside it, model.{name}"
        return None
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module) and claimed(inner):
        return "pass the model inside it, its attribute model"
    return None


def class_name(model: object) -> str:
    """Full name of the class of an object."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def adapter_repr(adapter: Any) -> str:
    """One line on an adapter: class, name, size, tuning and device; ``adapter.model`` prints its modules."""
    try:
        parts = [f"{sum(parameter.numel() for parameter in adapter.model.parameters()) / 1e6:.1f} M parameters"]
        parts += [f"tuned from {adapter.tuned_from}"] * (adapter.tuned_from is not None)
        parts += [f"LoRA of rank {adapter._lora.config.r}"] if adapter._lora is not None else []
        return f"{type(adapter).__name__}({adapter.description.name}, {', '.join([*parts, str(adapter.device)])})"
    # A debugger also prints an adapter that is only half built.
    except Exception:
        return f"{type(adapter).__name__}()"
