"""The record of a long experiment: a JSON file, replaced atomically after each stage, and a folder of weights."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ttd_plugins._version import __version__
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.configuration import plain_values, renamed_fields
from ttd_plugins.utils.files import atomic_path, make_folder, write_atomic
from ttd_plugins.utils.settings import filled, first_difference

_T = TypeVar("_T")
ADVICE = "free some space or choose another --out"
ENTRIES: dict[str, type] = {"settings": dict, "backbones": dict, "failures": dict, "pictures": list}
"""Entries of a record, and their types."""


def versions() -> dict[str, str]:
    """Versions on which metrics depend."""
    return {
        "ttd-plugins": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class ExperimentRecord:
    """A JSON file with the ``settings`` of an experiment and its results, and a folder ``weights`` beside it.

    Attributes:
        file: path of the JSON file.
        content: what the file stores. The caller changes it and calls :meth:`save`.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], **initial: Any) -> None:
        """Read an existing file, or begin a record that :meth:`save` writes.

        Args:
            file: path of the JSON file; its folder is created if it does not exist.
            settings: settings that must equal those of an existing file.
            **initial: the other entries of a new file.

        Raises:
            InputError: the file cannot be read or written, or has other settings.
        """
        self.file = file
        # Through JSON, so that tuples and paths compare equal to what a file stores.
        own = json.loads(json.dumps(settings))
        for folder in (file.parent, file.parent / "weights"):
            make_folder(folder)
        earlier = read_record(file) if file.exists() else {}
        if earlier:
            difference = first_difference(_with_current_names(earlier.get("settings")), own)
            if difference is not None:
                raise InputError(
                    f"{file} contains the results of a run with other settings ({difference}); choose another --out"
                )
        self.content: dict[str, Any] = {**initial, **earlier, "settings": own}

    def save(self) -> None:
        """Write the file, completely or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        write_atomic(self.file, json.dumps(self.content, indent=1) + "\n", advice=ADVICE)

    def weights_file(self, name: str) -> Path:
        """Return the path of the weights called ``name``."""
        return self.file.parent / "weights" / f"{name}.safetensors"


def read_record(file: Path) -> dict[str, Any]:
    """Return the content of a record.

    Raises:
        InputError: the file cannot be read, or is not a JSON object whose known entries have their types.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        for key, kind in ENTRIES.items():
            if not isinstance(content.get(key, kind()), kind):
                raise ValueError(f"{key!r} is not {'an object' if kind is dict else 'a list'}")
        for name, backbone in content.get("backbones", {}).items():
            _check_backbone_entry(name, backbone)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({one_sentence(error)}); choose another --out") from error
    return content


def _check_backbone_entry(name: str, entry: Any) -> None:
    """Raise ValueError unless the entry of a backbone has the types that a comparison continues from."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name!r} is not an object")
    for key in ("about", "figures", "bias", "curves", "seconds", "cost", "scaled"):
        if not isinstance(entry.get(key, {}), dict):
            raise ValueError(f"{key!r} of {name!r} is not an object")
    if not isinstance(entry.get("warnings", []), list):
        raise ValueError(f"'warnings' of {name!r} is not a list")
    for key in ("figures", "bias", "curves", "scaled"):
        for arm, values in entry.get(key, {}).items():
            kind = list if key == "curves" else dict
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise ValueError(f"{key!r} of {name!r} has no list of results for {arm!r}")


def _with_current_names(settings: Any) -> Any:
    """Rename old options of TTD in the settings of an earlier record; an option that it lacks has its default."""
    if not isinstance(settings, dict) or not isinstance(settings.get("ttd"), dict):
        return settings
    renamed = renamed_fields(TTDOptions)
    current = {renamed.get(key, key): value for key, value in settings["ttd"].items()}
    return settings | {"ttd": filled(current, plain_values(TTDOptions()))}


def save_trained_weights(file: Path, backbone: DenseAdapter, metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors of a backbone that require a gradient, completely or not at all.

    Args:
        file: path of the safetensors file.
        backbone: a trained backbone.
        metadata: stored in the header of the file.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    named = backbone.model.named_parameters()
    trained = {name: p.detach().cpu().contiguous() for name, p in named if p.requires_grad}
    try:
        with atomic_path(file, advice=ADVICE) as temporary:
            save_file(trained, temporary, dict(metadata or {}))
    except SafetensorError as error:
        raise InputError(f"{file} cannot be written ({one_sentence(error)}); {ADVICE}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file, empty if there is none.

    Raises:
        InputError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({one_sentence(error)}); choose another --out") from error


def timed(action: Callable[[], _T]) -> tuple[_T, float]:
    """Call ``action``; return its result and its duration in seconds."""
    started = time.perf_counter()
    return action(), round(time.perf_counter() - started, 1)
