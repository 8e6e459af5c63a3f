"""What is finished of a long experiment: one JSON file, written whole after every stage, and its arms' weights."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import ttd_plugins
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.training.checkpoints import load_tensors

_T = TypeVar("_T")


def versions() -> dict[str, str]:
    """The versions that decide figures."""
    return {
        "ttd-plugins": ttd_plugins.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class StageRecord:
    """A JSON file whose ``settings`` must stay, and a folder ``weights`` beside it.

    Attributes:
        file: where it is.
        content: what it holds; changed by the caller, and written by :meth:`save`.
    """

    def __init__(self, file: Path, settings: dict[str, Any], **empty: Any) -> None:
        """Take up the file, or begin it.

        Args:
            file: in a folder that is made if it is not there.
            settings: what must be the same to go on.
            **empty: what a new file holds beside its settings.

        Raises:
            InputError: the file cannot be read or written, or is of a run with other settings.
        """
        self.file = file
        self.content: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), **empty}
        try:
            (file.parent / "weights").mkdir(parents=True, exist_ok=True)
            earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
            if earlier is not None and not isinstance(earlier, dict):
                raise ValueError(f"{file.name} is no JSON object")
        except (OSError, ValueError) as error:
            raise InputError(
                f"the results cannot be kept in {file.parent} ({one_sentence(error)}); give another --out"
            ) from error
        if earlier is not None:
            different = _difference(earlier.get("settings"), self.content["settings"])
            if different is not None:
                raise InputError(
                    f"{file} holds the results of a run with other settings ({different}); give another --out"
                )
            self.content |= earlier
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        part = self.file.with_name(f"{self.file.name}.part")
        try:
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.file)
        except OSError as error:
            raise InputError(
                f"the results cannot be written to {self.file.parent} ({one_sentence(error)}); "
                "free some room or give another --out"
            ) from error

    def weights_file(self, name: str) -> Path:
        """Where the weights of an arm are kept."""
        return self.file.parent / "weights" / f"{name}.safetensors"

    def take_weights(self, name: str, backbone: DenseAdapter, rank: int) -> DenseAdapter:
        """Put kept weights into a fresh backbone, LoRA of ``rank`` first unless it is 0; in evaluation mode.

        Raises:
            InputError: they cannot be read, or are of another backbone.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.weights_file(name)
        try:
            kept = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the weights {file} cannot be read ({one_sentence(error)}); give another --out"
            ) from error
        if rank:
            backbone.add_lora(rank)
        load_tensors(backbone.model, kept, str(file))
        return backbone.eval()


def keep_weights(file: Path, backbone: DenseAdapter) -> None:
    """Write every tensor of a backbone that was trained, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    named = backbone.model.named_parameters()
    trained = {name: p.detach().cpu().contiguous() for name, p in named if p.requires_grad}
    part = file.with_suffix(".part")
    try:
        save_file(trained, part)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights cannot be written to {file} ({one_sentence(error)}); free some room") from error


def timed(action: Callable[[], _T]) -> tuple[_T, float]:
    """What ``action`` gives, and the seconds that it took."""
    started = time.perf_counter()
    return action(), round(time.perf_counter() - started, 1)


def _difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two settings differ first, and how; ``None`` where they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*other, *(key for key in one if key not in other)]:
            found = _difference(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    if one == other:
        return None
    return f"{path or 'settings'}: {json.dumps(one)[:80]} there, {json.dumps(other)[:80]} now"
