"""Tuned backbones from whatever form they were kept in: a run, LoRA alone, weights of the demo, or another name.

Whatever takes a tuned backbone from its user, such as ``ttd app`` and ``ttd compare``, takes these forms.
"""

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
EXPORTED = "*model.safetensors"
"""The state dict of an export in the form of the library, whose name is its own, or of weights alone."""
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
        if any(path.glob(EXPORTED)):
            return "weights"
        raise InputError(f"the folder {source!r} holds no tuned backbone that is understood; give {FORMS}")
    if ":" in source and not source.startswith((".", "/")):
        return "name"
    raise InputError(f"{source!r} does not exist; give {FORMS}")


def untuned_name(source: str, name: str | None = None) -> str:
    """The name of the backbone before tuning: what ``source`` says of itself, or ``name``; quick as :func:`tuned_kind`.

    Args:
        source: one of the forms that :func:`tuned_kind` knows.
        name: the backbone that it is taken for; ``None`` where the source alone should tell, as runs and demos do.

    Raises:
        InputError: it is of another backbone than ``name``, holds nothing yet, or neither of the two names one.
    """
    from ttd_plugins.plugins import parse_name

    kind, path = tuned_kind(source), Path(source)
    own = (
        source if kind == "name" else _run_name(path) if kind == "run" else _demo_name(path) if kind == "demo" else None
    )
    if own is None and name is None:
        what = {"lora": "LoRA alone", "run": "a run that was given a model object"}.get(kind, "weights alone")
        raise InputError(f"{source!r} holds {what}; say of which backbone, as FAMILY:MODEL")
    if own is not None and name is not None and kind != "name" and parse_name(own) != parse_name(name):
        raise InputError(f"{source} is a {kind} of {own} and not of {name}; name {own} with it")
    return own or str(name)


def load_tuned(name: str | None, source: str, *, device: str | None = None) -> DenseAdapter:
    """The backbone ``name`` as it was tuned, in evaluation mode, LoRA still in place where it was tuned by LoRA.

    Args:
        name: the backbone before tuning, or ``None`` where the source says it, as runs and demos do.
        source: one of the forms that :func:`tuned_kind` knows.
        device: where it goes.

    Raises:
        InputError: the source cannot be read, or is of another backbone.
        TTDError: the backbone cannot be loaded.
    """
    from ttd_plugins.plugins import load

    kind, path, base = tuned_kind(source), Path(source), untuned_name(source, name)
    if kind == "name":
        return load(source, device=device)
    if kind == "run":
        from ttd_plugins.training.checkpoints import restore_backbone

        # A run that was given an object in place of a name cannot build it again.
        adapter = restore_backbone(path, backbone=load(base) if _run_name(path) is None else None)
    elif kind == "lora":
        from ttd_plugins.lora import load_lora

        adapter = load_lora(load(base), path)
    else:
        if path.is_dir():
            path = next(file for file in (path / DEMO_WEIGHTS, *sorted(path.glob(EXPORTED))) if file.is_file())
        adapter = _of_weights(base, path)
    return (adapter if device is None else adapter.to(device)).eval()


def _run_name(run: Path) -> str | None:
    from ttd_plugins.training.checkpoints import checkpoint_steps
    from ttd_plugins.training.config import TrainConfig

    own = TrainConfig.read(run / "config.yaml").backbone.name
    if not checkpoint_steps(run):
        raise InputError(f"{run} holds no checkpoint yet; wait for the first, or give another run")
    return own


def _demo_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["settings"]["backbone"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'metrics.json'} does not say which backbone it is of: {one_sentence(error)}"
        ) from error


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
