"""Reading the weights files that people have: without running code, whatever the file contains.

A checkpoint of a training program often has more than named tensors: options, an optimizer, prefixes of a wrapper.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.file_kinds import describe_kind, read_head
from ttd_plugins.utils.loading_lock import LOADING_LOCK

CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which training programs store the state dict."""
_PREFIXES = ("module.", "model.", "_forward_module.")
_COMPILED = "_orig_mod."
_UNSUPPORTED = re.compile(r"(?:GLOBAL|Trying to instantiate|Unsupported class) ([\w.]+)")


@dataclass(frozen=True)
class StateDict:
    """The tensors of a file.

    Attributes:
        tensors: tensors by name, without prefixes of wrappers.
        is_plain: whether the file is nothing but these tensors under these names.
    """

    tensors: dict[str, Tensor]
    is_plain: bool


def read_state_dict(file: Path) -> StateDict:
    """Read named tensors from a safetensors file or a file of ``torch.save``, by content and not by name.

    Containers (:data:`CONTAINERS`) are unwrapped, and prefixes that ``torch.compile``, ``DistributedDataParallel`` and
    Lightning put before all names are removed. Beside tensors and plain containers, a file may contain
    ``argparse.Namespace`` and NumPy scalars; it runs no code.

    Raises:
        InputError: the file cannot be read, is something else than weights (the message says what), or would run code
            when loaded.
    """
    name = f"the checkpoint {str(file)!r}"
    if not file.is_file():
        raise InputError(f"{name} {'is a folder' if file.is_dir() else 'does not exist'}")
    values = _load(file, name)
    outer = values
    while (inner := _container(values)) is not None:
        values = inner
    if not isinstance(values, Mapping):
        raise InputError(f"{name} contains a {type(values).__name__} and no named tensors; save a model's state dict")
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if (values is outer and len(tensors) < len(values)) or not tensors:
        others = sorted(str(key) for key in values if key not in tensors)
        raise InputError(
            f"{name} has no named tensors alone, but also {', '.join(map(repr, others[:3]))}; save a model's state dict"
        )
    cleaned = without_prefixes(tensors)
    is_named_right = file.suffix == ".safetensors" or not _is_safetensors(read_head(file))
    return StateDict(cleaned, values is outer and list(cleaned) == list(tensors) and is_named_right)


def _container(values: Any, depth: int = 3) -> Mapping[Any, Any] | None:
    """The mapping inside ``values`` that has the tensors, or ``None`` if ``values`` itself has them or nothing does."""
    if not isinstance(values, Mapping) or depth == 0:
        return None
    for key in CONTAINERS:
        inner = values.get(key)
        if isinstance(inner, Mapping) and (
            any(isinstance(value, Tensor) for value in inner.values()) or _container(inner, depth - 1) is not None
        ):
            return inner
    return None


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"


def _load(file: Path, name: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    head = read_head(file)
    kind = _foreign_kind(head)
    if kind is not None:
        raise InputError(f"{name} is {kind}, and no weights; download the weights themselves")
    try:
        if file.suffix == ".safetensors" or _is_safetensors(head):
            return load_file(file)
        # The list of allowed classes is one for all threads.
        with LOADING_LOCK, torch.serialization.safe_globals(_harmless_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{name} is damaged or no safetensors file ({one_sentence(error, 160)}); copy or download it again"
        ) from error
    # A damaged or hostile file makes the unpickler raise anything.
    except Exception as error:
        raise InputError(
            f"{name} is refused: {_refusal(error)}; a safetensors file of its state dict is read"
        ) from error


def _foreign_kind(head: bytes) -> str | None:
    """What a file is that holds no weights, with its article; ``None`` for one that may."""
    kind = describe_kind(head)
    # torch.save writes ZIP files.
    return None if kind is None or kind.startswith("a ZIP") else kind


def _harmless_classes() -> list[Any]:
    """Classes that hold values only, as training programs store them beside the weights."""
    scalar = np.float64(0).__reduce__()[0]
    # The name under which NumPy 1 pickles the same function.
    old = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"}
    return [argparse.Namespace, *old, np.dtype, *sorted(dtypes, key=str)]


def _refusal(error: Exception) -> str:
    """Why torch does not load a file, without its advice to load it by running its code."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive, which contains code"
    found = _UNSUPPORTED.search(text)
    if found:
        return f"it contains the Python object {found[1]}, and only tensors and plain values are loaded, without code"
    reason = one_sentence(error, 160).removeprefix("Weights only load failed").strip(" .:")
    return "it is damaged or no file of torch.save" + (f" ({reason})" if reason else "")


def without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` under names without the prefixes that wrappers of a model add.

    ``_orig_mod.`` of ``torch.compile`` is removed wherever it is, ``module.`` and ``model.`` where all names begin with
    them. If two names would become one, all stay as they are.
    """
    names = {name: name.replace(_COMPILED, "") for name in tensors}
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and len(name) > len(prefix) for name in names.values()):
                names = {old: name.removeprefix(prefix) for old, name in names.items()}
                stripped = True
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def describe_mismatch(found: Iterable[str], expected: Iterable[str], image_tower: Iterable[str]) -> str | None:
    """Say how the names in a file differ from those of a model, as the end of a sentence that begins with "it".

    Returns ``None`` if the names are the same.

    Args:
        found: names in the file.
        expected: names in the model.
        image_tower: names of the model's image tower.
    """
    have, due, image = set(found), set(expected), set(image_tower)
    prefix = _common_prefix(image)
    if have and (have <= image or {prefix + name for name in have} <= image):
        return "has the weights of an image tower alone, and the text tower is missing"
    text = due - image
    if have and have <= text:
        return "has the weights of a text tower alone, and the image tower is missing"
    missing, unknown = sorted(due - have), sorted(have - due)
    parts = [f"lacks {len(missing)} of {len(due)} tensors, such as {missing[0]}"] if missing else []
    parts += [f"has {len(unknown)} others, such as {unknown[0]}"] if unknown else []
    return " and ".join(parts) or None


def _common_prefix(names: set[str]) -> str:
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 else ""


def foreign_files(folder: Path) -> str | None:
    """Return a sentence about the first file in a folder that is no weights or JSON file in truth, or ``None``."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES and file.is_file())
    except OSError:
        return None
    for file in files:
        kind = _foreign_kind(read_head(file))
        if kind is not None:
            return f"{file.name} is {kind}"
    return None


_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".model")
