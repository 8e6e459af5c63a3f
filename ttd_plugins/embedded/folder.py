"""Files in the folder of an embedded model beside its configuration: weights, tokenizer and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import TTDError, one_sentence

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "ttd.json"


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


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load ``model.safetensors``, which has float16 tensors, into a float32 model.

    Raises:
        TTDError: the file cannot be read, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TTDError(
            f"the weights {path} cannot be loaded ({one_sentence(error)}); reinstall ttd-plugins or pass a "
            "complete model folder"
        ) from error
