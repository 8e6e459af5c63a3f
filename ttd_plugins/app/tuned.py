"""Tuned backbones from whatever form they were kept in: a run, LoRA alone, weights of the demo, or another name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ttd_plugins.errors import InputError, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

Kind = Literal["run", "lora", "demo", "weights", "name"]
DEMO_WEIGHTS = Path("weights/after.safetensors")
EXPORTED = ("model.safetensors", "open_clip_model.safetensors")
"""State dicts that an export in the form of the library, or of weights alone, consists of."""
FORMS = (
    "the folder of a run of `ttd train`, of `ttd export` in any form, or of `ttd demo`; a file of "
    "weights such as DEMO/weights/after.safetensors; or a backbone name"
)


def tuned_kind(source: str) -> Kind:
    """What ``source`` is, judged by the files alone and in no time.

    Raises:
        InputError: it is not there, or none of the forms that are understood.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            return "weights"
        raise InputError(f"{source!r} is a file and not *.safetensors; give {FORMS}")
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "lora"
        if (path / "config.yaml").is_file():
            return "run"
        if (path / DEMO_WEIGHTS).is_file():
            return "demo"
        if any((path / file).is_file() for file in EXPORTED):
            return "weights"
        raise InputError(f"the folder {source!r} holds no tuned backbone that is understood; give {FORMS}")
    if ":" in source and not source.startswith((".", "/")):
        return "name"
    raise InputError(f"{source!r} does not exist; give {FORMS}")


def load_tuned(name: str, source: str, *, device: str | None = None) -> DenseAdapter:
    """The backbone ``name`` as it was tuned, in evaluation mode.

    Args:
        name: the backbone before tuning.
        source: one of the forms that :func:`tuned_kind` knows.
        device: where it goes.

    Raises:
        InputError: the source cannot be read, or is of another backbone.
        TTDError: the backbone cannot be loaded.
    """
    from ttd_plugins.plugins import load

    kind, path = tuned_kind(source), Path(source)
    if kind == "name":
        return load(source, device=device)
    if kind == "run":
        adapter = _of_run(name, path)
    elif kind == "lora":
        from ttd_plugins.lora import load_lora

        adapter = load_lora(load(name), path)
    else:
        if kind == "demo":
            _require_demo_of(name, path)
            path /= DEMO_WEIGHTS
        elif path.is_dir():
            path = next(path / file for file in EXPORTED if (path / file).is_file())
        adapter = _of_weights(name, path)
    return (adapter if device is None else adapter.to(device)).eval()


def _of_run(name: str, run: Path) -> DenseAdapter:
    from ttd_plugins.plugins import load, parse_name
    from ttd_plugins.training.checkpoints import checkpoint_steps, restore_backbone
    from ttd_plugins.training.config import TrainConfig

    own = TrainConfig.read(run / "config.yaml").backbone.name
    if own is not None and parse_name(own) != parse_name(name):
        raise InputError(f"{run} is a run of {own} and not of {name}; give it as --tuned {own}={run}")
    if not checkpoint_steps(run):
        raise InputError(f"{run} holds no checkpoint yet; wait for the first, or give another run")
    # A run that was given an object in place of a name cannot build it again.
    return restore_backbone(run, backbone=load(name) if own is None else None)


def _require_demo_of(name: str, folder: Path) -> None:
    from ttd_plugins.plugins import parse_name

    try:
        own = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["settings"]["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'metrics.json'} does not say which backbone it is of: {one_sentence(error)}"
        ) from error
    if parse_name(own) != parse_name(name):
        raise InputError(f"{folder} is a demo of {own} and not of {name}; give it as --tuned {own}={folder}")


def _of_weights(name: str, file: Path) -> DenseAdapter:
    from ttd_plugins.plugins import load
    from ttd_plugins.training.checkpoints import load_tensors, read_foreign_weights

    tensors = read_foreign_weights(file)
    adapter = load(name)
    rank = _lora_rank(tensors)
    if rank is not None:
        adapter.add_lora(rank)
        lora = {id(parameter) for parameter in adapter.lora_parameters()}
        due = {key for key, parameter in adapter.model.named_parameters() if id(parameter) in lora}
        missing = sorted(due - tensors.keys())
        if missing:
            raise InputError(
                f"{file} lacks {len(missing)} of {len(due)} tensors of LoRA on both towers, such as {missing[0]}; give "
                "the folder of the run or of its exported LoRA"
            )
    elif not tensors:
        raise InputError(f"{file} holds no tensors")
    # Float16 files fill float32 models; nothing is lost.
    load_tensors(adapter.model, tensors, str(file))
    return adapter


def _lora_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of LoRA in a file by its first down-projection; ``None`` where the file has none."""
    for key, tensor in tensors.items():
        if "lora_A" in key and tensor.ndim == 2:
            return int(tensor.shape[0])
    return None
