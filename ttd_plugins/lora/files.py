"""Save LoRA to a folder in peft's format, and load it back."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.lora.attach import LARGEST_RANK, LoRABackbone
from ttd_plugins.lora.handle import PREFIX, TOWERS, Tower
from ttd_plugins.utils.files import atomic_path, write_atomic
from ttd_plugins.utils.state_dicts import foreign_files
from ttd_plugins.utils.wrapped_models import class_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, OWN_TYPE = "LORA", "TTD_LORA"
PARTIAL = "ttd_some_modules"
"""Key that is true where only some of the backbone's modules have LoRA; without it, a missing module is an error."""

_BackboneT = TypeVar("_BackboneT", bound=LoRABackbone)


def save_lora(adapter: LoRABackbone, folder: str | Path) -> bool:
    """Write LoRA alone into a folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The folder is made if it does not exist.

    If every layer is peft's own and the library's own forward calls it, this is peft's format, and
    ``peft.PeftModel.from_pretrained`` loads the folder. Otherwise ``peft_type`` is ``TTD_LORA``: peft would replace
    our layers by its own, which compute something else, and refuses the folder instead; :func:`load_lora` loads it.

    Returns:
        Whether peft alone can load the folder.

    Raises:
        TTDError: the model has no LoRA.
        InputError: the folder has files of these names that hold no LoRA of this backbone.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    _require_backbone(adapter, "save_lora()")
    handle = adapter._lora
    if handle is None:
        raise TTDError(f"{adapter.description.name} has no LoRA to save; add_lora() adds it")
    peft_suffices = not (handle.needs_own_layers or adapter.lora_needs_adapter)
    settings = handle.config.to_dict() | {
        "peft_type": PEFT_TYPE if peft_suffices else OWN_TYPE,
        "base_model_name_or_path": adapter.description.model,
        "inference_mode": True,
    }
    if handle.is_partial:
        settings[PARTIAL] = True
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _require_own(folder, adapter.description.model)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(handle.tensors(), str(temporary), metadata={"format": "pt"})
    write_atomic(folder / CONFIG_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return peft_suffices


def _require_own(folder: Path, base: str) -> None:
    """Refuse to replace files that :func:`save_lora` did not write for the model ``base``."""
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if os.path.lexists(folder / name)]
    if not there:
        return
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        own = content["peft_type"] in (PEFT_TYPE, OWN_TYPE) and content["base_model_name_or_path"] == base
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        own = False
    if not own:
        raise InputError(f"{folder} has a file {there[0]} that is no LoRA of {base}; choose another folder")


def load_lora(adapter: _BackboneT, folder: str | Path) -> _BackboneT:
    """Add a LoRA from a folder to its backbone, bitwise and ready to be trained.

    The folder is one of :func:`save_lora`, or one that peft's ``save_pretrained`` wrote for the same model. peft's LoRA
    may adapt fewer modules than :meth:`~ttd_plugins.adapter.DenseAdapter.lora_targets` names, and no others.

    Args:
        adapter: the backbone that it was trained on, in the same dense mode, without LoRA.
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        ``adapter``.

    Raises:
        TTDError: a file cannot be read, or belongs to another backbone; the adapter has no LoRA then.
        MissingDependencyError: peft cannot be imported.
    """
    _require_backbone(adapter, "load_lora()")
    folder = Path(folder)
    content, tensors = _read_lora(folder)
    unsupported = _unsupported_options(content)
    if unsupported:
        raise TTDError(
            f"{folder / CONFIG_FILE} describes more than plain LoRA ({', '.join(unsupported)}); load it with peft"
        )
    names = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}
    targets = {tower: list(adapter.lora_targets(tower)) for tower in TOWERS}
    wrapped = {tower: [target for target in targets[tower] if target in names] for tower in TOWERS}
    towers: list[Tower] = [tower for tower in TOWERS if wrapped[tower]]
    others = sorted(names - {target for named in wrapped.values() for target in named})
    if towers and others:
        raise TTDError(
            f"{folder} holds LoRA for {len(others)} modules that {adapter.description.name} cannot adapt in the dense "
            f"mode {adapter.description.dense_mode}, such as {others[0]}; load the backbone in the same dense mode as "
            "it was trained in, or merge that LoRA with peft (merge_and_unload) and wrap the result"
        )
    if not towers:
        raise TTDError(
            f"{folder} holds LoRA for none of the modules of {adapter.description.name}; load the backbone that it was "
            f"trained on ({content.get('base_model_name_or_path') or 'its name was not saved'})"
        )
    chosen = "|".join(re.escape(target) for tower in towers for target in wrapped[tower])
    # Names of the backbone, never an expression of the file.
    only: str | None = f"^({chosen})$"
    if content.get(PARTIAL) is not True:
        if _is_own(content, adapter.description.model):
            # All modules or an error: in another dense mode the backbone has other ones.
            only = None
        elif missing := sorted(_declared_targets(content, targets) - names):
            raise TTDError(
                f"{folder / WEIGHTS_FILE} lacks the LoRA of {len(missing)} modules that {CONFIG_FILE} declares, such "
                f"as {missing[0]}; copy the folder again"
            )
    rank = int(content["r"])
    # Rank-stabilised LoRA (arXiv 2312.03732) scales by alpha / sqrt(rank), and plain LoRA by alpha / rank.
    stabilised = math.sqrt(rank) if content.get("use_rslora") is True else 1.0
    adapter.add_lora(
        rank,
        alpha=content["lora_alpha"] * stabilised if stabilised != 1 else content["lora_alpha"],
        dropout=content["lora_dropout"],
        towers=towers,
        modules=only,
    )
    handle = adapter._lora
    assert handle is not None
    try:
        handle.load_tensors(tensors)
    except BaseException:
        handle.remove()
        adapter._lora = None
        raise
    return adapter


def _is_own(content: Mapping[str, Any], base: str) -> bool:
    """Whether :func:`save_lora` wrote a configuration for the model ``base``: its expression lists full names."""
    declared = content.get("target_modules")
    if not isinstance(declared, str) or content.get("base_model_name_or_path") != base:
        return False
    return all(re.escape(re.sub(r"\\(.)", r"\1", name)) == name for name in declared.split("|"))


def _declared_targets(content: Mapping[str, Any], targets: Mapping[Tower, list[str]]) -> set[str]:
    """Return the targets of the backbone that a configuration of peft declares for certain.

    peft matches the names of a list by their endings. Expressions of a file are not evaluated, so they declare none.
    """
    declared = content.get("target_modules")
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(declared, list) or any(content.get(name) is not None for name in narrowed):
        return set()
    endings = [name for name in declared if isinstance(name, str)]
    return {
        target
        for named in targets.values()
        for target in named
        if any(target == name or target.endswith(f".{name}") for name in endings)
    }


def _require_backbone(adapter: object, who: str) -> None:
    """Raise InputError if ``adapter`` is no adapter."""
    if not hasattr(adapter, "_lora") or not hasattr(adapter, "lora_targets"):
        raise InputError(f"{who} takes an adapter, not an object of class {class_name(adapter)}; pass wrap(model)")


def _read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content["peft_type"] not in (PEFT_TYPE, OWN_TYPE):
            raise ValueError(f"its peft_type is {content['peft_type']}")
        rank, *numbers = (content[name] for name in ("r", "lora_alpha", "lora_dropout"))
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"r must be a whole number from 1 to {LARGEST_RANK}, not {rank!r}")
        for number in numbers:
            if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"lora_alpha and lora_dropout must be finite numbers, not {number!r}")
        tensors = load_file(str(folder / WEIGHTS_FILE))
        for name, tensor in tensors.items():
            # Before matrices of that rank are allocated.
            if "lora_A" in name and (tensor.ndim < 2 or tensor.shape[0] != rank or not tensor.numel()):
                raise ValueError(f"r is {rank}, and {name} has the shape {list(tensor.shape)}")
        return content, tensors
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = foreign_files(folder) or f"{type(error).__name__}: {one_sentence(error)}"
        raise TTDError(
            f"no LoRA can be read from {folder} ({reason}); pass a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as save_lora writes them"
        ) from error


def _unsupported_options(content: Mapping[str, Any]) -> list[str]:
    """Return the names of options that change what LoRA computes and that :func:`save_lora` never writes."""
    plain = {"bias": ("none", None), "init_lora_weights": (True, False, None)}
    names = ("use_dora", "lora_bias", "bias", "modules_to_save", "layer_replication", "target_parameters",
             "trainable_token_indices", "fan_in_fan_out", "rank_pattern", "alpha_pattern")  # fmt: skip
    return [name for name in names if content.get(name) and content[name] not in plain.get(name, ())]
