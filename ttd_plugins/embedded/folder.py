"""Files in the folder of an embedded model beside its configuration: weights, tokenizer and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import TTDError, one_sentence
from ttd_plugins.utils.files import atomic_path, write_atomic

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "ttd.json"
INDEX_FILE = "model.safetensors.index.json"
LORA_FOLDER = "lora"
"""Folder within that of a model, with LoRA that was trained with TTD, in the format of ``save_lora``."""
MAX_SHARD = 4_000_000
"""Bytes of a file of weights, below the 4 MiB that reviews and mirrors of a repository accept without trouble."""


@dataclass(frozen=True)
class TinySettings:
    """Content of ``ttd.json``.

    Attributes:
        dense_mode: the default dense mode.
        calibration: map from cosine to probability; the default of the contract where none was fitted.
        trained_on: the only kind of images in the training, such as "drawings"; ``None`` for photographs.
    """

    dense_mode: str
    calibration: Calibration
    trained_on: str | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        TTDError: the file cannot be read, or contains something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TTDError(
            f"{path} cannot be read ({one_sentence(error)}); reinstall ttd-plugins or pass a complete model folder"
        ) from error
    if not isinstance(content, dict):
        raise TTDError(f"{path} must contain a JSON object, not a {type(content).__name__}")
    return content


def read_settings(folder: Path) -> TinySettings:
    """Read ``ttd.json`` of a model folder.

    Raises:
        TTDError: the file cannot be read, or an entry is missing or invalid.
    """
    content = read_json(folder / SETTINGS_FILE)
    try:
        calibration = Calibration(
            scale=float(content["calibration"]["scale"]), shift=float(content["calibration"]["shift"])
        )
        trained_on = content.get("trained_on")
        if trained_on is not None and not isinstance(trained_on, str):
            raise ValueError("trained_on is no text")
        return TinySettings(str(content["dense_mode"]), calibration, trained_on)
    except (KeyError, TypeError, ValueError) as error:
        raise TTDError(
            f"{folder / SETTINGS_FILE} must contain dense_mode and calibration (scale, shift): {one_sentence(error)}"
        ) from error


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``model.safetensors``, or shards below :data:`MAX_SHARD` bytes with an index where one file is too large.

    Raises:
        InputError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=MAX_SHARD)
    for file, names in plan.filename_to_tensors.items():
        with atomic_path(folder / file) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_atomic(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def has_weights(folder: Path) -> bool:
    """Whether the folder has a file of weights, or the index of its shards."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load ``model.safetensors`` or the shards of an index, which have float16 tensors, into a float32 model.

    Raises:
        TTDError: a file cannot be read, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(folder):
            path = folder / file
            tensors.update(load_file(path))
        # Counters stay integers; everything else is stored with fewer bits than the model has.
        model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TTDError(
            f"the weights {path} cannot be loaded ({one_sentence(error)}); reinstall ttd-plugins or pass a "
            "complete model folder"
        ) from error


def _weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in a folder."""
    if not (folder / INDEX_FILE).is_file():
        return [WEIGHTS_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise TTDError(f"{folder / INDEX_FILE} must contain a weight_map; reinstall ttd-plugins")
    # Only plain names: an index never leads out of its folder.
    return sorted({Path(str(name)).name for name in weight_map.values()})
